"""The denoising loop of Stable Diffusion, with what diffusers' pipeline does in one and the same order of arithmetic.

Shapes: B pictures of a batch, C latent channels, h w latent sides, L tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told at every step."""

    prompts_BLD: Tensor
    negatives_BLD: Tensor | None  # None: no guidance, so the UNet sees each picture once
    guidance: float
    guidance_BD: Tensor | None = None  # of models that take guidance as an input (latent consistency models)


@dataclass(frozen=True)
class Known:
    """Latents that are put back after every step; of steps that take two calls (Heun, DPM2), after the second."""

    latents_BChw: Tensor
    noise_BChw: Tensor
    free_11hw: Tensor  # 1 where they are not

    def put_back(self, latents_BChw: Tensor, scheduler: Any, next_timestep: Tensor) -> Tensor:
        """`next_timestep` is the one that comes now, (1,), or (0,) after the last."""
        known_BChw = self.latents_BChw
        if len(next_timestep):
            known_BChw = scheduler.add_noise(known_BChw, self.noise_BChw, next_timestep)
        return torch.where(self.free_11hw > 0, latents_BChw, known_BChw)


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    timesteps: Tensor,
    latents_BChw: Tensor,
    conditions: Conditions,
    *,
    generators: list[torch.Generator],
    known: Known | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) after all `timesteps` of a scheduler that has planned them.

    Classifier-free guidance (Ho and Salimans 2022): negative + guidance * (prompt - negative), both in one call of
    the UNet. `generators` are for schedulers that draw noise on the way, one for each picture.
    """
    told_BLD = conditions.prompts_BLD
    guided = conditions.negatives_BLD is not None
    if conditions.negatives_BLD is not None:
        told_BLD = torch.cat([conditions.negatives_BLD, told_BLD])
    extra = _extra(scheduler, generators)
    for step, timestep in enumerate(timesteps):
        seen = torch.cat([latents_BChw] * 2) if guided else latents_BChw
        predicted = unet(
            scheduler.scale_model_input(seen, timestep),
            timestep,
            encoder_hidden_states=told_BLD,
            timestep_cond=conditions.guidance_BD,
            return_dict=False,
        )[0]
        if guided:
            without, wanted = predicted.chunk(2)
            predicted = without + conditions.guidance * (wanted - without)
        latents_BChw = scheduler.step(predicted, timestep, latents_BChw, return_dict=False, **extra)[0]
        if known is not None and _is_whole(scheduler, step + 1, len(timesteps)):
            latents_BChw = known.put_back(latents_BChw, scheduler, timesteps[step + 1 : step + 2])
        if on_step is not None:
            on_step(step + 1, len(timesteps))
    return latents_BChw


def _is_whole(scheduler: Any, num_calls: int, num_all: int) -> bool:
    """Whether a step has ended. The first half of one is no picture at any noise level; the last step has one call."""
    return num_calls % int(scheduler.order) == 0 or num_calls == num_all


def _extra(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """What this scheduler's step takes beside the prediction: eta 0 adds no noise of its own (DDIM, TCD)."""
    known = inspect.signature(scheduler.step).parameters
    offered = {"eta": 0.0, "generator": generators}
    return {name: value for name, value in offered.items() if name in known}
