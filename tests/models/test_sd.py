"""Stable Diffusion as a Family: what it encodes, loads, scores and saves."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models import noise
from sdlab.models.bases import Objective
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve
from sdlab.models.sd import StableDiffusion
from tests.models.helpers import TEXT, UNET, copied, edit_json, edit_tensors

CPU, F32 = torch.device("cpu"), torch.float32


def family_of(folder: Path, **objective: Any) -> StableDiffusion:
    wanted = Objective(**objective) if objective else None
    return open_family(resolve(str(folder), training=True), objective=wanted)


def batch_of(num: int = 3) -> Any:
    random = torch.Generator().manual_seed(5)
    return SimpleNamespace(
        latents_BCHW=torch.randn(num, 4, 8, 8, generator=random),
        cond={"prompt_embeds": torch.randn(num, 77, 32, generator=random)},
        weight_B=torch.ones(num),
        ids=tuple(f"picture-{i}" for i in range(num)),
    )


@pytest.fixture(scope="module")
def reference(tiny_sd_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, dtype=F32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_family_has_the_members_of_the_protocol_and_the_grid_of_its_vae(tiny_sd_folder: Path) -> None:
    family = family_of(tiny_sd_folder)
    assert family.grid == 8
    assert len(family.fingerprint) == 64


def test_latents_are_the_mean_of_the_vae_times_its_scale(tiny_sd_folder: Path, reference: Any) -> None:
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with family_of(tiny_sd_folder).load_encoders(CPU, torch.bfloat16) as encoders, torch.no_grad():
        latents = encoders.encode_pictures(pixels)
        theirs = torch.cat([reference.vae.encode(p[None]).latent_dist.mode() for p in pixels]) * 0.18215
        alone = encoders.encode_pictures(pixels[1:])
    assert latents.shape == (2, 4, 8, 4) and latents.dtype == F32
    assert torch.allclose(latents, theirs, atol=1e-6)
    assert torch.equal(latents[1:], alone)


def test_prompt_embeddings_are_those_of_diffusers(tiny_sd_folder: Path, reference: Any) -> None:
    prompts = ["red star", "", "a very long prompt " * 60]
    with family_of(tiny_sd_folder).load_encoders(CPU, torch.bfloat16) as encoders, torch.no_grad():
        conds = encoders.encode_prompts(prompts)
        again = encoders.encode_prompts(prompts[2:])
    for prompt, cond in zip(prompts, conds, strict=True):
        theirs, _ = reference.encode_prompt(prompt, CPU, 1, False)
        assert list(cond) == ["prompt_embeds"] and cond["prompt_embeds"].dtype == F32
        assert torch.allclose(cond["prompt_embeds"], theirs[0], atol=1e-5)
    assert torch.equal(conds[2]["prompt_embeds"], again[0]["prompt_embeds"])


def test_encoders_are_loaded_when_needed_and_gone_after_the_block(
    tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlab.models import sd

    loaded: dict[str, Any] = {}
    real = sd.load

    def watched(part: Any, *settings: Any) -> Any:
        module = real(part, *settings)
        loaded[part.name] = weakref.ref(module)
        return module

    monkeypatch.setattr(sd, "load", watched)
    with family_of(tiny_sd_folder).load_encoders(CPU, F32) as encoders:
        assert not loaded
        encoders.encode_prompts(["a"])
        assert list(loaded) == ["text_encoder"]
        encoders.encode_pictures(torch.zeros(1, 3, 16, 16))
        assert all(ref() is not None for ref in loaded.values())
    gc.collect()
    assert [ref() for ref in loaded.values()] == [None, None]
    with pytest.raises(AssertionError):
        encoders.encode_prompts(["a"])


def test_the_denoiser_is_fresh_memory_and_equals_the_file(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = copied(tiny_sd_folder, tmp_path / "unmapped")
    unet = family_of(folder).load_denoiser(CPU, F32)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    stored = load_file(folder / UNET)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, stored[name]) and parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0 and parameter.is_contiguous()
    half = family_of(folder).load_denoiser(CPU, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_papers(tiny_sd_folder: Path, tmp_path: Path, prediction: str) -> None:
    folder = copied(tiny_sd_folder, tmp_path / "model")
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type=prediction)
    family, batch, rng = family_of(folder, timestep_range=(0, 700)), batch_of(), Draws(7, 3)
    unet = family.load_denoiser(CPU, F32)
    eps = rng.normal("noise", batch.ids, (4, 8, 8))
    t = rng.integers("timestep", batch.ids, 0, 700)
    bar = noise.alphas_cumprod(family.parts.scheduler)[t].view(-1, 1, 1, 1)
    x_t = bar.sqrt() * batch.latents_BCHW + (1 - bar).sqrt() * eps
    target = eps if prediction == "epsilon" else bar.sqrt() * eps - (1 - bar).sqrt() * batch.latents_BCHW
    with torch.no_grad():
        said = unet(x_t, t, encoder_hidden_states=batch.cond["prompt_embeds"]).sample
        loss = family.loss(unet, batch, rng)
        weighted = family_of(folder, timestep_range=(0, 700), snr_gamma=5.0).loss(unet, batch, rng)
    assert loss.shape == (3,) and loss.dtype == F32
    assert torch.allclose(loss, ((said - target) ** 2).mean((1, 2, 3)), rtol=1e-5)
    weight = noise.min_snr_weight(bar.flatten(), 5.0, prediction)
    assert torch.allclose(weighted, loss * weight, rtol=1e-5)


def test_timesteps_stay_in_their_range_and_follow_the_sample_not_the_batch(tiny_sd_folder: Path) -> None:
    family = family_of(tiny_sd_folder, timestep_range=(100, 103))
    seen: list[int] = []

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            seen.extend(t.tolist())
            return (x * self.weight,)

    batch = batch_of(3)
    last = SimpleNamespace(
        latents_BCHW=batch.latents_BCHW[2:], cond={k: v[2:] for k, v in batch.cond.items()}, ids=batch.ids[2:]
    )
    for step in range(40):
        whole, alone = (family.loss(Denoiser(), b, Draws(0, step)) for b in (batch, last))
        assert torch.equal(whole[2:], alone)
        assert seen[-1] == seen[-2]
    assert set(seen) == {100, 101, 102}


def test_noise_offset_shifts_whole_channels(tiny_sd_folder: Path) -> None:
    batch, rng = batch_of(), Draws(1, 1)
    plain = family_of(tiny_sd_folder)._noise(batch, rng)
    shifted = family_of(tiny_sd_folder, noise_offset=0.1)._noise(batch, rng)
    shift = (shifted - plain) / 0.1
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-5)
    assert 0.3 < shift[..., 0, 0].std() < 3


def test_a_wrapped_or_half_denoiser_gives_a_float32_loss(tiny_sd_folder: Path) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    family, batch, rng = family_of(tiny_sd_folder), batch_of(), Draws(7, 3)
    unet = family.load_denoiser(CPU, F32)
    plain, wrapped = family.loss(unet, batch, rng), family.loss(Wrapped(unet), batch, rng)
    assert torch.equal(plain, wrapped)
    half = family.loss(family.load_denoiser(CPU, torch.bfloat16), batch, rng)
    assert half.dtype == F32 and torch.allclose(half, plain, rtol=0.05)
    plain.mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize("bounds", [(0, 1001), (-1, 10), (700, 700), (800, 700)])
def test_an_impossible_timestep_range_is_refused(tiny_sd_folder: Path, bounds: tuple[int, int]) -> None:
    with pytest.raises(SdlabError, match="--timestep-range"):
        family_of(tiny_sd_folder, timestep_range=bounds)


def test_the_pipeline_gives_the_pictures_of_diffusers_own(tiny_sd_folder: Path, reference: Any) -> None:
    family = family_of(tiny_sd_folder)
    ours = family.pipeline(family.load_denoiser(CPU, F32))
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    a = ours("red star", generator=torch.Generator().manual_seed(1), **settings).images
    b = reference("red star", generator=torch.Generator().manual_seed(1), **settings).images
    assert torch.allclose(a, b, atol=1e-5)
    assert type(ours.scheduler) is type(reference.scheduler)
    assert ours.scheduler.config.prediction_type == "epsilon" and ours.safety_checker is None


def test_a_half_pipeline_is_half_throughout(tiny_sd_folder: Path) -> None:
    family = family_of(tiny_sd_folder)
    pipeline = family.pipeline(family.load_denoiser(CPU, torch.bfloat16))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert pipeline("a", num_inference_steps=1, height=64, width=64, output_type="pt").images.shape[-1] == 64


def test_the_fingerprint_follows_the_encoders_and_not_the_unet(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_sd_folder, tmp_path / "model")
    before = family_of(folder).fingerprint
    assert before == family_of(tiny_sd_folder).fingerprint
    edit_tensors(folder / UNET, lambda t: t["conv_in.weight"].mul_(2))
    assert family_of(folder).fingerprint == before
    edit_json(folder / "vae/config.json", scaling_factor=0.5)
    scaled = family_of(folder).fingerprint
    edit_tensors(folder / TEXT, lambda t: next(iter(t.values())).view(-1)[0].add_(1))
    assert len({before, scaled, family_of(folder).fingerprint}) == 3


def test_loading_says_nothing(tiny_sd_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    family = family_of(tiny_sd_folder)
    pipeline = family.pipeline(family.load_denoiser(CPU, F32))
    pipeline("a", num_inference_steps=1, height=64, width=64)
    out = capfd.readouterr()
    assert out.out == "" and out.err == ""
