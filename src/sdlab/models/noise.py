"""The diffusion process as pure functions of tensors.

With ᾱ_t the cumulative product of 1 - β_t (Ho et al. 2020, "Denoising Diffusion Probabilistic Models"):

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε            eq. 4 of Ho et al. 2020
    v_t = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0            app. D of Salimans & Ho 2022, "Progressive Distillation"
    SNR_t = ᾱ_t / (1 - ᾱ_t)

Shapes: T training timesteps, B batch, C H W latents. Functions take alphas_cumprod_B, already picked at t.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def betas(config: Mapping[str, Any]) -> Tensor:
    """β_t of a diffusers scheduler configuration, (T,) float32. Raises ValueError for an unknown schedule."""
    steps = int(config.get("num_train_timesteps", 1000))
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":
        return torch.linspace(low, high, steps, dtype=torch.float32)
    if schedule == "scaled_linear":  # linear in sqrt(β): what Stable Diffusion uses
        return torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17, β capped at 0.999
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=torch.float32)
    raise ValueError(f"unknown beta_schedule {schedule!r}")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t of a diffusers scheduler configuration, (T,) float32, falling from almost 1 towards 0."""
    bar_T = torch.cumprod(1.0 - betas(config), dim=0)
    return zero_terminal_snr(bar_T) if config.get("rescale_betas_zero_snr") else bar_T


def zero_terminal_snr(bar_T: Tensor) -> Tensor:
    """ᾱ shifted and scaled so that the last timestep is pure noise (Lin et al. 2024, algorithm 1)."""
    root_T = bar_T.sqrt()
    first, last = root_T[0].clone(), root_T[-1].clone()
    return ((root_T - last) * first / (first - last)) ** 2


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, bar_B: Tensor) -> Tensor:
    """x_t, the noisy latents_BCHW."""
    bar = bar_B.view(-1, 1, 1, 1)
    return bar.sqrt() * x0_BCHW + (1 - bar).sqrt() * noise_BCHW


def velocity(x0_BCHW: Tensor, noise_BCHW: Tensor, bar_B: Tensor) -> Tensor:
    """v_t, the target of v-prediction, (B, C, H, W)."""
    bar = bar_B.view(-1, 1, 1, 1)
    return bar.sqrt() * noise_BCHW - (1 - bar).sqrt() * x0_BCHW


def snr(bar_B: Tensor) -> Tensor:
    """Signal-to-noise ratio in power, (B,)."""
    return bar_B / (1 - bar_B)


def min_snr_weight(bar_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of each sample's loss, (B,): Hang et al. 2023, "Efficient Diffusion Training via Min-SNR".

    min(SNR, γ) / SNR for noise prediction and min(SNR, γ) / (SNR + 1) for v-prediction. At SNR 0 the first is
    taken as its limit, 1.
    """
    ratio_B = snr(bar_B)
    capped_B = ratio_B.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return capped_B / (ratio_B + 1)
    return torch.where(ratio_B > 0, capped_B / ratio_B, torch.ones_like(ratio_B))
