"""Reading model files as data: headers, bounded JSON and raw tensor bytes. No heavy imports.

Weights come from anywhere, so nothing here trusts them: sizes, ranges, names and counts are checked against
the file itself before a byte of a tensor is used, and no code that a file may carry is ever run. Pickles are
read by a process of their own (unpickle.py), and only where the user allows it.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 16 << 20  # SD 1.5 has 0.15 MB; a header of 300,000 tensors takes half a minute to read
MAX_TENSORS = 20_000
MAX_NAME, MAX_DIMENSIONS = 200, 8
MAX_BRACES = 600_000  # a tokenizer.json has a list for each of its 270,000 merges
MAX_JSON_BYTES = 32 << 20  # the largest we read is a tokenizer.json: 3.6 MB for CLIP, 17 MB for FLUX.2 dev
PIECE_BYTES = 16 << 20

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
OTHER_TYPES = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E8M0", "F8_E5M2", "I8", "U8", "BOOL"),
)  # of tensors in a file that safetensors writes


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies: `nbytes` from `offset` in `path`, or already in memory."""

    name: str  # as the file has it, for messages
    dtype: str  # a safetensors word: F32, F16, BF16 ...
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    nbytes: int = 0
    tensor: Any = None
    halves_swapped: bool = False  # the second half of the bytes is meant to come first

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, path: Path) -> Stored:
        """A tensor in memory; `path` is for messages."""
        word = word_of(tensor.dtype)
        return cls(name, word, tuple(tensor.shape), path, nbytes=tensor.nbytes, tensor=tensor.detach())

    def pieces(self) -> Iterator[bytes]:
        """The raw little-endian bytes, at most 16 MiB at a time. Raises SdlabError if the file ends early."""
        if self.tensor is not None:
            yield from _pieces_of(self.read() if self.halves_swapped else self.tensor)
            return
        with open(self.path, "rb") as file:
            for offset, nbytes in self.spans():
                file.seek(offset)
                left = nbytes
                while left:
                    piece = file.read(min(PIECE_BYTES, left))
                    if not piece:
                        raise SdlabError("the file ended while it was read", where=str(self.path))
                    left -= len(piece)
                    yield piece

    def spans(self) -> list[tuple[int, int]]:
        """(offset, number of bytes) of what to read, in order."""
        if not self.halves_swapped:
            return [(self.offset, self.nbytes)]
        half = self.nbytes // 2
        return [(self.offset + half, half), (self.offset, half)]

    def read(self) -> torch.Tensor:
        """The tensor on the CPU in its own dtype and in memory of its own (never mapped from the file)."""
        import torch

        if self.tensor is not None:
            whole = self.tensor.detach()
            return torch.cat(whole.chunk(2)[::-1]) if self.halves_swapped else torch.clone(whole)
        tensor = torch.empty(self.shape, dtype=torch_type(self.dtype))
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = 0
        with open(self.path, "rb") as file:
            for offset, nbytes in self.spans():
                file.seek(offset)
                if file.readinto(buffer[at : at + nbytes]) != nbytes:
                    raise SdlabError("the file ended while it was read", where=str(self.path))
                at += nbytes
        return tensor

    def rows(self, part: int, parts: int) -> Stored:
        """One of `parts` equal shares of the rows: tensors that one file holds as one and others apart."""
        num = self.shape[0] // parts
        return replace(
            self,
            shape=(num, *self.shape[1:]),
            offset=self.offset + part * (self.nbytes // parts),
            nbytes=self.nbytes // parts,
            tensor=None if self.tensor is None else self.tensor[part * num : (part + 1) * num],
        )


def torch_type(word: str) -> torch.dtype:
    """The type of torch's that a safetensors word means."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[word])
    return found


def word_of(dtype: torch.dtype) -> str:
    """The safetensors word for a type of torch's."""
    name = str(dtype).removeprefix("torch.")
    return next(word for word, known in TORCH_NAMES.items() if known == name)


def _pieces_of(tensor: Any) -> Iterator[bytes]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for at in range(0, flat.size, PIECE_BYTES):
        yield flat[at : at + PIECE_BYTES].tobytes()


@dataclass(frozen=True)
class Header:
    """What a weights file says it holds."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def regular_size(path: Path) -> int:
    """Bytes of a regular file. Raises SdlabError when it is missing, unreadable or not a regular file."""
    try:
        about = path.stat()
    except (OSError, ValueError) as reason:
        word = getattr(reason, "strerror", None) or str(reason)
        raise SdlabError(f"cannot be read ({word})", where=str(path)) from reason
    if not stat.S_ISREG(about.st_mode):
        raise SdlabError("is not a regular file", where=str(path))
    return about.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with finite numbers. Raises SdlabError for anything else, or more than 32 MB of it."""
    if regular_size(path) > MAX_JSON_BYTES:
        raise SdlabError(
            f"is larger than {MAX_JSON_BYTES >> 20} MB, too large for a configuration", where=str(path)
        )
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise SdlabError(f"cannot be read ({reason.strerror})", where=str(path)) from reason
    not_weights(data[:512], path)
    _bounded_braces(data, MAX_BRACES, path)
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise SdlabError(f"is not valid JSON ({_short(reason)})", where=str(path)) from reason
    if not isinstance(value, dict):
        raise SdlabError("does not hold a JSON object", where=str(path))
    return value


def _bounded_braces(raw: bytes, most: int, path: Path) -> None:
    """Raise SdlabError for JSON of more lists and objects than `most`: a few bytes each there, a hundred in memory."""
    num = raw.count(b"[") + raw.count(b"{")
    if num > most:
        raise SdlabError(f"has {num:,} lists and objects, more than any model's", where=str(path))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _short(reason: BaseException) -> str:
    return readable(str(reason)) or type(reason).__name__


def readable(text: str, *, most: int = 120) -> str:
    """Foreign words for a message: one line without control characters, at most so long."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:most]


def is_pickle(path: Path) -> bool:
    """Does the content (not the suffix) look like a pickle or a zip, as torch.save writes?"""
    regular_size(path)
    with open(path, "rb") as file:
        return _pickled(file.read(16))


def _pickled(head: bytes) -> bool:
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # a safetensors header length may begin with 0x80 as well
        return False
    return head.startswith(b"PK\x03\x04") or (
        head[:1] == b"\x80" and head[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5")
    )


def not_weights(head: bytes, path: Path) -> None:
    """Raise SdlabError when the first bytes are of something that often stands in for a model file."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise SdlabError("is empty", where=str(path), next_step="Download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise SdlabError(
            "is a Git LFS pointer, not the file itself", where=str(path), next_step="Run: git lfs pull"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise SdlabError(
            "is a web page, not a model: the download failed or asked for a login",
            where=str(path),
            next_step="Download it again in a browser where you are logged in",
        )
    if head.startswith(b"GGUF"):
        raise SdlabError("is a GGUF file, which sdlab does not read", where=str(path), next_step=SAFE_COPY)


SAFE_COPY = "Take the .safetensors of the same model"


def read_header(path: Path) -> Header:
    """Names, types, shapes and places of all tensors of a .safetensors file.

    Raises SdlabError, naming the file and the reason, unless the ranges fill the file exactly, without
    overlap or gap, fit their shapes, and stay within the limits above.
    """
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            not_weights(head, path)
            if _pickled(head):
                raise SdlabError("is a pickle, whatever its name says", where=str(path), next_step=SAFE_COPY)
            length = _header_length(head, size, path)
            file.seek(8)
            raw = file.read(length)
    except OSError as reason:
        raise SdlabError(f"cannot be read ({reason.strerror})", where=str(path)) from reason
    table = _header_table(raw, path)
    metadata = table.pop("__metadata__", {})
    if len(table) > MAX_TENSORS:
        raise SdlabError(f"holds {len(table):,} tensors, more than any model we know", where=str(path))
    entries = {name: _entry(name, about, path, 8 + length) for name, about in table.items()}
    _no_gaps(entries, 8 + length, size, path)
    said = metadata.items() if isinstance(metadata, dict) else ()
    return Header(path, entries, {k: v for k, v in said if _is_text(k) and _is_text(v)})


def _is_text(value: Any) -> bool:
    """Is it text that a file can hold? JSON lets lone halves of surrogate pairs through."""
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None


def _header_length(head: bytes, size: int, path: Path) -> int:
    if len(head) < 9:
        raise SdlabError(
            "is too short to be a safetensors file", where=str(path), next_step="Download it again"
        )
    (length,) = struct.unpack("<Q", head[:8])
    if head[8:9] != b"{":
        raise SdlabError("is not a safetensors file", where=str(path), next_step=SAFE_COPY)
    if length > size - 8:
        raise SdlabError("is cut short within its header", where=str(path), next_step="Download it again")
    if length > MAX_HEADER_BYTES:
        raise SdlabError(f"has a header of {length:,} bytes, more than any model we know", where=str(path))
    return int(length)


def _header_table(raw: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name stands there twice")
        return table

    _bounded_braces(raw, 8 * MAX_TENSORS, path)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise SdlabError(f"has a damaged header ({_short(reason)})", where=str(path)) from reason
    assert isinstance(table, dict)  # it starts with '{'
    return table


def _entry(name: str, about: Any, path: Path, base: int) -> Stored:
    if not isinstance(about, dict):
        raise _fault(name, "is not described", path)
    range_ = about.get("data_offsets")
    if not (isinstance(range_, list) and len(range_) == 2 and _whole(range_)):
        raise _fault(name, "has no proper range", path)
    place = [base + range_[0], range_[1] - range_[0]]
    return checked(name, about.get("dtype"), about.get("shape"), place, path)


def checked(name: Any, dtype: Any, shape: Any, place: list[Any], path: Path) -> Stored:
    """A tensor as a file describes it: `place` is offset and number of bytes. Raises SdlabError for nonsense."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _fault(str(name), "has an impossible name", path)
    item = ITEM_BYTES.get(str(dtype)) or OTHER_TYPES.get(str(dtype))
    if item is None:
        raise _fault(name, f"has the unknown type {str(dtype)[:20]!r}", path)
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and _whole(shape)):
        raise _fault(name, "has no proper shape", path)
    if place[1] != math.prod(shape) * item:
        raise _fault(name, "has a range that does not fit its shape", path)
    if not _whole(place):
        raise _fault(name, "has no proper range", path)
    return Stored(name, str(dtype), tuple(shape), path, *place)


def _fault(name: str, what: str, path: Path) -> SdlabError:
    return SdlabError(f"has a damaged header: tensor {name[:80]!r} {what}", where=str(path))


def _whole(values: list[Any]) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _no_gaps(entries: Mapping[str, Stored], base: int, size: int, path: Path) -> None:
    at = base
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != at:
            raise SdlabError(
                f"has a damaged header: a gap or overlap at tensor {entry.name!r}", where=str(path)
            )
        at += entry.nbytes
    if at > size:
        raise SdlabError(
            f"is cut short: {at - size:,} of {at:,} bytes are missing",
            where=str(path),
            next_step="Download it again",
        )
    if at < size:
        raise SdlabError(f"has {size - at:,} bytes after its last tensor", where=str(path))


def read_weights(path: Path, *, allow_pickle: bool) -> Header:
    """The header of a weights file of either kind, told by content. A pickle needs `allow_pickle`."""
    if not is_pickle(path):
        return read_header(path)
    if not allow_pickle:
        raise SdlabError(
            "is a pickle, which can run code when it is opened",
            where=str(path),
            next_step=f"{SAFE_COPY}, or add --allow-pickle to read its tensors only",
        )
    from sdlab.models.unpickle import read_pickle

    return read_pickle(path)


def component_weights(folder: Path, stems: tuple[str, ...], *, allow_pickle: bool) -> dict[str, Stored]:
    """All tensors of one part of a diffusers folder: one file, shards with an index, or a pickle.

    `stems` are the file names the libraries use, without suffix, best first. ``stem.safetensors`` is
    preferred, then its shards, then ``stem.fp16.safetensors``, then pickles.
    """
    for stem in stems:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        half = folder / f"{stem}.fp16.safetensors"
        if whole.exists():
            return read_weights(whole, allow_pickle=allow_pickle).tensors
        if index.exists():
            return _shards(index, allow_pickle=allow_pickle)
        if half.exists():
            return read_weights(half, allow_pickle=allow_pickle).tensors
    for stem in stems:
        for pickled in (folder / f"{stem}.bin", folder / f"{stem}.ckpt", folder / f"{stem}.pt"):
            if pickled.exists():
                return read_weights(pickled, allow_pickle=allow_pickle).tensors
    raise SdlabError(
        f"there is no {stems[0]}.safetensors in it", where=str(folder), next_step="Copy the model again"
    )


def _shards(index: Path, *, allow_pickle: bool) -> dict[str, Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise SdlabError("has no weight_map", where=str(index))
    names = sorted(set(places.values()))
    if len(names) > 256 or not all(map(_is_shard, names)):
        raise SdlabError("names files that are not shards beside it", where=str(index))
    tensors: dict[str, Stored] = {}
    for name in names:
        for key, stored in read_weights(index.parent / name, allow_pickle=allow_pickle).tensors.items():
            if key in tensors:
                raise SdlabError(f"tensor {key!r} stands in two shards", where=str(index))
            tensors[key] = stored
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise SdlabError(f"tensor {lost[0]!r} is in none of its shards", where=str(index))
    return tensors


def _is_shard(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and len(name) <= MAX_NAME
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors under the given names, bytes unchanged, in safetensors' own order: widest type first.

    Memory use does not grow with the size of the tensors. The file is new (an existing one is an error).
    """
    ordered = sorted(tensors.items(), key=lambda item: file_order(item[1].dtype, item[0]))
    with open(path, "xb") as file:
        file.write(head_bytes(((n, s.dtype, s.shape, s.nbytes) for n, s in ordered), metadata or {}))
        for _, stored in ordered:
            for piece in stored.pieces():
                file.write(piece)


def file_order(dtype: str, name: str) -> tuple[int, str]:
    """Sorts tensors as safetensors itself writes them: widest type first, then by name."""
    return _ORDER.index(dtype), name


def head_bytes(rows: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose tensors, (name, dtype, shape, number of bytes), follow in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name, dtype, shape, nbytes in rows:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
