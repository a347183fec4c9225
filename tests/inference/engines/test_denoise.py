"""Our own loop is diffusers' pipeline to the last bit, with every scheduler, from noise and from a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel

from sdlab.inference.engines import schedulers
from sdlab.inference.engines.hires import Pass
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.spec import Spec
from tests.inference.engines.making import SHOTS, picture

NAMES = ["", *schedulers.SCHEDULERS]


@torch.no_grad()
def of_diffusers(kind: Any, sampler: Sampler, spec: Spec, **settings: Any) -> torch.Tensor:
    """Latents of the first two shots, with noise drawn by the library."""
    scheduler = schedulers.fresh(spec.scheduler, sampler.pipeline.scheduler)
    parts = {**sampler.pipeline.components, "scheduler": scheduler, "requires_safety_checker": False}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    told = sampler._conditions(SHOTS[:2], spec)
    made: torch.Tensor = pipeline(
        prompt_embeds=told.prompts_BLD,
        negative_prompt_embeds=told.negatives_BLD,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance,
        generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in SHOTS[:2]],
        output_type="latent",
        **settings,
    ).images
    return made


@torch.no_grad()
def ours(sampler: Sampler, spec: Spec, **settings: Any) -> torch.Tensor:
    return sampler._denoise(Pass(SHOTS[:2], spec, **settings))[0]


@pytest.mark.parametrize("name", NAMES)
def test_from_noise(sampler: Sampler, name: str) -> None:
    spec = Spec(4, 5.0, 64, 48, scheduler=name)
    theirs = of_diffusers(StableDiffusionPipeline, sampler, spec, width=64, height=48)
    assert torch.equal(ours(sampler, spec), theirs)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance(sampler: Sampler, guidance: float) -> None:
    spec = Spec(4, guidance, 64, 48)
    theirs = of_diffusers(StableDiffusionPipeline, sampler, spec, width=64, height=48)
    assert torch.equal(ours(sampler, spec), theirs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_from_a_picture(sampler: Sampler, name: str) -> None:
    spec = Spec(4, 5.0, 64, 48, scheduler=name, strength=0.7)
    clean, _ = sampler._encode(picture())
    start = {"image": torch.cat([clean] * 2).contiguous(), "strength": 0.7}
    theirs = of_diffusers(StableDiffusionImg2ImgPipeline, sampler, spec, **start)
    assert torch.equal(ours(sampler, spec, starts=[picture()] * 2), theirs)


def test_models_that_take_guidance_as_an_input_are_told_it(fresh_sampler: Sampler) -> None:
    torch.manual_seed(0)
    config = {**fresh_sampler.pipeline.unet.config, "time_cond_proj_dim": 16}
    fresh_sampler.pipeline.unet = UNet2DConditionModel.from_config(config).eval()
    low, high = (Spec(3, guidance, 64, 48, scheduler="lcm") for guidance in (2.0, 8.0))
    theirs = of_diffusers(StableDiffusionPipeline, fresh_sampler, high, width=64, height=48)
    assert torch.equal(ours(fresh_sampler, high), theirs)
    assert not torch.equal(ours(fresh_sampler, high), ours(fresh_sampler, low))
