"""FLUX.2's tokens, places and noise levels, held against diffusers' own helpers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

from sdlab.models import flow

PIPELINES = [Flux2KleinPipeline, Flux2Pipeline]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("theirs", PIPELINES)
def test_patches_and_tokens_are_in_diffusers_order(theirs: Any) -> None:
    latents_BCHW = random(2, 4, 6, 10)
    packed_BCHW = flow.patchify(latents_BCHW)
    assert torch.equal(packed_BCHW, theirs._patchify_latents(latents_BCHW))
    assert torch.equal(theirs._unpatchify_latents(packed_BCHW), latents_BCHW)
    assert torch.equal(flow.to_tokens(packed_BCHW), theirs._pack_latents(packed_BCHW))


@pytest.mark.parametrize("theirs", PIPELINES)
def test_places_are_diffusers_places(theirs: Any) -> None:
    target_BCHW = random(2, 16, 3, 5)
    first_BCHW, second_BCHW = random(2, 16, 4, 2, seed=1), random(2, 16, 2, 6, seed=2)
    tokens_BNC, ids_N4 = flow.with_references(target_BCHW, [first_BCHW, second_BCHW])
    wanted = torch.cat(
        [
            theirs._prepare_latent_ids(target_BCHW)[0],
            theirs._prepare_image_ids([first_BCHW[:1], second_BCHW[:1]])[0],
        ]
    )
    assert torch.equal(ids_N4, wanted)
    packed = [theirs._pack_latents(t) for t in (target_BCHW, first_BCHW, second_BCHW)]
    assert torch.equal(tokens_BNC, torch.cat(packed, dim=1))
    assert torch.equal(flow.text_ids(7), theirs._prepare_text_ids(random(1, 7, 3))[0])
    assert ids_N4[15].tolist() == [10, 0, 0, 0] and ids_N4[23].tolist() == [20, 0, 0, 0]


def test_the_shift_is_flux_line_through_256_and_4096_tokens() -> None:
    assert flow.shift_of(256) == pytest.approx(math.exp(0.5))
    assert flow.shift_of(4096) == pytest.approx(math.exp(1.15))
    assert flow.shift_of(1024) == pytest.approx(math.exp(0.63), rel=1e-9)
    assert flow.shift_of(16) < flow.shift_of(256) and flow.shift_of(9216) > flow.shift_of(4096)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_shifted_noise_levels_are_those_of_diffusers_scheduler(num_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = [0.9, 0.5, 0.1]
    scheduler.set_timesteps(sigmas=sigmas, mu=math.log(flow.shift_of(num_tokens)))
    mine = flow.shifted(torch.tensor(sigmas, dtype=torch.float64), flow.shift_of(num_tokens))
    assert torch.allclose(mine.float(), scheduler.sigmas[:3], atol=1e-6)
    assert torch.equal(flow.shifted(mine, 1.0), mine)


def test_noise_is_added_as_diffusers_scheduler_does() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    x0_BCHW, noise_BCHW = random(3, 16, 2, 3), random(3, 16, 2, 3, seed=1)
    picked = torch.tensor([10, 500, 990])
    sigma_B = scheduler.sigmas[picked]
    wanted = scheduler.scale_noise(x0_BCHW, scheduler.timesteps[picked], noise_BCHW)
    assert torch.allclose(flow.add_noise(x0_BCHW, noise_BCHW, sigma_B), wanted, atol=1e-6)


def test_a_step_along_the_velocity_we_train_on_returns_the_picture() -> None:
    """The target is noise - x0: diffusers' Euler step to noise level 0 with it gives x0 back."""
    x0_BCHW, noise_BCHW = random(1, 16, 2, 3), random(1, 16, 2, 3, seed=1)
    for sigma in (0.05, 0.5, 1.0):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[sigma])
        noisy_BCHW = flow.add_noise(x0_BCHW, noise_BCHW, scheduler.sigmas[:1])
        stepped = scheduler.step(noise_BCHW - x0_BCHW, scheduler.timesteps[0], noisy_BCHW).prev_sample
        assert torch.allclose(stepped, x0_BCHW, atol=1e-6)
