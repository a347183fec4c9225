"""What training and inference ask of a family of models. What a batch and a Cond are, dataset/ says.

A family holds paths and numbers, never weights: what it loads, the caller owns and frees.

Shapes: B batch, C latent channels, H W latent height and width, L tokens, D width of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdlab.dataset.batches import Batch
from sdlab.dataset.cache import Cond, Encoders
from sdlab.keyed import Draws

__all__ = ["Batch", "Cond", "Encoders", "Family"]


class Family(Protocol):
    """A kind of model. Six members and no more (a test counts them); what one family alone needs lives in Cond."""

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""

    @property
    def fingerprint(self) -> str:
        """Hash of the encoders' files and settings: part of every cache key."""

    def load_encoders(self, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Encoders]:
        """The encoders, freed when the `with` ends. `dtype` is what large text encoders compute in."""

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module that is trained, with freshly allocated (never memory-mapped) parameters."""

    def loss(self, denoiser: nn.Module, batch: Batch, rng: Draws) -> Tensor:
        """Loss of each sample, (B,) float32, unweighted by batch.weight_B."""

    def pipeline(self, denoiser: nn.Module, conds: Mapping[str, Cond] | None = None) -> Any:
        """A diffusers pipeline around the given denoiser, in its dtype and on its device.

        With `conds` (by prompt) a family whose text encoder is large does not load it, and knows these prompts only.
        """
