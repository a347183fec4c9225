"""Writes a safetensors file piece by piece, reads it back, and only then gives it its name.

Memory does not grow with the model: a piece is 16 MiB. Until it has its name the file is a hidden one beside it, locked
for as long as the process lives: what a killed one left is known by that, and removed at the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sdlab.convert.plan import Output
from sdlab.dataset.disk import hold, name_new, sync_folder
from sdlab.errors import OutOfResources, SdlabError
from sdlab.models.files import file_order, head_bytes

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"\..+\.safetensors\.[0-9a-f]{8}\.sdlab-part", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Written:
    """A file that is what it should be: read whole and compared with its sources."""

    num_tensors: int
    num_bytes: int
    sha256: str  # of the whole file; AutoV2 is its first 10 characters
    data_sha256: str  # of the tensors without the header; AutoV3 is its first 12 characters


class Differs(Exception):
    """A file is not what it should be. In words: where."""


def write(
    path: Path,
    outputs: Sequence[Output],
    *,
    metadata: Mapping[str, str],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Write `outputs` to `path`, which must not exist, in safetensors' own order: equal input gives equal bytes.

    `advance` is told how many bytes are done; writing and reading back count alike. Raises SdlabError, and leaves no
    file, where a value does not fit the type or is not finite, or what is read back is not what the sources hold.
    """
    ordered, head = _laid_out(outputs, metadata)
    _check_space(path, len(head) + sum(output.nbytes for output in ordered))
    with _part_beside(path) as file:
        file.write(head)
        for output in ordered:
            for piece in _cast(output):
                file.write(piece)
                advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, where the system heeds that
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            written = compare(Path(file.name), outputs, metadata=metadata, advance=advance)
        except Differs as where:
            raise SdlabError(
                f"what was written differs from the model in {where} when both are read again",
                where=str(path.parent),
                next_step="Nothing was kept. Unless the model was changed meanwhile, a disk or the memory has a fault",
            ) from where
        _name(file, path)
    sync_folder(str(path.parent))
    return written


def compare(
    path: Path,
    outputs: Sequence[Output],
    *,
    metadata: Mapping[str, str],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """The hashes of a file that is what `write` writes, every byte compared with the sources. Raises Differs."""
    ordered, head = _laid_out(outputs, metadata)
    whole, data = hashlib.sha256(head), hashlib.sha256()
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            raise Differs("its header")
        for output in ordered:
            for piece in _cast(output):
                if file.read(len(piece)) != piece:
                    raise Differs(f"tensor {output.name}")
                whole.update(piece)
                data.update(piece)
                advance(len(piece))
        num_bytes = file.tell()
        if file.read(1):
            raise Differs("its length")
    return Written(len(ordered), num_bytes, whole.hexdigest(), data.hexdigest())


def sweep(folder: Path) -> None:
    """Remove the unfinished files of runs that were killed; one that another process holds stays.

    Where the disk has no locks, or a file is somebody else's, nothing tells whether it is still written: it stays.
    """
    for path in sorted(folder.iterdir()):
        if _PART.fullmatch(path.name):
            _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return
        with path.open("r+b") as file:
            if not hold(file.fileno()):
                return
            if os.name == "nt":
                file.close()  # an open file cannot be removed there
            path.unlink()
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return  # held, somebody else's, or finished in between


def _laid_out(outputs: Sequence[Output], metadata: Mapping[str, str]) -> tuple[list[Output], bytes]:
    """The tensors in the order of the file, and all that stands before them."""
    ordered = sorted(outputs, key=lambda output: file_order(output.dtype, output.name))
    return ordered, head_bytes(((o.name, o.dtype, o.shape, o.nbytes) for o in ordered), metadata)


@contextmanager
def _part_beside(path: Path) -> Iterator[BinaryIO]:
    """A new hidden file in the folder of `path`, held by this process; under this name it is gone after the block."""
    with _new_part(path) as file:
        try:
            yield file
        finally:
            if os.name == "nt":
                file.close()  # an open file cannot be removed there
            Path(file.name).unlink(missing_ok=True)


def _new_part(path: Path) -> BinaryIO:
    while True:
        file = path.with_name(f".{path.name}.{secrets.token_hex(4)}.sdlab-part").open("xb")
        try:
            hold(file.fileno())
        except BlockingIOError:  # another process sweeps it away, as it was not held yet
            file.close()
            continue
        if os.fstat(file.fileno()).st_nlink:  # else it was swept away before it was held
            return file
        file.close()


def _name(file: BinaryIO, path: Path) -> None:
    if os.name == "nt":
        file.close()  # an open file cannot be renamed there
    try:
        name_new(os.fspath(file.name), str(path))
    except FileExistsError as reason:  # made by someone else meanwhile
        raise SdlabError(
            "is there already", where=str(path), next_step="Give another --checkpoint-path"
        ) from reason


def _check_space(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise OutOfResources(
            f"{num_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=str(path.parent),
            next_step="Free some space, or give --checkpoint-path on another disk",
        )


def _cast(output: Output) -> Iterator[bytes]:
    """The tensor's bytes in its type, a piece at a time. Raises SdlabError for values that are not finite in it."""
    for source in output.sources:
        if source.dtype == output.dtype and source.dtype not in _types():
            yield from source.pieces()
            continue
        for piece in source.pieces():
            before = _tensor(piece, source.dtype)
            after = before.to(_types()[output.dtype])
            _check_finite(before, after, output)
            yield bytes(_raw(after))


def _types() -> dict[str, Any]:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _tensor(piece: bytes, dtype: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(piece), dtype=_types()[dtype])


def _raw(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _check_finite(before: Tensor, after: Tensor, output: Output) -> None:
    import torch

    if bool(torch.isfinite(after).all()):
        return
    if bool(torch.isfinite(before).all()):
        most = float(before.abs().max())
        raise SdlabError(
            f"holds {most:.3g}, which does not fit {output.dtype}",
            where=f"tensor {output.name}",
            next_step="Use --dtype bf16 or fp32",
        )
    raise SdlabError(
        "holds values that are not finite", where=f"tensor {output.name}", next_step="The model is damaged"
    )
