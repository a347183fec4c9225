"""The engine: who shares a batch changes nothing, and no bad picture passes as a good one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.inference.engines import schedulers
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.spec import Shot, Spec
from tests.inference.engines.making import SHOTS, SPEC, picture, pixels

SIX = ["ddim", "euler", "euler a", "dpm++ 2m karras", "dpm++ sde", "unipc"]


def with_scheduler(name: str, *, edit: bool) -> tuple[Spec, Image.Image | None]:
    strength = 0.7 if edit else None
    return Spec(3, 5.0, 64, 48, scheduler=name, strength=strength), picture() if edit else None


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *((name, False) for name in schedulers.SCHEDULERS if name not in SIX),
        *((name, True) for name in ["", "euler a", "heun", "lcm", "unipc"]),
    ],
)
def test_batch_and_order_change_nothing_beyond_rounding(sampler: Sampler, name: str, edit: bool) -> None:
    spec, init = with_scheduler(name, edit=edit)
    alone = [pixels(sampler, [shot], spec, init=init)[0] for shot in SHOTS[:2]]
    together = pixels(sampler, SHOTS[:2][::-1], spec, init=init)[::-1]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 20  # another prompt and seed are another picture


@pytest.mark.parametrize("name", SIX)
def test_one_at_a_time_is_equal_bit_for_bit_and_batches_are_within_a_rounding(
    sampler: Sampler, name: str
) -> None:
    spec = Spec(3, 5.0, 64, 48, scheduler=name)
    alone = {shot.seed: pixels(sampler, [shot], spec)[0] for shot in SHOTS}
    assert list(alone) == [11, 12, 13, 14]
    for shot in SHOTS[::-1]:
        assert (pixels(sampler, [shot], spec)[0] == alone[shot.seed]).all()
    for size in (2, 4):
        for group in (SHOTS[::-1][i : i + size] for i in range(0, 4, size)):
            for shot, made in zip(group, pixels(sampler, group, spec), strict=True):
                assert np.abs(made - alone[shot.seed]).max() <= 1


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
    away = []
    kept = pixels(sampler, SHOTS[:1], Spec(20, 1.0, 64, 48, strength=0.0), init=picture())[0]
    for strength in (0.1, 0.5, 1.0):
        spec = Spec(20, 1.0, 64, 48, strength=strength)
        away.append(np.abs(pixels(sampler, SHOTS[:1], spec, init=picture())[0] - kept).mean())
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


def test_prompts_of_any_length_share_a_batch(sampler: Sampler) -> None:
    long = replace(SHOTS[0], typed=", ".join(["red", *(f"word{n}" for n in range(60))]))
    alone = pixels(sampler, [long])[0]
    assert np.abs(alone - pixels(sampler, [replace(long, typed=long.typed + ", blue")])[0]).max() > 0
    padded = sampler._read([SHOTS[1].prompt, long.prompt, SHOTS[1].negative], SPEC)
    assert padded.shape[1] > 77 and padded.shape[1] % 77 == 0
    cut = replace(SPEC, long_prompts=False)
    end = replace(long, typed=long.typed + ", blue")
    assert (pixels(sampler, [long], cut)[0] == pixels(sampler, [end], cut)[0]).all()


@pytest.mark.parametrize("change", [{"clip_skip": 2}, {"emphasis": "comfy"}, {"emphasis": "none"}])
def test_how_a_prompt_is_read_is_part_of_what_is_remembered(sampler: Sampler, change: dict[str, Any]) -> None:
    shot = replace(SHOTS[0], typed="(red:1.5), [blue]")
    before = pixels(sampler, [shot])[0]
    other = pixels(sampler, [shot], replace(SPEC, **change))[0]
    assert (other != before).any() and (pixels(sampler, [shot])[0] == before).all()


def test_prompts_are_read_anew_when_the_text_encoder_has_changed(fresh_sampler: Sampler) -> None:
    before = pixels(fresh_sampler, SHOTS[:1])[0]
    for weight in fresh_sampler.pipeline.text_encoder.parameters():
        weight.data.mul_(1.3)
    assert (pixels(fresh_sampler, SHOTS[:1])[0] == before).all()  # remembered
    fresh_sampler.forget_prompts()
    assert (pixels(fresh_sampler, SHOTS[:1])[0] != before).any()


def test_negative_prompts_are_not_read_where_guidance_is_one(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.forget_prompts()
    seen: list[str] = []
    encode = sampler._clip.encode
    monkeypatch.setattr(sampler._clip, "encode", lambda text, **how: seen.append(text) or encode(text, **how))
    pixels(sampler, SHOTS[:1], replace(SPEC, guidance=1.0))
    assert seen == [SHOTS[0].prompt]
    pixels(sampler, SHOTS[:1])
    assert seen == [SHOTS[0].prompt, "ugly"]


def test_threads_that_share_a_sampler_make_the_same_pictures(sampler: Sampler) -> None:
    kinds = [replace(SPEC, scheduler=name) for name in ("", "euler a", "dpm++ 2m karras")]
    jobs = [(shot, spec) for spec in kinds for shot in SHOTS]
    alone = [pixels(sampler, [shot], spec)[0] for shot, spec in jobs]
    sampler.forget_prompts()
    with ThreadPoolExecutor(3, initializer=lambda: torch.set_num_threads(1)) as pool:
        together = list(pool.map(lambda job: pixels(sampler, [job[0]], job[1])[0], jobs))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


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
    assert made.safety == "flagged" and made.image is not None and made.image.getextrema() == ((0, 0),) * 3


def test_verdict_of_a_safety_checker_goes_with_the_picture(
    fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh_sampler.sample(SHOTS[:1], SPEC)[0].safety == "none"
    monkeypatch.setattr(
        fresh_sampler.pipeline, "run_safety_checker", lambda image, device, dtype: (image, [False])
    )
    made = fresh_sampler.sample(SHOTS[:1], SPEC)[0]
    assert made.safety == "passed" and made.image is not None


def test_blank_picture_is_a_fault_not_a_picture(fresh_sampler: Sampler) -> None:
    last = fresh_sampler.pipeline.vae.decoder.conv_out
    last.weight.data.zero_()
    last.bias.data.copy_(torch.tensor([0.5, -0.5, 0.0]))
    made = fresh_sampler.sample(SHOTS[:2], SPEC)
    assert [one.image for one in made] == [None, None] and "blank" in made[0].fault


def test_start_that_overflows_in_half_precision_is_encoded_in_float32(
    fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = fresh_sampler.pipeline.vae.to(torch.bfloat16)
    encode = vae.encode

    def overflowing(pixels: torch.Tensor) -> Any:
        made = encode(pixels)
        made.latent_dist.mean = made.latent_dist.mean * (float("inf") if vae.dtype == torch.bfloat16 else 1)
        return made

    monkeypatch.setattr(vae, "encode", overflowing)
    made = fresh_sampler.sample(SHOTS[:1], replace(SPEC, strength=0.7), init=picture())[0]
    assert made.vae_float32 and made.image is not None and vae.dtype == torch.bfloat16
