"""The terms of an autoencoder's loss are what their papers say, sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from sdlab.keyed import keyed
from sdlab.models import vae_loss
from sdlab.models.discriminator import PatchDiscriminator, balance, hinge, unconvincing

TERMS = [vae_loss.l1, vae_loss.l2, vae_loss.psnr, vae_loss.ssim, vae_loss.structure]


def two(num: int = 2, side_px: int = 20, width_px: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures of soft blobs, and the same with noise on them, in [-1, 1]."""
    shape = (num, 3, side_px, width_px or side_px)
    soft = F.avg_pool2d(torch.randn(shape, generator=keyed("soft")), 3, stride=1, padding=1)
    return (soft + 0.2 * torch.randn(shape, generator=keyed("noise"))).clamp(-1, 1), soft.clamp(-1, 1)


def ssim_by_hand(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004, one window after the other, in float64."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, found = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    for y in range(a_HW.shape[0] - 10):
        for x in range(a_HW.shape[1] - 10):
            a, b = a_HW[y : y + 11, x : x + 11], b_HW[y : y + 11, x : x + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            found.append(light * (2 * covariance + c2) / (variance_a + variance_b + c2))
    return float(np.mean(found))


def test_ssim_is_the_papers_window_by_window() -> None:
    made, true = two(side_px=17, width_px=23)
    by_hand = [
        np.mean([ssim_by_hand(a, b) for a, b in zip(made[i].numpy(), true[i].numpy(), strict=True)])
        for i in range(2)
    ]
    assert vae_loss.ssim(made.double(), true.double()).numpy() == pytest.approx(by_hand, abs=2e-6)
    assert vae_loss.ssim(true, true).numpy() == pytest.approx([1, 1], abs=1e-6)


def test_psnr_counts_from_black_to_white() -> None:
    white, black = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    assert vae_loss.psnr(black, white).item() == pytest.approx(0)
    assert vae_loss.psnr(black + 0.02, black).item() == pytest.approx(40, abs=1e-3)
    assert vae_loss.psnr(white, white).item() == pytest.approx(106, abs=0.1)  # finite: it goes into JSON


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 4, 2, 2, generator=keyed(1)), torch.randn(3, 4, 2, 2, generator=keyed(2))
    theirs = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(vae_loss.kl(mean, logvar), theirs)


def test_structure_is_its_formula_at_three_sizes() -> None:
    made, true = two(1, 32)
    wanted = 0.0
    for factor in (1, 2, 4):
        a, b = (F.interpolate(x, scale_factor=1 / factor, mode="area") for x in (made, true))
        down, across = a[:, :, 1:] - a[:, :, :-1], a[..., 1:] - a[..., :-1]
        true_down, true_across = b[:, :, 1:] - b[:, :, :-1], b[..., 1:] - b[..., :-1]
        edges = (down - true_down).abs().mean() + (across - true_across).abs().mean()
        wanted += float(edges + (1 - vae_loss.ssim(a, b)) / 2) / 3
    assert vae_loss.structure(made, true).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("side_px", [8, 16, 24])
def test_structure_takes_the_smallest_pictures(side_px: int) -> None:
    made, true = two(1, side_px)
    made.requires_grad_()
    vae_loss.structure(made, true).sum().backward()
    assert made.grad is not None and made.grad.isfinite().all() and made.grad.abs().sum() > 0
    assert vae_loss.structure(true, true).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_a_samples_term_does_not_know_its_batch(term: object) -> None:
    made, true = two(4)
    together = term(made, true)  # type: ignore[operator]
    assert together.shape == (4,)
    alone = torch.cat([term(made[i : i + 1], true[i : i + 1]) for i in range(4)])  # type: ignore[operator]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_terms_are_float32_within_an_autocast(term: object) -> None:
    made, true = two()
    with torch.autocast("cpu", torch.bfloat16):
        inside = term(made, true)  # type: ignore[operator]
    assert inside.dtype == torch.float32 and torch.equal(inside, term(made, true))  # type: ignore[operator]


def test_neither_side_of_the_game_moves_the_other() -> None:
    disc, (made, true) = PatchDiscriminator(16, seed=0), two(2, 32)
    made.requires_grad_()
    unconvincing(disc, made).sum().backward()
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(p.grad is None for p in disc.parameters())
    made.grad = None
    hinge(disc, made, true).sum().backward()
    assert made.grad is None
    assert all(p.grad is not None for p in disc.parameters())


def test_the_hinge_is_its_formula() -> None:
    disc, (made, true) = PatchDiscriminator(16, seed=0), two(2, 32)
    real, fake = disc(true) * 40, disc(made) * 40  # so that some patches are beyond the hinge

    class Louder(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return disc(pixels) * 40

    wanted = (torch.clamp(1 - real, min=0) + torch.clamp(1 + fake, min=0)).mean(dim=(1, 2, 3)) / 2
    assert (real > 1).any() or (fake < -1).any()
    torch.testing.assert_close(hinge(Louder(), made, true), wanted)


def test_the_discriminator_learns_which_pictures_are_real() -> None:
    disc, (made, true) = PatchDiscriminator(16, seed=0), two(4, 32)
    optimizer = torch.optim.Adam(disc.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        hinge(disc, made, true).sum().backward()
        optimizer.step()
    assert disc(true).mean() - disc(made).mean() > 0.5


def test_a_picture_is_scored_without_its_batch_and_from_8_pixels_on() -> None:
    disc, (made, _) = PatchDiscriminator(24, seed=0), two(3, 32)
    torch.testing.assert_close(disc(made), torch.cat([disc(row) for row in made.split(1)]))
    assert disc(made[..., :8, :8]).shape == (3, 1, 1, 1)


def test_the_discriminator_starts_as_its_seed_says_whatever_was_drawn_before() -> None:
    first = PatchDiscriminator(16, seed=3).state_dict()
    torch.rand(5)
    again, other = PatchDiscriminator(16, seed=3).state_dict(), PatchDiscriminator(16, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_the_balance_makes_both_gradients_equally_long_in_each_picture() -> None:
    disc, (made, true) = PatchDiscriminator(16, seed=0), two(3, 32)
    made[1] = true[1] + 0.001  # nearly right: a short gradient of L2
    made.requires_grad_()
    factor_B = balance(vae_loss.l2(made, true), unconvincing(disc, made), made)
    assert not factor_B.requires_grad
    wanted = torch.autograd.grad(vae_loss.l2(made, true).sum(), made)[0].flatten(1).norm(dim=1)
    scaled = torch.autograd.grad((factor_B * unconvincing(disc, made)).sum(), made)[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(scaled, wanted, rtol=0.02, atol=0)
    assert wanted[0] > 10 * wanted[1] and math.isfinite(float(factor_B.sum()))
