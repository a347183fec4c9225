"""Writes a safetensors file piece by piece, reads it back, and only then gives it its name.

Memory does not grow with the model: a piece is 16 MiB.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.convert.plan import Output
from sdlab.errors import OutOfResources, SdlabError
from sdlab.models.files import Header, file_order, head_bytes, read_header

if TYPE_CHECKING:
    from torch import Tensor

_PART = ".part"


@dataclass(frozen=True)
class Written:
    """A file that has been written, read back and compared."""

    num_tensors: int
    num_bytes: int
    sha256: str  # of the whole file; AutoV2 is its first 10 characters
    data_sha256: str  # of the tensors without the header; AutoV3 is its first 12 characters


def write(
    path: Path,
    outputs: Sequence[Output],
    *,
    metadata: Mapping[str, str],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Write `outputs` to `path`, which must not exist, in safetensors' own order: equal input gives equal bytes.

    `advance` is told how many bytes are done; writing and reading back count alike. Raises SdlabError, and leaves no
    file, where a value does not fit the type or is not finite, or what is read back is not what was written.
    """
    ordered = sorted(outputs, key=lambda output: file_order(output.dtype, output.name))
    head = head_bytes(((o.name, o.dtype, o.shape, o.nbytes) for o in ordered), metadata)
    _check_space(path, len(head) + sum(output.nbytes for output in ordered))
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with part.open("xb") as file:
            file.write(head)
            for output in ordered:
                for piece in _cast(output):
                    file.write(piece)
                    advance(len(piece))
            file.flush()
            os.fsync(file.fileno())
        written = _compared(part, ordered, len(head), advance)
        if path.exists():  # made by someone else meanwhile
            raise SdlabError("is there already", where=str(path), next_step="Give another --checkpoint-path")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return written


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


def _compared(
    part: Path, ordered: Sequence[Output], head_bytes: int, advance: Callable[[int], None]
) -> Written:
    """Read the file back, compare every tensor with its source, and hash it."""
    header: Header = read_header(part)
    whole, data = hashlib.sha256(), hashlib.sha256()
    with part.open("rb") as file:
        whole.update(file.read(head_bytes))
        for output in ordered:
            stored = header.tensors[output.name]
            assert (stored.dtype, stored.shape, stored.offset) == (output.dtype, output.shape, file.tell())
            for piece in _cast(output):
                back = file.read(len(piece))
                if back != piece:
                    raise SdlabError(
                        f"tensor {output.name} does not read back as it was written",
                        where=str(part.parent),
                        next_step="The disk may be failing; nothing was kept",
                    )
                whole.update(back)
                data.update(back)
                advance(len(back))
        num_bytes = file.tell()
    return Written(len(ordered), num_bytes, whole.hexdigest(), data.hexdigest())
