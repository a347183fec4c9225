"""Inpainting: black stays to the last bit, white is made anew, and what stays is seen while denoising."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.inference import edit
from sdlab.inference.engines.denoise import Known
from sdlab.inference.engines.hires import Pass
from sdlab.inference.engines.masks import Masked, softened
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.spec import Hires, Shot, Spec
from tests.inference.engines.making import SHOTS, any_sampler_of, picture, pixels

SIZE = (64, 48)
SPEC = Spec(4, 5.0, *SIZE, strength=1.0)


def mask(box: tuple[int, int, int, int] = (16, 16, 48, 32), size: tuple[int, int] = SIZE) -> Image.Image:
    made = Image.new("L", size)
    made.paste(255, box)
    return made


def numbers(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def klein(tiny_klein_folder: Path) -> Any:
    return any_sampler_of(tiny_klein_folder, prompts=["best, red", "best, blue", "ugly"])


@pytest.fixture(params=["sd", "klein"])
def either(request: pytest.FixtureRequest, sampler: Sampler, klein: Any) -> Any:
    return sampler if request.param == "sd" else klein


@pytest.mark.parametrize("blur", [0, 4])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_black_stays_to_the_last_bit_and_white_is_made_anew(either: Any, blur: int, strength: float) -> None:
    spec, black = replace(SPEC, strength=strength), numbers(mask()) == 0
    for made in pixels(either, SHOTS[:2], spec, init=picture(), mask=(mask(), blur)):
        assert (made[black] == numbers(picture())[black]).all()
        assert np.abs(made[20:28, 28:36] - numbers(picture())[20:28, 28:36]).mean() > 5


@pytest.mark.parametrize(
    "name",
    ["ddim", "pndm", "lcm", "euler a", "heun karras", "dpm2 a", "dpm++ 2m sde", "dpm++ sde", "deis", "unipc"],
)
@torch.no_grad()
def test_latents_outside_the_mask_are_the_pictures_own_with_every_scheduler(
    sampler: Sampler, name: str
) -> None:
    masked = Masked(picture(), mask(), 0)
    one = Pass(SHOTS[:2], replace(SPEC, scheduler=name), starts=[picture()] * 2, mask=masked)
    made, _ = sampler._denoise(one)
    clean, _ = sampler._encode(picture())
    stays = (masked.free(8) == 0).expand_as(made)
    assert torch.equal(made[stays], clean.expand_as(made)[stays]) and not torch.equal(
        made[~stays], clean.expand_as(made)[~stays]
    )
    assert made.isfinite().all() and made.abs().max() < 100


@pytest.mark.parametrize("name", ["euler", "heun", "heun karras", "dpm2", "dpm2 a"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_latents_are_put_back_after_whole_steps_only(
    sampler: Sampler, name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_whole: list[bool] = []
    put_back = Known.put_back

    def noted(self: Known, latents: torch.Tensor, scheduler: Any, next_timestep: torch.Tensor) -> Any:
        is_whole.append(len(next_timestep) == 0 or getattr(scheduler, "state_in_first_order", True))
        return put_back(self, latents, scheduler, next_timestep)

    monkeypatch.setattr(Known, "put_back", noted)
    spec = replace(SPEC, scheduler=name, strength=strength, steps=5)
    pixels(sampler, SHOTS[:1], spec, init=picture(), mask=(mask(), 0))
    assert is_whole == [True] * int(5 * strength)


def test_white_all_over_is_the_same_as_no_mask(either: Any) -> None:
    white = Image.new("L", SIZE, 255)
    plain = pixels(either, SHOTS[:1], SPEC, init=picture())[0]
    assert (pixels(either, SHOTS[:1], SPEC, init=picture(), mask=(white, 0))[0] == plain).all()


def test_black_all_over_gives_the_picture_back(either: Any) -> None:
    made = pixels(either, SHOTS[:1], SPEC, init=picture(), mask=(Image.new("L", SIZE), 4))[0]
    assert (made == numbers(picture())).all()


def test_what_stays_counts_for_what_is_new(either: Any) -> None:
    other = Image.eval(picture(), lambda value: 255 - value)
    other.paste(picture().crop((16, 16, 48, 32)), (16, 16))
    inside = (slice(20, 28), slice(20, 44))
    one, two = (
        pixels(either, SHOTS[:1], SPEC, init=p, mask=(mask(), 0))[0][inside] for p in (picture(), other)
    )
    assert (one != two).any()


def test_one_by_one_and_together_are_the_same_pictures(either: Any) -> None:
    looks = {"init": picture(), "mask": (mask(), 4)}
    spec = replace(SPEC, scheduler="euler a") if isinstance(either, Sampler) else SPEC
    alone = [pixels(either, [shot], spec, **looks)[0] for shot in SHOTS[:2]]
    again = [pixels(either, [shot], spec, **looks)[0] for shot in SHOTS[1::-1]][::-1]
    together = pixels(either, SHOTS[:2], spec, **looks)
    for a, b, c in zip(alone, again, together, strict=True):
        assert (a == b).all() and np.abs(a - c).max() <= 1


def test_mask_goes_through_the_second_pass(either: Any) -> None:
    spec = replace(SPEC, hires=Hires(96, 96, 4, 0.5))
    made = pixels(either, SHOTS[:1], spec, init=picture(), mask=(mask(), 0))[0]
    grown = numbers(picture().resize((96, 96), Image.Resampling.LANCZOS))
    black = numbers(mask().resize((96, 96), Image.Resampling.NEAREST)) == 0
    assert (made[black] == grown[black]).all() and (made[~black] != grown[~black]).any()


@pytest.mark.parametrize(
    ("paint", "becomes"),
    [
        ("white", 255),
        ("red", 255),  # a luminance of 76
        ("blue", 255),  # a luminance of 29
        ((128, 0, 0), 255),
        ((128, 128, 128), 255),
        ((127, 127, 127), 0),
        ((127, 0, 127), 0),
        ((1, 1, 1), 0),
    ],
)
def test_paint_counts_as_white_from_half_of_its_brightest_channel_on(
    tmp_path: Path, paint: str | tuple[int, int, int], becomes: int
) -> None:
    painted = Image.new("RGB", SIZE)
    painted.paste(paint, (16, 16, 48, 32))
    painted.putpixel((0, 0), (255, 255, 255))  # else one without anything bright is refused
    painted.save(tmp_path / "mask.png")
    _, read = edit.mask_for(picture(), tmp_path / "mask.png", max_pixels=10**6)
    expected = mask() if becomes else Image.new("L", SIZE)
    expected.putpixel((0, 0), 255)
    assert read.mode == "L" and (numbers(read) == numbers(expected)).all()


def test_a_mask_scaled_to_the_picture_has_no_grey_between_black_and_white(tmp_path: Path) -> None:
    mask((4, 4, 12, 8), (SIZE[0] // 4, SIZE[1] // 4)).save(tmp_path / "mask.png")
    _, read = edit.mask_for(picture(), tmp_path / "mask.png", max_pixels=10**6)
    assert read.size == SIZE and set(np.unique(numbers(read))) == {0, 255}
    assert read.getbbox() == mask().getbbox()


def test_soft_edge_lies_inside_the_white() -> None:
    box = Image.new("L", (100, 100))
    box.paste(255, (20, 20, 80, 80))
    soft = numbers(softened(box, 4))
    assert (soft[numbers(box) == 0] == 0).all() and soft[50, 50] == 255
    across = soft[50, 20:50]
    assert (np.diff(across) >= 0).all() and across[0] < 60 and len(set(across)) > 6
    assert (numbers(softened(box, 0)) == numbers(box)).all()


def test_latent_is_free_as_soon_as_one_pixel_is_not_black() -> None:
    dot = Image.new("L", (32, 16))
    dot.putpixel((9, 3), 1)
    assert Masked(picture(32, 16), dot, 0).free(8).tolist() == [[[[0, 1, 0, 0], [0, 0, 0, 0]]]]


def test_flagged_picture_is_black_all_over(fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def flags(image: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, list[bool]]:
        seen.append(image)
        return torch.zeros_like(image), [True]

    monkeypatch.setattr(fresh_sampler.pipeline, "run_safety_checker", flags)
    made = fresh_sampler.sample([Shot(0, "red", "", "", 1)], SPEC, init=picture(), mask=(mask(), 0))[0]
    assert made.safety == "flagged" and made.image is not None and made.image.getextrema() == ((0, 0),) * 3
    corner = fresh_sampler.pipeline.image_processor.preprocess(picture())[..., :8, :8]
    assert torch.equal(seen[0][..., :8, :8], corner)  # it looks at what is given out
