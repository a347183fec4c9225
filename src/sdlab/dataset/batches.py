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
from typing import TYPE_CHECKING, Protocol

from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Cache, Cond, Picture, Pixels, ahead, load_picture, to_pixels
from sdlab.dataset.picture import Unusable
from sdlab.errors import SdlabError
from sdlab.keyed import Draws, permutation

REFERENCE = "reference_{}"  # names in Batch.cond of the latents of the references, from 0, (B, C, h, w)

Size = tuple[int, int]  # height and width in pixels
Geometry = tuple[Size, tuple[Size, ...]]  # of a picture and its references

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on. Row i of everything belongs to ids[i]."""

    latents_BCHW: Tensor  # or pixels_B3HW: of a VAE in [-1, 1], of a captioner as its preprocessor makes them
    cond: Cond  # every tensor has B rows; references are reference_0, reference_1 ... (B, C, h, w)
    weight_B: Tensor  # 1 for a sample that counts, 0 for one that only fills a process's empty share
    ids: tuple[str, ...]  # names of the samples: they key the random draws and stand in error messages


@dataclass(frozen=True)
class Entry:
    """One visit of a sample in an epoch, and where its tensors are cached, or its picture is."""

    id: str
    size_px: Size
    latents_key: str = ""
    prompt_key: str = ""
    flipped_key: str = ""  # latents of the mirrored picture; empty: never mirrored
    reference_sizes: tuple[Size, ...] = ()
    reference_keys: tuple[str, ...] = ()  # latents of the references, in their order
    flipped_reference_keys: tuple[
        str, ...
    ] = ()  # the same mirrored: a flip turns picture and references alike
    path: str = ""  # the picture's file, for what is trained on pixels
    whole_px: Size | None = None  # the size it is opened at where `size_px` is cut from it; None: `size_px`

    def __post_init__(self) -> None:
        assert len(self.reference_keys) == len(self.reference_sizes), self.id
        assert not self.flipped_key or len(self.flipped_reference_keys) == len(self.reference_keys), self.id

    @property
    def geometry(self) -> Geometry:
        """Entries of one geometry share a batch."""
        return self.size_px, self.reference_sizes


class Source(Protocol):
    """Where the tensors of a batch come from. Called by several threads at once."""

    def __call__(self, entries: Sequence[Entry], draws: Draws) -> tuple[Tensor, Cond]:
        """What is trained on, (B, ...), and the conditions, B rows each, of entries of one geometry."""


@dataclass(frozen=True)
class CachedSource:
    """Latents and embeddings of prompts that were made before the training."""

    cache: Cache
    caption_dropout: float  # share of samples that get the empty prompt
    empty_prompt_key: str

    def __call__(self, entries: Sequence[Entry], draws: Draws) -> tuple[Tensor, Cond]:
        """Latents (B, C, H, W); every tensor that the prompts were encoded to, and the references."""
        import torch

        ids = tuple(entry.id for entry in entries)
        # Only the words are dropped: the empty prompt with the references is what guidance of edits needs.
        dropped = draws.uniform("caption-dropout", ids) < self.caption_dropout
        flipped = draws.uniform("flip", ids) < 0.5
        latents, conds = [], []
        for entry, drop, flip in zip(entries, dropped.tolist(), flipped.tolist(), strict=True):
            mirrored = bool(flip and entry.flipped_key)
            latents.append(self._latents(entry.flipped_key if mirrored else entry.latents_key))
            cond = self.cache.get("prompts", self.empty_prompt_key if drop else entry.prompt_key)
            keys = entry.flipped_reference_keys if mirrored else entry.reference_keys
            conds.append(cond | {REFERENCE.format(i): self._latents(key) for i, key in enumerate(keys)})
        return torch.stack(latents), {name: torch.stack([c[name] for c in conds]) for name in conds[0]}

    def _latents(self, key: str) -> Tensor:
        return self.cache.get("latents", key)["latents"]


@dataclass(frozen=True)
class PixelSource:
    """The pictures themselves, opened anew for every visit: nothing of the dataset stays in memory."""

    pixels: Pixels
    crop_px: int | None = None  # side of the square that is cut from each picture; None: all of it
    flip: bool = False  # mirror half of the visits

    def __call__(self, entries: Sequence[Entry], draws: Draws) -> tuple[Tensor, Cond]:
        """Pixels (B, 3, H, W), float32 in [-1, 1], without conditions. Raises SdlabError for a picture gone bad."""
        import torch

        ids = tuple(entry.id for entry in entries)
        flipped = ((draws.uniform("flip", ids) < 0.5) & self.flip).tolist()
        down, across = (draws.uniform(f"crop-{way}", ids).tolist() for way in ("down", "across"))
        rows = [
            self._cut(
                reopened(Picture(entry.path, entry.whole_px or entry.size_px, mirrored), self.pixels), place
            )
            for entry, mirrored, place in zip(entries, flipped, zip(down, across, strict=True), strict=True)
        ]
        return torch.stack(rows), {}

    def _cut(self, pixels_3HW: Tensor, place: tuple[float, float]) -> Tensor:
        """A square of the picture; `place` says where, down and across, from 0 to below 1."""
        if self.crop_px is None:
            return pixels_3HW
        top, left = (
            int(share * (side - self.crop_px + 1))
            for share, side in zip(place, pixels_3HW.shape[1:], strict=True)
        )
        return pixels_3HW[:, top : top + self.crop_px, left : left + self.crop_px]


def reopened(picture: Picture, pixels: Pixels) -> Tensor:
    """Pixels 3HW of a picture that has opened before the training; SdlabError where it does no longer."""
    try:
        return to_pixels(load_picture(picture, pixels))
    except Unusable as reason:
        raise gone_bad(picture.path, reason) from reason


def gone_bad(path: str, reason: Unusable) -> SdlabError:
    """What to raise for a picture that has opened before the training and does no longer."""
    return SdlabError(
        f"cannot be used any more: {reason}", where=path, next_step="Put it back, then --resume"
    )


def visit_name(item: Item) -> str:
    """What names a visit in a batch: the sample's id, and of a repeated one its number."""
    return f"{item.sample.id}#{item.repeat}" if item.repeat else item.sample.id


class Batches:
    """The batches of a whole run, by number.

    `batch` samples a process and forward pass, `accumulate` passes a step, `num_processes` processes.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        source: Source,
        *,
        batch: int,
        accumulate: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.entries, self.source, self.seed = tuple(entries), source, seed
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
        """This process's share of a step, from the source."""
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
        latents, cond = self.source(mine, draws)
        return Batch(latents, cond, torch.full((len(mine),), weight), tuple(entry.id for entry in mine))


def _name(geometry: Geometry) -> str:
    """``512x512``, with references ``512x512+512x512+448x576``: names the keyed order of a bucket."""
    return "+".join(f"{height}x{width}" for height, width in (geometry[0], *geometry[1]))
