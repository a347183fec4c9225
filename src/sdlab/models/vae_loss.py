"""What an autoencoder is judged by. Pure functions of pictures and of its posterior; each sample for itself.

Everything is computed in float32, inside an autocast too, and gives one number a sample, (B,). Pictures are in [-1, 1].

The perceptual term is `structure`: edges and structural similarity at several sizes. LPIPS (Zhang et al. 2018) is the
usual one, and is there as well (lpips.py) where its weights are.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RANGE = 2.0  # from the darkest to the brightest value
WINDOW_PX, SIGMA_PX = 11, 1.5  # of SSIM, as in its paper
C1, C2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
NUM_SCALES = 3  # of the structure term: 1, 1/2 and 1/4
LEAST_ERROR = 1e-10  # of PSNR: pictures that are the same have 106 dB, not infinitely many


def unrounded(tensor: Tensor) -> torch.autocast:
    """`with` this, an autocast does not round convolutions and products to bf16."""
    return torch.autocast(tensor.device.type, enabled=False)


def l1(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Mean absolute error."""
    return (made_BCHW.float() - true_BCHW.float()).abs().mean(dim=(1, 2, 3))


def l2(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Mean squared error."""
    return (made_BCHW.float() - true_BCHW.float()).square().mean(dim=(1, 2, 3))


def psnr(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 106: 10 log10(RANGE^2 / mean squared error)."""
    return 10 * torch.log10(RANGE**2 / l2(made_BCHW, true_BCHW).clamp(min=LEAST_ERROR))


def kl(mean_BCHW: Tensor, logvar_BCHW: Tensor) -> Tensor:
    """KL divergence, in nats, of the posterior from a standard normal: Kingma & Welling 2014, appendix B.

    The sum over all latents of (mean^2 + variance - 1 - log variance) / 2.
    """
    mean, logvar = mean_BCHW.float(), logvar_BCHW.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def ssim(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Structural similarity, at most 1: Wang et al. 2004, eq. 13, mean over places and channels.

    The window is their Gaussian of 11 pixels and sigma 1.5, and stays within the picture; on a picture of fewer than
    11 pixels it is as large as that allows.
    """
    a, b = made_BCHW.float(), true_BCHW.float()
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) + _blurred(b * b) - mean_a.square() - mean_b.square()
    covariance = _blurred(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return (light * structure).mean(dim=(1, 2, 3))


def _blurred(values_BCHW: Tensor) -> Tensor:
    """Weighted means under the window, down and then across, (B, C, H - window + 1, W - window + 1)."""
    num_channels = values_BCHW.shape[1]
    for side in (2, 3):
        weights = _gaussian(min(WINDOW_PX, values_BCHW.shape[side]), values_BCHW.device)
        window = weights[:, None] if side == 2 else weights[None, :]
        window = window.expand(num_channels, 1, *window.shape)
        with unrounded(values_BCHW):
            values_BCHW = F.conv2d(values_BCHW, window, groups=num_channels)
    return values_BCHW


def _gaussian(num: int, device: torch.device) -> Tensor:
    """Weights of `num` pixels, float32, that add up to 1."""
    places = torch.arange(num, device=device, dtype=torch.float32) - (num - 1) / 2
    weights = torch.exp(-places.square() / (2 * SIGMA_PX**2))
    return weights / weights.sum()


def structure(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """How far edges and structures differ, from 0 up; the mean over the picture at 1, 1/2 and 1/4 of its size of

        |differences down| + |differences across| + (1 - SSIM) / 2

    The first two are the mean absolute error between the two pictures' differences of neighbouring pixels: the gradient
    difference loss of Mathieu et al. 2016, eq. 6, with alpha 1 and with signs, which a blurred edge cannot evade.
    SSIM as a loss, together with L1 and at several sizes: Zhao et al. 2017, eq. 9.
    """
    made, true = made_BCHW.float(), true_BCHW.float()
    terms = []
    for scale in range(NUM_SCALES):
        if scale:
            made, true = F.avg_pool2d(made, 2), F.avg_pool2d(true, 2)
        terms.append(_edges(made - true) + 0.5 * (1 - ssim(made, true)))
        if min(made.shape[-2:]) < 4:  # the next one has no neighbours
            break
    return torch.stack(terms).mean(dim=0)


def _edges(difference_BCHW: Tensor) -> Tensor:
    """Differences are linear: those of two pictures' difference are the difference of theirs."""
    down, across = difference_BCHW.diff(dim=2), difference_BCHW.diff(dim=3)
    return down.abs().mean(dim=(1, 2, 3)) + across.abs().mean(dim=(1, 2, 3))
