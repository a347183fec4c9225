"""Which samples train in which step: a function of (seed, step), so a resumed run needs to remember one number.

An epoch is: each bucket's entries in a keyed order, cut into batches of one geometry (the last may be short),
the batches in a keyed order, `accumulate` of them to a step. A batch of B is the same B samples on one
process as on several that share it. A geometry is the size of the pictures and of each of their references:
pictures with other references, or another number of them, never meet in a batch.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdlab.dataset.cache import Cache, Cond, ahead
from sdlab.keyed import Draws, permutation

REFERENCE = "reference_{}"  # names in Batch.cond of the latents of the references, from 0, (B, C, h, w)

Size = tuple[int, int]  # height and width in pixels
Geometry = tuple[Size, tuple[Size, ...]]  # of a picture and its references

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on. Row i of everything belongs to ids[i]."""

    latents_BCHW: Tensor
    cond: Cond  # every tensor has B rows; references are reference_0, reference_1 ... (B, C, h, w)
    weight_B: Tensor  # 1 for a sample that counts, 0 for one that only fills a process's empty share
    ids: tuple[str, ...]  # names of the samples: they key the random draws and stand in error messages


@dataclass(frozen=True)
class Entry:
    """One visit of a sample in an epoch, and where its tensors are cached."""

    id: str
    size_px: Size
    latents_key: str
    prompt_key: str
    flipped_key: str = ""  # latents of the mirrored picture; empty: never mirrored
    reference_sizes: tuple[Size, ...] = ()
    reference_keys: tuple[str, ...] = ()  # latents of the references, in their order
    flipped_reference_keys: tuple[
        str, ...
    ] = ()  # the same mirrored: a flip turns picture and references alike

    def __post_init__(self) -> None:
        assert len(self.reference_keys) == len(self.reference_sizes), self.id
        assert not self.flipped_key or len(self.flipped_reference_keys) == len(self.reference_keys), self.id

    @property
    def geometry(self) -> Geometry:
        """Entries of one geometry share a batch."""
        return self.size_px, self.reference_sizes


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
        counts = Counter(entry.geometry for entry in self.entries)
        num_chunks = sum(-(-count // self.chunk) for count in counts.values())
        self.steps_per_epoch = -(-num_chunks // accumulate)

    def shapes(self) -> set[tuple[Geometry, int]]:
        """Every (geometry, number of samples) that a forward pass can have."""
        return {(chunk[0].geometry, len(chunk)) for chunk in self._chunks(0)}

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def plan(self, step: int) -> list[list[Entry]]:
        """The batches of a step, of all processes: 1 to `accumulate` lists of 1 to `chunk` entries of one geometry."""
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
        buckets: dict[Geometry, list[Entry]] = {}
        for entry in self.entries:
            buckets.setdefault(entry.geometry, []).append(entry)
        chunks = []
        for geometry, entries in sorted(buckets.items()):
            order = permutation(len(entries), self.seed, "order", epoch, _name(geometry))
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
        # Only the words are dropped: the empty prompt with the references is what guidance of edits needs.
        dropped = draws.uniform("caption-dropout", ids) < self.caption_dropout
        flipped = draws.uniform("flip", ids) < 0.5
        latents, conds = [], []
        for entry, drop, flip in zip(mine, dropped.tolist(), flipped.tolist(), strict=True):
            mirrored = bool(flip and entry.flipped_key)
            latents.append(self._latents(entry.flipped_key if mirrored else entry.latents_key))
            cond = self.cache.get("prompts", self.empty_prompt_key if drop else entry.prompt_key)
            keys = entry.flipped_reference_keys if mirrored else entry.reference_keys
            conds.append(cond | {REFERENCE.format(i): self._latents(key) for i, key in enumerate(keys)})
        stacked = {name: torch.stack([c[name] for c in conds]) for name in conds[0]}
        return Batch(torch.stack(latents), stacked, torch.full((len(mine),), weight), ids)

    def _latents(self, key: str) -> Tensor:
        return self.cache.get("latents", key)["latents"]


def _name(geometry: Geometry) -> str:
    """``512x512``, with references ``512x512+512x512+448x576``: names the keyed order of a bucket."""
    return "+".join(f"{height}x{width}" for height, width in (geometry[0], *geometry[1]))
