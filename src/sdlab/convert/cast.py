"""The bytes that go into a file, piece by piece: read, cast by torch on one thread, and checked to be finite.

Memory is used again and again: fresh memory for every piece costs more than reading it (a page fault for each 4 KiB).
Where no tensor is cast, torch is not imported (1.5 s and 250 MB).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sdlab.convert.plan import Output
from sdlab.errors import SdlabError
from sdlab.models.files import FLOATS, ITEM_BYTES, Stored, torch_type

if TYPE_CHECKING:
    import torch

PIECE_BYTES = (
    1 << 20
)  # of a source; with 4 MiB and more a piece has left the processor's cache before it is hashed
MOST_BYTES = 4 * PIECE_BYTES  # of a piece that was cast, F16 to F64
LIFETIME = 6  # a piece is overwritten when that many more have been handed out

_INFINITY = {
    "F64": ("8", 0x7FF0 << 48),
    "F32": ("4", 0x7F80 << 16),
    "F16": ("2", 0x7C00),
    "BF16": ("2", 0x7F80),
}

_PARTS = {  # of a single file; elsewhere a part is a file of its own
    "model.diffusion_model.": "denoiser",
    "first_stage_model.": "VAE",
    "cond_stage_model.": "text encoder",
}


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor, valid until LIFETIME more have been handed out."""

    output: Output
    raw: memoryview  # of the source
    data: memoryview  # what stands in the file for it; `raw` itself where nothing is cast


def pieces(outputs: Iterable[Output]) -> Iterator[Piece]:
    """All bytes of `outputs` in order.

    Raises SdlabError for values that are not finite in the output's type, and after the last as Zeros.check does.
    """
    zeros = Zeros()
    with Reader() as reader:
        for output in outputs:
            yield from zeros.counted(output, reader.pieces(output))
    zeros.check()


def again(outputs: Iterable[Output]) -> Iterator[Piece]:
    """The same bytes once more, to be compared with a file: what is not finite was found when it was written."""
    with Reader(is_checked=True) as reader:
        for output in outputs:
            yield from reader.pieces(output)


class Zeros:
    """Counts the weights of nothing but zeros in each part of a model. A LoRA may have them."""

    def __init__(self) -> None:
        self._weights = Counter[str]()
        self._empty = Counter[str]()
        self._file: dict[str, Path] = {}

    def counted(self, output: Output, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Hand on the pieces of one output."""
        is_empty = is_weight = len(output.shape) > 1 and output.dtype in FLOATS and "lora" not in output.name
        for piece in pieces:
            is_empty = is_empty and not np.frombuffer(piece.data, np.uint8).any()
            yield piece
        part = next((part for part in _PARTS if output.name.startswith(part)), "")
        self._weights[part] += is_weight
        self._empty[part] += is_empty
        self._file[part] = output.sources[0].path

    def check(self) -> None:
        """Raise SdlabError for a part with more than half of its weights empty, as loading it would."""
        for part, num in self._weights.items():
            if 2 * self._empty[part] > num:
                whose = f" of the {_PARTS[part]}" if part else ""
                raise SdlabError(
                    f"{self._empty[part]} of the {num} weights{whose} hold nothing but zeros",
                    where=str(self._file[part]),
                    next_step="The model is damaged; take another copy",
                )


class Reader:
    """Reads outputs into memory that is used again, with the files of their sources kept open, in a ``with`` block."""

    def __init__(self, *, is_checked: bool = False) -> None:
        self._is_checked = is_checked
        self._files: dict[Path, BinaryIO] = {}
        self._open = ExitStack()
        self._memory = cycle([bytearray(PIECE_BYTES) for _ in range(LIFETIME)])
        self._cast = cycle([bytearray(MOST_BYTES) for _ in range(LIFETIME)])

    def pieces(self, output: Output) -> Iterator[Piece]:
        """The bytes of one output. Raises SdlabError as `pieces` does, and if a file ends early."""
        for source in output.sources:
            same = source.dtype == output.dtype
            for raw in self._raw(source):
                data = raw if same else _cast(raw, source.dtype, output.dtype, next(self._cast))
                if output.dtype in FLOATS and not (self._is_checked or _is_finite(data, output.dtype)):
                    raise _not_finite(raw, source.dtype, output)
                yield Piece(output, raw, data)

    def _raw(self, source: Stored) -> Iterator[memoryview]:
        """The bytes of a source, at most PIECE_BYTES at a time."""
        if type(source) is Stored and source.tensor is None:
            yield from self._from_file(source)
            return
        for made in source.pieces():  # computed, or already in memory
            for at in range(0, len(made), PIECE_BYTES):
                yield memoryview(made)[at : at + PIECE_BYTES]

    def _from_file(self, source: Stored) -> Iterator[memoryview]:
        file = self._file(source.path)
        for offset, nbytes in source.spans():
            file.seek(offset)
            for at in range(0, nbytes, PIECE_BYTES):
                view = memoryview(next(self._memory))[: min(PIECE_BYTES, nbytes - at)]
                fill(file, view)
                yield view

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = self._open.enter_context(path.open("rb", buffering=0))
        return self._files[path]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *reason: object) -> None:
        self._open.close()


def fill(file: BinaryIO, view: memoryview) -> None:
    """Fill `view` from an unbuffered file. Raises SdlabError if it ends before."""
    while view:
        num = file.readinto(view)  # type: ignore[attr-defined]
        if not num:
            raise SdlabError("the file ended while it was read", where=str(file.name))
        view = view[num:]


def is_cast(output: Output) -> bool:
    """Does any of its numbers change?"""
    return any(source.dtype != output.dtype for source in output.sources)


@contextmanager
def one_thread(outputs: Iterable[Output]) -> Iterator[None]:
    """Torch on one thread: a cast then runs at 10 GB/s, with a thread per core on a busy machine at a fifth of that.

    What is computed while it is read (merged LoRAs) then does not depend on the number of cores either.
    """
    if "torch" not in sys.modules and not any(is_cast(output) for output in outputs):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_finite(data: memoryview, dtype: str) -> bool:
    """Without memory of its own: as a signed whole number every finite x >= 0 lies below the bits of infinity.

    As an unsigned one every finite x < 0 lies below the bits of infinity with the sign.
    """
    size, infinity = _INFINITY[dtype]
    sign = 1 << (8 * int(size) - 1)
    positive = np.frombuffer(data, f"<i{size}").max(initial=0) < infinity
    return bool(positive and np.frombuffer(data, f"<u{size}").max(initial=0) < (infinity | sign))


def _tensor(raw: memoryview, dtype: str) -> torch.Tensor:
    import torch

    writable = bytearray(raw) if raw.readonly else raw  # torch warns of memory that it could not write
    return torch.frombuffer(writable, dtype=torch_type(dtype))


def _cast(raw: memoryview, dtype: str, wanted: str, memory: bytearray) -> memoryview:
    data = memoryview(memory)[: len(raw) // ITEM_BYTES[dtype] * ITEM_BYTES[wanted]]
    _tensor(data, wanted).copy_(_tensor(raw, dtype))
    return data


def _not_finite(raw: memoryview, dtype: str, output: Output) -> SdlabError:
    where = f"tensor {output.name}"
    if not _is_finite(raw, dtype):
        return SdlabError("holds values that are not finite", where=where, next_step="The model is damaged")
    most = float(_tensor(raw, dtype).abs().max())
    return SdlabError(
        f"holds {most:.3g}, which does not fit {output.dtype}",
        where=where,
        next_step="Use --dtype bf16 or fp32",
    )
