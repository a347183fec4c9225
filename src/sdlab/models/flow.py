"""The mathematics of FLUX.2's rectified flow and of its tokens. Pure functions, no models.

A picture's latents are what the transformer sees in another order: (B, 4C, H, W) "packed" latents of 2x2 patches,
where token h*W + w is column (h, w). Everything here takes and gives those.

Shapes: B batch, C channels of the VAE's latents, H W packed height and width (1/16 of the pixels), N tokens H*W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REFERENCE_STEP = 10  # the i-th reference picture stands at 10 * (i + 1) on the first axis; the target at 0
_TOKENS, _MU = (256, 4096), (0.5, 1.15)  # the two ends that the shift is interpolated between


def patchify(latents_BCHW: Tensor) -> Tensor:
    """(B, C, 2H, 2W) of the VAE to (B, 4C, H, W): channel c of the patch's row i and column j becomes 4c + 2i + j."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def normalise(packed_BCHW: Tensor, mean_C: Tensor, variance_C: Tensor, epsilon: float) -> Tensor:
    """Packed latents by the VAE's running statistics: about zero mean and unit spread in each channel."""
    spread = torch.sqrt(variance_C.reshape(1, -1, 1, 1) + epsilon)
    return (packed_BCHW - mean_C.reshape(1, -1, 1, 1)) / spread


def to_tokens(packed_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) to (B, N, C), row by row."""
    return packed_BCHW.flatten(2).transpose(1, 2)


def picture_ids(height: int, width: int, *, time: int = 0) -> Tensor:
    """Places of a picture's tokens, (N, 4): (time, row, column, 0)."""
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1)
    )


def text_ids(length: int) -> Tensor:
    """Places of a prompt's tokens, (L, 4): (0, 0, 0, k)."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length))


def with_references(target_BCHW: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of the target and after them those of the references, and their places: (B, N+M, C) and (N+M, 4).

    Each reference starts again at row 0, column 0, and stands apart on the time axis.
    """
    tokens, ids = [to_tokens(target_BCHW)], [picture_ids(*target_BCHW.shape[-2:])]
    for i, reference_BCHW in enumerate(references):
        tokens.append(to_tokens(reference_BCHW).to(target_BCHW))
        ids.append(picture_ids(*reference_BCHW.shape[-2:], time=REFERENCE_STEP * (i + 1)))
    return torch.cat(tokens, dim=1), torch.cat(ids)


def shift_of(num_tokens: int) -> float:
    """How far noise levels are shifted in training: exp(mu), mu linear in the tokens, 0.5 at 256 to 1.15 at 4096.

    The line goes on beyond both ends (Esser et al. 2024, section 5.3.2, with the numbers of FLUX).
    """
    slope = (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])
    return math.exp(_MU[0] + slope * (num_tokens - _TOKENS[0]))


def shifted(sigma_B: Tensor, shift: float) -> Tensor:
    """Noise levels in (0, 1) moved towards 1: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma_B / (1 + (shift - 1) * sigma_B)


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """On the straight line from the picture (sigma 0) to the noise (sigma 1)."""
    sigma_B111 = sigma_B.reshape(-1, 1, 1, 1)
    return (1 - sigma_B111) * x0_BCHW + sigma_B111 * noise_BCHW
