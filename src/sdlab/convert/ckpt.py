"""Writes a .ckpt, the zip of a pickle and of raw tensors that ``torch.save`` writes, piece by piece.

For tools that read nothing newer: such a file can hold a program, and nobody who is handed one can tell that it holds
none. This one is read again with torch's restricted unpickler, every byte compared, before it gets its name.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

import torch

from sdlab.convert import stream
from sdlab.convert.cast import Reader, Zeros, one_thread
from sdlab.convert.plan import Output
from sdlab.convert.stream import Differs, Written
from sdlab.dataset.disk import sync_folder
from sdlab.models.files import read_weights

_FOLDER = "archive"  # all records lie in one, whatever its name
_ALIGNMENT = 64  # of a tensor's bytes in the file, so that it can be mapped
_BIG_BYTES = 1 << 31  # zip has fields of 64 bits, 20 bytes in all, for records from here on
_STORAGES = {
    "F64": torch.DoubleStorage,
    "F32": torch.FloatStorage,
    "F16": torch.HalfStorage,
    "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage,
    "I32": torch.IntStorage,
    "I16": torch.ShortStorage,
    "I8": torch.CharStorage,
    "U8": torch.ByteStorage,
    "BOOL": torch.BoolStorage,
}


def write(
    path: Path, outputs: Sequence[Output], *, advance: Callable[[int], None] = lambda num_bytes: None
) -> Written:
    """Write ``{"state_dict": {name: tensor}}`` to `path`, which must not exist. Equal input gives equal bytes.

    `advance` and what is raised are as for stream.write. AutoV3 is not defined for such a file.
    """
    ordered = sorted(outputs, key=lambda output: output.name)
    stream.check_space(path.parent, sum(output.nbytes + 512 for output in ordered))
    with stream.part_beside(path) as file, one_thread(ordered):
        _write_zip(file, ordered, advance)
        file.flush()
        os.fsync(file.fileno())
        part = Path(file.name)
        try:
            _compare(part, ordered, advance)
        except Differs as where:
            raise stream.unlike_source(path.parent, where) from where
        with part.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        num_bytes = part.stat().st_size
        stream.name(file, path)
    sync_folder(str(path.parent))
    return Written(len(ordered), num_bytes, sha256, "")


@dataclass(frozen=True)
class _Storage:
    """Stands for the numbers of a tensor, which lie in a record of their own."""

    key: str
    output: Output


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage


class _Pickler(pickle.Pickler):
    """Says of a _Tensor what torch.save says of a tensor, without the numbers."""

    def persistent_id(self, it: Any) -> Any:
        if not isinstance(it, _Storage):
            return None
        return "storage", _STORAGES[it.output.dtype], it.key, "cpu", prod(it.output.shape)

    def reducer_override(self, it: Any) -> Any:
        if not isinstance(it, _Tensor):
            return NotImplemented
        shape = it.storage.output.shape
        stride = tuple(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()
        return torch._utils._rebuild_tensor_v2, (it.storage, 0, shape, stride, False, OrderedDict())


def _write_zip(file: BinaryIO, ordered: Sequence[Output], advance: Callable[[int], None]) -> None:
    table = io.BytesIO()
    tensors = {o.name: _Tensor(_Storage(str(key), o)) for key, o in enumerate(ordered)}
    _Pickler(table, protocol=2).dump({"state_dict": tensors})
    zeros = Zeros()
    with ZipFile(file, "w") as archive, Reader() as reader:
        archive.writestr(ZipInfo(f"{_FOLDER}/data.pkl"), table.getvalue())
        archive.writestr(ZipInfo(f"{_FOLDER}/byteorder"), b"little")
        for key, output in enumerate(ordered):
            record = _aligned(f"{_FOLDER}/data/{key}", file.tell(), output.nbytes)
            with archive.open(record, "w", force_zip64=output.nbytes >= _BIG_BYTES) as numbers:
                for piece in zeros.counted(output, reader.pieces(output)):
                    numbers.write(piece.data)
                    advance(len(piece.data))
        archive.writestr(ZipInfo(f"{_FOLDER}/version"), b"3\n")
    zeros.check()


def _aligned(name: str, at: int, num_bytes: int) -> ZipInfo:
    """A record whose head stands at `at`, with so much padding that its content is aligned; as torch.save pads."""
    record = ZipInfo(name)
    content = at + 30 + len(name) + 4 + (20 if num_bytes >= _BIG_BYTES else 0)
    padding = -content % _ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return record


def _compare(path: Path, ordered: Sequence[Output], advance: Callable[[int], None]) -> None:
    """Compare every byte with its source, at the places that torch's own reader names. Raises Differs."""
    there = read_weights(path, allow_pickle=True).tensors
    if {name: (t.dtype, t.shape) for name, t in there.items()} != {
        o.name: (o.dtype, o.shape) for o in ordered
    }:
        raise Differs("its table of tensors")
    memory = stream.read_memory()
    with path.open("rb", buffering=0) as file, Reader(is_checked=True) as reader:
        for output in ordered:
            stored = there[output.name]
            assert (stored.path, stored.nbytes) == (path, output.nbytes)
            file.seek(stored.offset)
            for piece in reader.pieces(output):
                stream.check_same(file, piece, memory)
                advance(len(piece.data))
