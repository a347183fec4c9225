"""The engine for FLUX.2: pictures are diffusers' own, whoever shares a batch, and starts are where they should be."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from sdlab.inference.engines.flux2 import Flux2Sampler
from sdlab.inference.engines.hires import Pass
from sdlab.inference.spec import Shot, Spec
from tests.inference.engines import making
from tests.inference.engines.making import any_sampler_of

SPEC = Spec(steps=3, guidance=4.0, width=80, height=64)
SHOTS = [Shot(i, text, "a ", "ugly", 11 + i) for i, text in enumerate(["red", "blue", "green", "red"])]
PROMPTS = ["a red", "a blue", "a green", "ugly", ""]


def sampler_of(folder: Path, dtype: str = "fp32") -> Flux2Sampler:
    sampler = any_sampler_of(folder, dtype, PROMPTS)
    assert isinstance(sampler, Flux2Sampler)
    return sampler


@pytest.fixture(scope="module")
def klein(tiny_klein_folder: Path) -> Flux2Sampler:
    return sampler_of(tiny_klein_folder)


@pytest.fixture(scope="module")
def dev(tiny_dev_folder: Path) -> Flux2Sampler:
    return sampler_of(tiny_dev_folder)


@pytest.fixture
def fresh(tiny_klein_folder: Path) -> Flux2Sampler:
    return sampler_of(tiny_klein_folder)


def picture(width: int = 80, height: int = 64) -> Image.Image:
    return making.picture(width, height)


def pixels(sampler: Flux2Sampler, shots: list[Shot], spec: Spec = SPEC, **looks: Any) -> list[np.ndarray]:
    return making.pixels(sampler, shots, spec, **looks)


def diffusers_picture(folder: Path, shot: Shot, **settings: Any) -> np.ndarray:
    """What the library makes by itself of the folder."""
    kind = Flux2Pipeline if folder.name == "tiny-dev" else Flux2KleinPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    window = pipeline.tokenizer.model_max_length
    if kind is Flux2KleinPipeline:
        negative = pipeline.encode_prompt(shot.negative, max_sequence_length=window)[0]
        settings["negative_prompt_embeds"] = negative
    made = pipeline(
        prompt=shot.prompt,
        num_inference_steps=SPEC.steps,
        guidance_scale=SPEC.guidance,
        width=SPEC.width,
        height=SPEC.height,
        generator=torch.Generator("cpu").manual_seed(shot.seed),
        max_sequence_length=window,
        **settings,
    )
    return np.asarray(made.images[0]).astype(int)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_pictures_are_those_of_diffusers(request: pytest.FixtureRequest, kind: str, references: int) -> None:
    sampler, folder = request.getfixturevalue(kind), request.getfixturevalue(f"tiny_{kind}_folder")
    seen = [picture(), picture(64, 96)][:references]
    mine = pixels(sampler, SHOTS[:1], references=seen)[0]
    theirs = diffusers_picture(folder, SHOTS[0], image=seen or None)
    assert np.abs(mine - theirs).max() <= 1
    assert mine.std() > 5 and np.abs(mine - pixels(sampler, SHOTS[1:2], references=seen)[0]).max() > 20


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_references_are_looked_at_in_their_order(request: pytest.FixtureRequest, kind: str) -> None:
    sampler = request.getfixturevalue(kind)
    one, other = picture(), Image.new("RGB", (64, 64), "red")
    made = [pixels(sampler, SHOTS[:1], references=r)[0] for r in ([], [one], [one, other], [other, one])]
    assert all((made[i] != made[k]).any() for i in range(4) for k in range(i))


def test_large_references_are_looked_at_in_full(klein: Flux2Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = klein.pipeline.transformer.forward

    def counting(*args: Any, **given: Any) -> Any:
        seen.append(given["hidden_states"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(klein.pipeline.transformer, "forward", counting)
    one_step = Spec(steps=1, guidance=1.0, width=64, height=64)
    klein.sample(SHOTS[:1], one_step, references=[picture(1040, 1040)])
    assert seen == [4 * 4 + 65 * 65]  # diffusers by itself would shrink 1040 x 1040 to 1024 x 1024


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_batch_and_order_change_nothing_beyond_rounding(
    request: pytest.FixtureRequest, kind: str, references: int
) -> None:
    sampler, seen = request.getfixturevalue(kind), [picture()] * references
    alone = [pixels(sampler, [shot], references=seen)[0] for shot in SHOTS]
    again = [pixels(sampler, [shot], references=seen)[0] for shot in SHOTS[::-1]][::-1]
    together = pixels(sampler, SHOTS[::-1], references=seen)[::-1]
    for one, same, other in zip(alone, again, together, strict=True):
        assert (one == same).all() and np.abs(one - other).max() <= 1


def test_negative_prompt_counts_for_klein_above_a_guidance_of_one(klein: Flux2Sampler) -> None:
    plain = Shot(0, "red", "a ", "", SHOTS[0].seed)
    assert (pixels(klein, [plain])[0] != pixels(klein, SHOTS[:1])[0]).any()
    alone = Spec(3, 1.0, 80, 64)
    assert (pixels(klein, [plain], alone)[0] == pixels(klein, SHOTS[:1], alone)[0]).all()


def test_guidance_is_an_input_of_dev_and_nothing_to_a_distilled_model(
    dev: Flux2Sampler, tiny_flux2: Callable[..., Path]
) -> None:
    low, high = (pixels(dev, SHOTS[:1], Spec(3, guidance, 80, 64))[0] for guidance in (1.0, 4.0))
    assert (low != high).any()
    distilled = sampler_of(tiny_flux2(is_distilled=True))
    low, high = (pixels(distilled, SHOTS[:1], Spec(3, guidance, 80, 64))[0] for guidance in (1.0, 4.0))
    assert (low == high).all()


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(4, 0.5, 2), (10, 0.25, 2), (3, 1.0, 3), (15, 0.8, 12)]
)
@torch.no_grad()
def test_strength_starts_from_the_noised_picture(
    fresh: Flux2Sampler, monkeypatch: pytest.MonkeyPatch, steps: int, strength: float, made: int
) -> None:
    pipeline = fresh.pipeline
    pipeline.transformer.proj_out.weight.zero_()  # no velocity: what is decoded is what it started from
    seen: list[tuple[int, int]] = []
    spec = Spec(steps, 1.0, 80, 64, strength=strength)
    one = Pass(SHOTS[:1], spec, starts=[picture()], on_step=lambda done, total: seen.append((done, total)))
    latents = fresh._denoise(one)
    assert seen == [(n + 1, made) for n in range(made)]

    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(4 * 5, steps))
    level = scheduler.sigmas[steps - made]
    clean = pipeline._encode_vae_image(pipeline.image_processor.preprocess(picture()), None)
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(SHOTS[0].seed))
    assert (latents - ((1 - level) * clean + level * noise)).abs().max() < 1e-5


def test_full_strength_is_a_picture_from_noise(klein: Flux2Sampler) -> None:
    full = pixels(klein, SHOTS[:1], Spec(3, 4.0, 80, 64, strength=1.0), init=picture())[0]
    assert (full == pixels(klein, SHOTS[:1])[0]).all()


@torch.no_grad()
def test_strength_says_how_much_of_the_picture_stays(klein: Flux2Sampler) -> None:
    kept = pixels(klein, SHOTS[:1], Spec(20, 1.0, 80, 64, strength=0.0), init=picture())[0]
    away = []
    for strength in (0.05, 0.4, 1.0):
        spec = Spec(20, 1.0, 80, 64, strength=strength)
        away.append(np.abs(pixels(klein, SHOTS[:1], spec, init=picture())[0] - kept).mean())
    assert away[0] < away[1] < away[2]


def test_steps_are_reported(klein: Flux2Sampler) -> None:
    seen: list[tuple[int, int]] = []
    klein.sample(SHOTS[:1], SPEC, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_unfinite_numbers_are_a_fault_not_a_picture(fresh: Flux2Sampler) -> None:
    fresh.pipeline.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    made = fresh.sample(SHOTS[:1], SPEC)[0]
    assert made.image is None and "VAE" in made.fault
    fresh.pipeline.transformer.proj_out.weight.data.fill_(float("nan"))
    made = fresh.sample(SHOTS[:1], SPEC)[0]
    assert made.image is None and "transformer" in made.fault


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_half_precision_is_for_the_transformer_alone(
    request: pytest.FixtureRequest, kind: str, tiny_flux2: Callable[..., Path]
) -> None:
    half = sampler_of(request.getfixturevalue(f"tiny_{kind}_folder"), "bf16")
    assert half.pipeline.transformer.dtype == torch.bfloat16 and half.pipeline.vae.dtype == torch.float32
    exact = request.getfixturevalue(kind)
    for looks in ({}, {"references": [picture()]}):
        apart = np.abs(pixels(half, SHOTS[:1], **looks)[0] - pixels(exact, SHOTS[:1], **looks)[0]).mean()
        assert 0 < apart < 8
    started = Spec(4, 4.0, 80, 64, strength=0.5)
    assert (
        np.abs(
            pixels(half, SHOTS[:1], started, init=picture())[0]
            - pixels(exact, SHOTS[:1], started, init=picture())[0]
        ).mean()
        < 8
    )


def test_text_encoder_is_gone_before_the_transformer_is_loaded(
    tiny_klein_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlab.models.flux2 import Flux2

    load_denoiser, alive = Flux2.load_denoiser, []

    def counted(self: Flux2, device: torch.device, dtype: torch.dtype) -> Any:
        alive.append([o for o in gc.get_objects() if type(o).__name__ == "Qwen3Model"])
        return load_denoiser(self, device, dtype)

    before = [o for o in gc.get_objects() if type(o).__name__ == "Qwen3Model"]
    monkeypatch.setattr(Flux2, "load_denoiser", counted)
    sampler = sampler_of(tiny_klein_folder)
    assert len(alive) == 1 and len(alive[0]) == len(before) and sampler.pipeline.text_encoder is None


def test_threads_that_share_a_sampler_make_the_same_pictures(klein: Flux2Sampler) -> None:
    alone = [pixels(klein, [shot])[0] for shot in SHOTS]
    with ThreadPoolExecutor(3, initializer=lambda: torch.set_num_threads(1)) as pool:
        together = list(pool.map(lambda shot: pixels(klein, [shot])[0], SHOTS))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_vae_that_overflows_in_half_precision_is_run_in_float32(
    fresh: Flux2Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = pixels(fresh, SHOTS[:1])[0]
    vae = fresh.pipeline.vae.to(torch.bfloat16)
    decode = vae.decode

    def overflowing(latents: torch.Tensor, **settings: Any) -> Any:
        (image,) = decode(latents, **settings)
        return (image * (float("nan") if image.dtype == torch.bfloat16 else 1),)

    monkeypatch.setattr(vae, "decode", overflowing)
    made = fresh.sample(SHOTS[:1], SPEC)[0]
    assert made.vae_float32 and made.image is not None and vae.dtype == torch.bfloat16
    assert np.abs(np.asarray(made.image).astype(int) - reference).mean() < 3  # its weights were rounded


def test_blank_picture_is_a_fault_not_a_picture(fresh: Flux2Sampler) -> None:
    fresh.pipeline.vae.decoder.conv_out.weight.data.zero_()
    made = fresh.sample(SHOTS[:1], SPEC)[0]
    assert made.image is None and "blank" in made.fault
