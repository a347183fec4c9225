"""Random draws with names: the same key gives the same numbers, whatever was drawn before.

A draw is a function of (seed, purpose, step or epoch, sample id). No generator outlives its draw, so there
is no random state to save, and a resumed run, another worker count or another order of work cannot change
a number. Everything is drawn on the CPU in float32 and moved by the caller, so CPU and CUDA see the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any tuple; the same on every platform and in every process."""
    text = "\x1f".join(map(str, parts))
    return (
        int.from_bytes(
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        >> 1
    )


def keyed(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the tuple of names."""
    import torch

    return torch.Generator("cpu").manual_seed(key(*parts))


def permutation(count: int, *parts: int | str) -> list[int]:
    """A permutation of range(count) named by the tuple."""
    import torch

    return torch.randperm(count, generator=keyed(*parts)).tolist()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step; sample i's do not depend on who shares its batch."""

    seed: int
    step: int

    def normal(self, purpose: str, ids: Sequence[str], shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, (B, *shape) float32 on the CPU, row i named by ids[i]."""
        import torch

        rows = [torch.randn(tuple(shape), generator=keyed(self.seed, purpose, self.step, id_)) for id_ in ids]
        return torch.stack(rows)

    def uniform(self, purpose: str, ids: Sequence[str]) -> torch.Tensor:
        """Numbers in [0, 1), (B,) float64 on the CPU, entry i named by ids[i]."""
        import torch

        rows = [
            torch.rand((), generator=keyed(self.seed, purpose, self.step, id_), dtype=torch.float64)
            for id_ in ids
        ]
        return torch.stack(rows)

    def integers(self, purpose: str, ids: Sequence[str], low: int, high: int) -> torch.Tensor:
        """Whole numbers in [low, high), (B,) int64 on the CPU, entry i named by ids[i]."""
        import torch

        rows = [
            torch.randint(low, high, (), generator=keyed(self.seed, purpose, self.step, id_)) for id_ in ids
        ]
        return torch.stack(rows)
