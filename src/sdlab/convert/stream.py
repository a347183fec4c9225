"""Writes a safetensors file piece by piece, reads it back, and only then gives it its name.

Memory does not grow with the model: a piece is 1 MiB. Until it has its name the file is a hidden one beside it, locked
for as long as the process lives: what a killed one left is known by that, and removed at the next run.

Each byte of the model is read twice: to be hashed and written, and to be compared with what stands in the file. The
hashes are the slowest part (1.8 GB/s), so each runs on a thread of its own.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from sdlab.convert.cast import MOST_BYTES, Piece, again, fill, is_cast, one_thread, pieces
from sdlab.convert.hashing import Sha256
from sdlab.convert.plan import Output
from sdlab.dataset.disk import hold, name_new, sync_folder
from sdlab.errors import OutOfResources, SdlabError, Stopped
from sdlab.models.files import file_order, head_bytes, read_header

SOURCE_HASH = "sdlab.source_sha256"
ANOTHER_DISK = "Free some space, or give --checkpoint-path on another disk"
_PART = re.compile(r"\..+\.(safetensors|ckpt)\.[0-9a-f]{8}\.sdlab-part", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Written:
    """A file that is what it should be: read whole and compared with its sources."""

    num_tensors: int
    num_bytes: int
    sha256: str  # of the whole file; AutoV2 is its first 10 characters
    data_sha256: str  # of the tensors without the header; AutoV3 is its first 12 characters; "" for a .ckpt


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

    The header holds `metadata` and SOURCE_HASH: the SHA-256 of the sources' bytes one after the other in the order of
    the file, before any cast. `advance` is told how many bytes are done; writing and reading back count alike. Raises
    SdlabError, and leaves no file, where a value does not fit the type or is not finite, or what is read back is not
    what the sources hold.
    """
    ordered = _in_file_order(outputs)
    start = len(_head(ordered, metadata, "0" * 64))
    check_space(path.parent, start + sum(output.nbytes for output in ordered))
    with part_beside(path) as file, one_thread(ordered):
        file.seek(start)
        source, data = _fill(file, ordered, advance)
        head = _head(ordered, metadata, source)
        file.seek(0)
        file.write(head)
        whole = _sync_and_read_back(file, ordered, head, advance)
        name(file, path)
    sync_folder(str(path.parent))
    return Written(len(ordered), start + sum(output.nbytes for output in ordered), whole, data)


