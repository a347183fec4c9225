"""The noise process agrees with diffusers and with the papers' equations."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from sdlab.models import noise

SCHEDULES = {
    "sd15": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    "zero terminal": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
    },
    "short": {"num_train_timesteps": 100, "beta_schedule": "linear"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_cumprod_are_those_of_diffusers(name: str) -> None:
    config = SCHEDULES[name]
    theirs = DDIMScheduler(**config).alphas_cumprod
    assert torch.allclose(noise.alphas_cumprod(config), theirs, atol=1e-6, rtol=1e-5)


def test_zero_terminal_schedule_ends_in_pure_noise() -> None:
    assert noise.alphas_cumprod(SCHEDULES["zero terminal"])[-1] == 0


def test_unknown_schedule_raises() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        noise.betas({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_and_velocity_are_those_of_diffusers(name: str) -> None:
    theirs = DDPMScheduler(**SCHEDULES[name])
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 7, 30, len(theirs.alphas_cumprod) - 1])
    bar = noise.alphas_cumprod(SCHEDULES[name])[t]
    assert torch.allclose(noise.add_noise(x0, eps, bar), theirs.add_noise(x0, eps, t), atol=1e-6)
    assert torch.allclose(noise.velocity(x0, eps, bar), theirs.get_velocity(x0, eps, t), atol=1e-6)


def test_min_snr_weights() -> None:
    """By hand: SNR 9, 1 and 1/9 with the cap 5."""
    bar = torch.tensor([0.9, 0.5, 0.1])
    assert torch.allclose(noise.snr(bar), torch.tensor([9.0, 1.0, 1 / 9]))
    eps = noise.min_snr_weight(bar, 5.0, "epsilon")
    assert torch.allclose(eps, torch.tensor([5 / 9, 1.0, 1.0]))
    v = noise.min_snr_weight(bar, 5.0, "v_prediction")
    assert torch.allclose(v, torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9)]))


def test_min_snr_weight_at_zero_snr_is_finite() -> None:
    zero = torch.zeros(1)
    assert noise.min_snr_weight(zero, 5.0, "epsilon") == 1
    assert noise.min_snr_weight(zero, 5.0, "v_prediction") == 0
