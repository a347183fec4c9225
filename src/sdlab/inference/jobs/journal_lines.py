"""The lines of a job's journal: written, and read from a file that may be anybody's. No heavy imports.

    {"is": "sdlab job", "version": 1, "digest": "9f…", "stamp": "20251123-150001", "seed": 7, "total": 20, "command": …}
    {"index": 0, "key": "51…", "file": "sd_20251123-150001_0000.png", "bytes": 20113}    this picture is on disk
    {"ended": true}                                       the job came to its end, and not all of it is good

What follows the last whole line was being written when the power went.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from sdlab.inference.spec import MAX_SEED

IS, VERSION = "sdlab job", 1
LINE_BYTES, FILE_BYTES = 1 << 20, 1 << 30  # a picture takes 200 bytes, so a million pictures a fifth of this
WORD_LETTERS = 200  # of each part of the command that is kept for people; the digest is of all of it
ENDED = {"ended": True}


@dataclass(frozen=True)
class Noted:
    """A picture that is on disk."""

    key: str
    file: str  # relative to the journal's folder, "/" between segments
    num_bytes: int

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in its line, but for the index."""
        return {"key": self.key, "file": self.file, "bytes": self.num_bytes}


@dataclass(frozen=True)
class Head:
    """The first line: which job this is."""

    digest: str
    stamp: str
    seed: int
    total: int


@dataclass(frozen=True)
class Rest:
    """All lines after the first."""

    noted: dict[int, Noted]  # by the picture's index
    has_ended: bool
    end: int  # where in the file the last whole line ends


def head_record(head: Head, command: Mapping[str, Any]) -> dict[str, Any]:
    """The first line; the command is there for people to read, and cut short."""
    words = {name: _short(value) for name, value in command.items()}
    return {
        "is": IS,
        "version": VERSION,
        "digest": head.digest,
        "stamp": head.stamp,
        "seed": head.seed,
        "total": head.total,
        "command": words,
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= WORD_LETTERS else f"{text[:WORD_LETTERS]}…"


def append(handle: int, record: Mapping[str, Any]) -> None:
    """Add a line and bring it to disk. Raises OSError."""
    view = memoryview(json.dumps(record).encode("ascii") + b"\n")
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


def read_head(line: bytes) -> Head | None:
    """The first line; None while it is being written. Raises ValueError for what sdlab did not write."""
    if not line.endswith(b"\n"):
        if len(line) >= LINE_BYTES:
            raise ValueError("its first line has no end")
        return None
    record = json.loads(line)
    if record["is"] != IS or record["version"] != VERSION:
        raise ValueError("another program's, or of another version")
    stamp = record["stamp"]
    if not (isinstance(stamp, str) and 0 < len(stamp) < 40 and set(stamp) <= set("0123456789-")):
        raise ValueError("no time stamp")
    return Head(str(record["digest"]), stamp, _count(record["seed"], MAX_SEED), _count(record["total"]))


def read_rest(file: BinaryIO) -> Rest:
    """The lines from where the file is now. Raises ValueError, KeyError or TypeError for a damaged one."""
    if os.fstat(file.fileno()).st_size > FILE_BYTES:
        raise ValueError("far too large")
    noted: dict[int, Noted] = {}
    has_ended, end = False, file.tell()
    while (line := file.readline(LINE_BYTES)).endswith(b"\n"):
        record = json.loads(line)
        if "ended" in record:
            has_ended = True
        else:
            one = Noted(str(record["key"]), _below(record["file"]), _count(record["bytes"]))
            noted[_count(record["index"])] = one
        end += len(line)
    if len(line) >= LINE_BYTES:
        raise ValueError("a line without an end")
    return Rest(noted, has_ended, end)


def _count(value: Any, most: int = 1 << 40) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:50]!r} where a number should stand")
    return value


def _below(text: Any) -> str:
    """A path below the folder, as it was noted. Raises ValueError for any other."""
    path = PurePosixPath(text)
    foreign = ("\\", ":") if os.name == "nt" else ()
    if path.is_absolute() or ".." in path.parts or "\0" in text or any(c in text for c in foreign):
        raise ValueError(f"{str(text)[:50]!r} is no path below the folder")
    return str(text)