def compare(
    path: Path,
    outputs: Sequence[Output],
    *,
    metadata: Mapping[str, str],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """The hashes of a file that is what `write` writes, every byte compared with the sources. Raises Differs."""
    ordered = _in_file_order(outputs)
    head = _head(ordered, metadata, read_header(path).metadata.get(SOURCE_HASH, ""))
    with one_thread(ordered), Sha256(head) as whole, Sha256() as data, Sha256() as source:
        for piece in _read_back(path, ordered, head):
            whole.update(piece.data)
            data.update(piece.data)
            source.update(piece.raw)
            advance(len(piece.data))
        if _head(ordered, metadata, source.hexdigest()) != head:
            raise Differs("the hash of its source")
        return Written(len(ordered), path.stat().st_size, whole.hexdigest(), data.hexdigest())


def source_hash(outputs: Sequence[Output]) -> str:
    """What `write` puts under SOURCE_HASH."""
    ordered = _in_file_order(outputs)
    with one_thread(ordered), Sha256() as digest:
        for piece in pieces(ordered):
            digest.update(piece.raw)
        return digest.hexdigest()


def _in_file_order(outputs: Sequence[Output]) -> list[Output]:
    return sorted(outputs, key=lambda output: file_order(output.dtype, output.name))


def _head(ordered: Sequence[Output], metadata: Mapping[str, str], source: str) -> bytes:
    """All that stands before the tensors; its length does not depend on the hash."""
    rows = ((o.name, o.dtype, o.shape, o.nbytes) for o in ordered)
    return head_bytes(rows, {**metadata, SOURCE_HASH: source})


def _fill(file: BinaryIO, ordered: Sequence[Output], advance: Callable[[int], None]) -> tuple[str, str]:
    """Write all tensors. The hashes of the sources and of what was written; they are one where nothing was cast."""
    casts = any(is_cast(output) for output in ordered)
    with Sha256() as source, Sha256() as data:
        for piece in pieces(ordered):
            source.update(piece.raw)
            if casts:
                data.update(piece.data)
            file.write(piece.data)
            advance(len(piece.data))
        return source.hexdigest(), (data if casts else source).hexdigest()


def _sync_and_read_back(
    file: BinaryIO, ordered: Sequence[Output], head: bytes, advance: Callable[[int], None]
) -> str:
    """Bring the file to disk while it is read back; the hash of the whole. Raises SdlabError where it differs."""
    file.flush()
    with ThreadPoolExecutor(1) as syncing, Sha256(head) as whole:
        synced = syncing.submit(os.fsync, file.fileno())
        try:
            for piece in _read_back(Path(file.name), ordered, head):
                whole.update(piece.data)
                advance(len(piece.data))
        except Differs as where:
            raise unlike_source(Path(file.name).parent, where) from where
        synced.result()
        return whole.hexdigest()


def _read_back(path: Path, ordered: Sequence[Output], head: bytes) -> Iterator[Piece]:
    """All pieces, each compared with the file before it is handed out. Raises Differs."""
    memory = read_memory()
    with path.open("rb", buffering=0) as file:
        if path.stat().st_size != len(head) + sum(output.nbytes for output in ordered):
            raise Differs("its length")
        if file.read(len(head)) != head:
            raise Differs("its header")
        for piece in again(ordered):
            check_same(file, piece, memory)
            yield piece


def read_memory() -> bytearray:
    """Memory for check_same."""
    return bytearray(MOST_BYTES)


def check_same(file: BinaryIO, piece: Piece, memory: bytearray) -> None:
    """Read what stands next in an unbuffered file and compare it with `piece`. Raises Differs."""
    num_bytes = len(piece.data)
    fill(file, memoryview(memory)[:num_bytes])
    if memory[:num_bytes] != piece.data:  # a bytearray: memoryviews are compared 20 times slower
        raise Differs(f"tensor {piece.output.name}")


def unlike_source(folder: Path, where: Differs) -> SdlabError:
    """The error for a file that reads back otherwise than its source."""
    return SdlabError(
        f"what was written differs from the model in {where} when both are read again",
        where=str(folder),
        next_step="Nothing was kept. Unless the model was changed meanwhile, a disk or the memory has a fault",
    )


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


@contextmanager
def part_beside(path: Path) -> Iterator[BinaryIO]:
    """A new hidden file in the folder of `path`, held by this process; under this name it is gone after the block.

    So it is after Ctrl-C, SIGTERM and SIGHUP, and where the disk is full: SdlabError then.
    """
    with _stopped_by_signals(), _disk_faults(path.parent), _new_part(path) as file:
        try:
            yield file
        finally:
            if os.name == "nt":
                file.close()  # an open file cannot be removed there
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, which end a process on the spot, raise Stopped inside the block."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum, "stopped; no file was kept")

    numbers = [getattr(signal, word) for word in ("SIGTERM", "SIGHUP") if hasattr(signal, word)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # signals are for the main thread to handle
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        if reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources("no space left", where=str(folder), next_step=ANOTHER_DISK) from reason
        if reason.errno == errno.EFBIG:
            raise SdlabError(
                "this disk cannot hold a file of that size",
                where=str(folder),
                next_step="Give --checkpoint-path on a disk that is not FAT32, or --half",
            ) from reason
        if reason.errno == errno.EIO:
            raise SdlabError("a disk has a fault (input/output error)", where=str(folder)) from reason
        if reason.errno == errno.ENAMETOOLONG:
            raise SdlabError(
                "the new name is too long for this disk; until it is finished it has up to 40 letters more",
                where=str(folder),
                next_step="Give a shorter --checkpoint-path",
            ) from reason
        raise


def _new_part(path: Path) -> BinaryIO:
    while True:
        file = path.with_name(f".{path.name}.{secrets.token_hex(4)}.sdlab-part").open("xb")
        try:
            hold(file.fileno())
        except BlockingIOError:  # another process sweeps it away, as it was not held yet
            file.close()
            continue
        file.seek(0)  # a lock on Windows moves the place
        if os.fstat(file.fileno()).st_nlink:  # else it was swept away before it was held
            return file
        file.close()


def name(file: BinaryIO, path: Path) -> None:
    """Give a part its name. Raises SdlabError if something stands there, or the part is gone."""
    if os.name == "nt":
        file.close()  # an open file cannot be renamed there; from here on another process may sweep it away
    try:
        name_new(os.fspath(file.name), str(path))
    except FileExistsError as reason:  # made by someone else meanwhile
        raise SdlabError(
            "is there already", where=str(path), next_step="Give another --checkpoint-path"
        ) from reason
    except FileNotFoundError as reason:
        raise SdlabError(
            "the finished file, or its folder, was removed before it had its name",
            where=str(path),
            next_step="Start again, with no other conversion into this folder",
        ) from reason


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OutOfResources, which says both figures, if the disk of `folder` has less space."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutOfResources(
            f"{num_bytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free",
            where=str(folder),
            next_step=ANOTHER_DISK,
        )
