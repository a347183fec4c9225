"""The engine: who shares a batch changes nothing, and no bad picture passes as a good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.errors import SdlabError
from sdlab.inference import load
from sdlab.inference.engines import schedulers
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.identity import Hasher
from sdlab.inference.spec import Shot, Spec

SPEC = Spec(steps=3, guidance=5.0, width=64, height=48)
SHOTS = [Shot(i, text, "best, ", "ugly", 11 + i) for i, text in enumerate(["red", "blue", "green", "red"])]


def sampler_of(folder: Path) -> Sampler:
    chosen = load.choose(load.Asked(str(folder)), tuned=folder.parent / "none", hasher=Hasher())
    sampler = load.load(load.open_chosen(chosen), device="cpu", dtype="fp32", prompts=[]).sampler
    assert isinstance(sampler, Sampler)
    return sampler


@pytest.fixture(scope="module")
def sampler(tiny_sd_folder: Path) -> Sampler:
    return sampler_of(tiny_sd_folder)


@pytest.fixture
def fresh_sampler(tiny_sd_folder: Path) -> Sampler:
    return sampler_of(tiny_sd_folder)


def init_picture() -> Image.Image:
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([x * 4, y * 5, x * 0 + 90], -1).astype(np.uint8))


def pixels(
    sampler: Sampler, shots: list[Shot], spec: Spec, init: Image.Image | None = None
) -> list[np.ndarray]:
    made = [one.image for one in sampler.sample(shots, spec, init=init)]
    assert all(image is not None for image in made)
    return [np.asarray(image).astype(int) for image in made]


def with_scheduler(name: str, *, edit: bool) -> tuple[Spec, Image.Image | None]:
    strength = 0.7 if edit else None
    return Spec(4, 5.0, 64, 48, scheduler=name, strength=strength), init_picture() if edit else None


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *((name, False) for name in ["", *schedulers.SCHEDULERS]),
        *((name, True) for name in ["", "euler a", "heun", "lcm", "unipc"]),
    ],
)
def test_batch_and_order_change_nothing_beyond_rounding(sampler: Sampler, name: str, edit: bool) -> None:
    spec, init = with_scheduler(name, edit=edit)
    alone = [pixels(sampler, [shot], spec, init)[0] for shot in SHOTS[:2]]
    together = pixels(sampler, SHOTS[:2][::-1], spec, init)[::-1]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 20  # another prompt and seed are another picture


@pytest.mark.parametrize("name", ["", "euler a", "heun"])
def test_one_at_a_time_is_equal_bit_for_bit_in_any_order(sampler: Sampler, name: str) -> None:
    spec, _ = with_scheduler(name, edit=False)
    forward = [pixels(sampler, [shot], spec)[0] for shot in SHOTS]
    backward = [pixels(sampler, [shot], spec)[0] for shot in SHOTS[::-1]][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))


def test_pictures_are_those_of_diffusers(sampler: Sampler) -> None:
    shot = SHOTS[0]
    pipeline = sampler.pipeline
    reference = pipeline(
        shot.prompt,
        negative_prompt=shot.negative,
        num_inference_steps=3,
        guidance_scale=5.0,
        width=64,
        height=48,
        generator=torch.Generator("cpu").manual_seed(shot.seed),
    ).images[0]
    assert (pixels(sampler, [shot], SPEC)[0] == np.asarray(reference)).all()


def test_only_the_seed_tells_equal_prompts_apart(sampler: Sampler) -> None:
    first, last = pixels(sampler, [SHOTS[0]], SPEC)[0], pixels(sampler, [SHOTS[3]], SPEC)[0]
    again = pixels(sampler, [Shot(9, "red", "best, ", "ugly", SHOTS[0].seed)], SPEC)[0]
    assert (first == again).all() and (first != last).any()


@torch.no_grad()
def test_strength_says_how_much_of_the_picture_stays(sampler: Sampler) -> None:
    kept = np.asarray(sampler._picture(sampler._encode(init_picture())).image).astype(int)
    away = []
    for strength in (0.1, 0.5, 1.0):
        spec = Spec(20, 1.0, 64, 48, strength=strength)
        away.append(np.abs(pixels(sampler, SHOTS[:1], spec, init_picture())[0] - kept).mean())
    assert away[0] < away[1] < away[2]


def test_guidance_of_one_leaves_the_negative_prompt_out(sampler: Sampler) -> None:
    spec = Spec(3, 1.0, 64, 48)
    other = Shot(0, "red", "best, ", "something else", SHOTS[0].seed)
    assert (pixels(sampler, [SHOTS[0]], spec)[0] == pixels(sampler, [other], spec)[0]).all()


def test_models_own_scheduler_is_never_used_up(fresh_sampler: Sampler) -> None:
    own = schedulers.fresh(
        "pndm", fresh_sampler.pipeline.scheduler
    )  # SD 1.5's own, and it remembers past steps
    fresh_sampler.pipeline.scheduler = own
    first, again = (pixels(fresh_sampler, SHOTS[:1], SPEC)[0] for _ in range(2))
    assert (first == again).all() and own.num_inference_steps is None


def test_steps_are_reported(sampler: Sampler) -> None:
    seen: list[tuple[int, int]] = []
    sampler.sample(SHOTS[:1], SPEC, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_unfinite_latents_are_a_fault_not_a_picture(fresh_sampler: Sampler) -> None:
    fresh_sampler.pipeline.unet.conv_out.weight.data.fill_(float("nan"))
    made = fresh_sampler.sample(SHOTS[:2], SPEC)
    assert [one.image for one in made] == [None, None] and "denoiser" in made[0].fault


def test_unfinite_pixels_are_a_fault_not_a_picture(fresh_sampler: Sampler) -> None:
    fresh_sampler.pipeline.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    made = fresh_sampler.sample(SHOTS[:1], SPEC)
    assert made[0].image is None and "VAE" in made[0].fault


def test_vae_that_overflows_in_half_precision_is_run_in_float32(
    fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = pixels(fresh_sampler, SHOTS[:1], SPEC)[0]
    vae = fresh_sampler.pipeline.vae.to(torch.bfloat16)
    decode = vae.decode

    def overflowing(latents: torch.Tensor, **settings: Any) -> Any:
        (image,) = decode(latents, **settings)
        return (image * (float("nan") if image.dtype == torch.bfloat16 else 1),)

    monkeypatch.setattr(vae, "decode", overflowing)
    made = fresh_sampler.sample(SHOTS[:1], SPEC)[0]
    assert made.vae_float32 and made.image is not None and vae.dtype == torch.bfloat16
    assert np.abs(np.asarray(made.image).astype(int) - reference).mean() < 3  # its weights were rounded


def test_flagged_picture_is_black_and_says_so(
    fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags(image: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, list[bool]]:
        return torch.zeros_like(image), [True]

    monkeypatch.setattr(fresh_sampler.pipeline, "run_safety_checker", flags)
    made = fresh_sampler.sample(SHOTS[:1], SPEC)[0]
    assert made.flagged and made.image is not None and made.image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("", ""),
        ("DDIM", "ddim"),
        ("Euler a", "euler a"),
        ("euler_a", "euler a"),
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde", "dpm++ 2m sde"),
        ("PLMS", "pndm"),
        ("EulerAncestralDiscreteScheduler", "euler a"),
        ("UniPCMultistepScheduler", "unipc"),
    ],
)
def test_scheduler_names_people_use(typed: str, name: str) -> None:
    assert schedulers.canonical(typed) == name


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(SdlabError, match="did you mean 'dpm\\+\\+ 2m'") as caught:
        schedulers.canonical("dpm++ 2n")
    assert "unipc" in str(caught.value)


@pytest.mark.parametrize("name", ["", *schedulers.SCHEDULERS])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_work_or_are_refused_beforehand(sampler: Sampler, name: str, steps: int) -> None:
    try:
        schedulers.set_steps(schedulers.fresh(name, sampler.pipeline.scheduler), steps, name=name)
    except SdlabError as reason:
        assert name in str(reason)
        return
    assert sampler.sample(SHOTS[:1], Spec(steps, 5.0, 64, 48, scheduler=name))[0].image is not None


def test_too_many_steps_for_a_scheduler_are_refused_beforehand(sampler: Sampler) -> None:
    with pytest.raises(SdlabError, match="'lcm' cannot take 200 steps"):
        schedulers.set_steps(schedulers.fresh("lcm", sampler.pipeline.scheduler), 200, name="lcm")


def test_schedulers_keep_the_models_noise_schedule_and_prediction(tiny_sd: Any) -> None:
    velocity = sampler_of(tiny_sd("velocity", prediction_type="v_prediction")).pipeline.scheduler
    for name in ["", *schedulers.SCHEDULERS]:
        config = schedulers.fresh(name, velocity).config
        assert config.prediction_type == "v_prediction" and config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpm++ 2m karras", ("DPM++ 2M Karras", "Karras")),
        ("euler a", ("Euler a", "")),
        ("", ("DDIM", "")),
        ("pndm", ("PLMS", "")),
    ],
)
def test_sampler_names_of_other_programs(sampler: Sampler, name: str, expected: tuple[str, str]) -> None:
    made = schedulers.fresh(name, sampler.pipeline.scheduler)
    assert schedulers.sampler_name(made, name) == expected
    assert schedulers.sampler_name(made, "") == expected  # also told from the scheduler itself
