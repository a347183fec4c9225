"""Which samples train in which step: a function of (seed, step), so a resumed run needs to remember one number.

An epoch is: each bucket's entries in a keyed order, cut into batches of one size (the last may be short),
the batches in a keyed order, `accumulate` of them to a step. A batch of B is the same B samples on one
process as on several that share it.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdlab.dataset.cache import Cache, Cond, ahead
from sdlab.keyed import Draws, permutation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on. Row i of everything belongs to ids[i]."""

    latents_BCHW: Tensor
    cond: Cond  # every tensor has B rows
    weight_B: Tensor  # 1 for a sample that counts, 0 for one that only fills a process's empty share
    ids: tuple[str, ...]  # names of the samples: they key the random draws and stand in error messages


@dataclass(frozen=True)
class Entry:
    """One visit of a sample in an epoch, and where its tensors are cached."""

    id: str
    size_px: tuple[int, int]  # height, width: entries of one size share a batch
    latents_key: str
    prompt_key: str
    flipped_key: str = ""  # latents of the mirrored picture; empty: never mirrored


class Batches:
    """The batches of a whole run, by number.

    `batch` samples a process and forward pass, `accumulate` passes a step, `num_processes` processes.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        cache: Cache,
        *,
        batch: int,
        accumulate: int,
        seed: int,
        caption_dropout: float,
        empty_prompt_key: str,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.entries, self.cache = tuple(entries), cache
        self.seed, self.caption_dropout, self.empty_prompt_key = seed, caption_dropout, empty_prompt_key
        self.accumulate, self.rank, self.num_processes = accumulate, *process
        self.chunk = batch * self.num_processes
        self.effective_batch = self.chunk * accumulate
        self._epoch: tuple[int, list[list[Entry]]] = (-1, [])
        sizes: dict[tuple[int, int], int] = {}
        for entry in self.entries:
            sizes[entry.size_px] = sizes.get(entry.size_px, 0) + 1
        num_chunks = sum(-(-count // self.chunk) for count in sizes.values())
        self.steps_per_epoch = -(-num_chunks // accumulate)

    def shapes(self) -> set[tuple[tuple[int, int], int]]:
        """Every (height and width, number of samples) that a forward pass can have."""
        return {(chunk[0].size_px, len(chunk)) for chunk in self._chunks(0)}

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def plan(self, step: int) -> list[list[Entry]]:
        """The batches of a step, over all processes: 1 to `accumulate` lists of 1 to `chunk` entries of one size."""
        epoch, within = divmod(step, self.steps_per_epoch)
        latest = self._epoch  # read once: another thread may be an epoch ahead
        if latest[0] != epoch:
            latest = self._epoch = (epoch, self._chunks(epoch))
        return latest[1][within * self.accumulate : (within + 1) * self.accumulate]

    def load(self, step: int) -> list[Batch]:
        """This process's share of a step, from the cache."""
        draws = Draws(self.seed, step)
        return [self._batch(draws, chunk) for chunk in self.plan(step)]

    def steps(self, start: int, stop: int, *, num_workers: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its batches) for start <= step < stop, read ahead by `num_workers` threads."""
        return ahead(self.load, range(start, stop), num_workers)

    def _chunks(self, epoch: int) -> list[list[Entry]]:
        buckets: dict[tuple[int, int], list[Entry]] = {}
        for entry in self.entries:
            buckets.setdefault(entry.size_px, []).append(entry)
        chunks = []
        for size, entries in sorted(buckets.items()):
            order = permutation(len(entries), self.seed, "order", epoch, f"{size[0]}x{size[1]}")
            shuffled = [entries[i] for i in order]
            chunks += [shuffled[i : i + self.chunk] for i in range(0, len(shuffled), self.chunk)]
        return [chunks[i] for i in permutation(len(chunks), self.seed, "batches", epoch)]

    def _batch(self, draws: Draws, chunk: list[Entry]) -> Batch:
        import torch

        mine = chunk[self.rank :: self.num_processes]
        weight = (
            1.0 if mine else 0.0
        )  # a process without a share runs one sample for nothing, to keep in step
        mine = mine or chunk[:1]
        ids = tuple(entry.id for entry in mine)
        dropped = draws.uniform("caption-dropout", ids) < self.caption_dropout
        flipped = draws.uniform("flip", ids) < 0.5
        latents, conds = [], []
        for entry, drop, flip in zip(mine, dropped.tolist(), flipped.tolist(), strict=True):
            key = entry.flipped_key if flip and entry.flipped_key else entry.latents_key
            latents.append(self.cache.get("latents", key)["latents"])
            conds.append(self.cache.get("prompts", self.empty_prompt_key if drop else entry.prompt_key))
        cond = {name: torch.stack([c[name] for c in conds]) for name in conds[0]}
        return Batch(torch.stack(latents), cond, torch.full((len(mine),), weight), ids)
