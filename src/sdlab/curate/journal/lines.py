"""What stands in a journal: plans of file operations, one JSON object a line, only ever appended to or cut.

    {"is": "journal", "version": 1, "folder": "/data/__raw", "made": 1}     made: levels of folders, for undo
    {"is": "run", "token": "9f…", "at": "2025-…", "by": "0.1.0", "settings": {…}, "made": ["cat", …]}
    {"is": "operation", "kind": "copy", "path": "cat/a.png", "source": "/data/raw/a.png", …}
    {"is": "planned", "sha256": "…", "seal": "…"}     of the lines from "run" on, and that by the user's key (seal.py);
                                                   only after this line is on disk is a file touched
    {"is": "finished", "faults": {"3": "…"}}      operations that were not done, by number
    {"is": "undoing"}
    {"is": "undone", "left": [2, 3]}              operations that could not be taken back

What follows the last whole line or plan was being written when the power went or the process was killed; nothing
had been done by it, and the next write cuts it off. Anything else that is not as above is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from sdlab import __version__
from sdlab.curate.places import unwritable
from sdlab.dataset.disk import sync_folder
from sdlab.dataset.files import reason_of
from sdlab.errors import SdlabError

JOURNAL = ".sdlab-journal.jsonl"
OURS = ".sdlab-"  # names that start like this are the journal and files that are not complete yet
KINDS = ("copy", "link", "move", "write", "rewrite")
_PLANNED = b'{"is":"planned",'
WRONG = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)  # what reading a stranger's line raises


class Operation(NamedTuple):
    """One file to be made below the folder, or with `rewrite` one to be changed."""

    kind: str  # one of KINDS
    path: str  # where, relative to the folder, "/" between segments
    source: str = ""  # absolute path (copy, link, move)
    sha256: str = ""  # of the content that will stand there (copy, link, move)
    data: bytes = b""  # write, rewrite: the bytes
    old: bytes = b""  # rewrite: the bytes before


class Entry(NamedTuple):
    """An operation in a plan, with the size and time of its source (rewrite: of the file) when it was planned."""

    operation: Operation
    size_bytes: int = 0
    mtime_ns: int = 0
    part: str = ""  # name of its temporary file, beside the file that it becomes


@dataclass(frozen=True)
class Section:
    """A run as it stands in the journal."""

    settings: dict[str, Any]
    made: tuple[str, ...]  # folders that were not there before, relative
    entries: tuple[Entry, ...]
    start: int  # where in the file it begins
    state: str = ""  # "" being planned, planned, finished, undoing, undone
    numbers: tuple[int, ...] = ()  # of the entries in the plan
    digest: str = ""  # of the plan's lines
    seal: str = ""  # of the digest; whose it is, only the key tells


@dataclass(frozen=True)
class Pages:
    """A journal that has been read. `end` is where its whole lines and plans end."""

    sections: tuple[Section, ...] = ()
    end: int = 0
    folder: str = ""  # where it was made
    made: int = 0  # the folder and how many above it were made for it


def load(folder: Path) -> Pages:
    """The folder's journal; empty Pages where there is none. Raises SdlabError if it is damaged or a stranger's."""
    path = folder / JOURNAL
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise SdlabError("is not a regular file, so not a journal that sdlab wrote", where=str(path))
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Pages()
    except OSError as reason:
        raise SdlabError(f"cannot be read ({reason_of(reason)})", where=str(path)) from reason
    reader = _Reader(os.path.abspath(folder))
    lines = data.split(b"\n")[:-1]  # what stands after the last line's end is torn
    for number, line in enumerate(lines, start=1):
        try:
            reader.take(line)
        except WRONG as reason:
            raise SdlabError(
                f"line {number} is not what sdlab wrote ({type(reason).__name__}: {reason})",
                where=str(path),
                next_step="Nothing was touched. Bring back the journal from a backup, or move it away to do without",
            ) from reason
    return reader.pages


class _Reader:
    """Reads a journal line by line. Raises one of WRONG at a damaged one."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._open: Section | None = None  # a plan whose end has not been read
        self._entries: list[Entry] = []
        self._token = ""
        self._offset = 0
        self.pages = Pages()

    def take(self, line: bytes) -> None:
        start, self._offset = self._offset, self._offset + len(line) + 1
        record = json.loads(line)
        kind = record["is"]
        if start == 0 or kind == "journal":
            _check(start == 0 and kind == "journal" and record["version"] == 1, "no head of a journal")
            self.pages = Pages((), self._offset, str(record["folder"]), _integer(record["made"]))
        elif kind in ("run", "operation", "planned"):
            self._plan(kind, record, line, start)
        else:
            self._mark(kind, record)

    def _plan(self, kind: str, record: dict[str, Any], line: bytes, start: int) -> None:
        if kind == "run":
            _check(self._open is None, "a plan without its end")
            self._token = _token(record["token"])
            made = tuple(safe(path) for path in record["made"])
            self._open = Section(dict(record["settings"]), made, (), start)
            self._entries, self._digest = [], hashlib.sha256()
        section = self._open
        if section is None:
            raise ValueError("outside of a plan")
        if kind == "operation":
            self._entries.append(_entry(record, self._folder, self._token, len(self._entries)))
        if kind == "planned":
            _check(record["sha256"] == self._digest.hexdigest(), "the plan has been changed")
            numbers = tuple(range(len(self._entries)))
            whole = replace(
                section, entries=tuple(self._entries), state="planned", numbers=numbers,
                digest=record["sha256"], seal=_text(record.get("seal", "")),
            )  # fmt: skip
            self.pages = replace(self.pages, sections=(*self.pages.sections, whole), end=self._offset)
            self._open = None
        self._digest.update(line + b"\n")

    def _mark(self, kind: str, record: dict[str, Any]) -> None:
        _check(self._open is None and bool(self.pages.sections), "outside of a run")
        last = self.pages.sections[-1]
        if kind == "finished":
            _check(last.state == "planned", "finished twice")
            last = _only(last, set(last.numbers) - {int(number) for number in record["faults"]})
        elif kind == "undone":
            last = _only(last, {_integer(number) for number in record["left"]})
        else:
            _check(kind == "undoing", f"unknown kind {kind!r}")
        last = replace(last, state=kind)
        self.pages = replace(self.pages, sections=(*self.pages.sections[:-1], last), end=self._offset)


def _only(section: Section, numbers: set[int]) -> Section:
    kept = [(n, entry) for n, entry in zip(section.numbers, section.entries, strict=True) if n in numbers]
    return replace(section, numbers=tuple(n for n, _ in kept), entries=tuple(entry for _, entry in kept))


def new_token() -> str:
    """A name for a run that no other has."""
    return secrets.token_hex(8)


def part_name(token: str, number: int) -> str:
    """Name of the temporary file of operation `number`: hidden, and this run's alone."""
    return f"{OURS}{token}-{number}.part"


def write_head(path: Path, folder: Path, *, made: int) -> None:
    """Begin the folder's journal in the file `path`. Raises SdlabError where it cannot be written."""
    _write(path, 0, [{"is": "journal", "version": 1, "folder": os.path.abspath(folder), "made": made}])


def begins(path: Path) -> bool:
    """True if the journal's first line is whole. Raises OSError."""
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def has_plan(path: Path) -> bool:
    """True if a whole plan stands in the journal: quicker than to read it. Raises OSError."""
    with path.open("rb") as file:
        return any(line.startswith(_PLANNED) and line.endswith(b"\n") for line in file)


def write_plan(
    folder: Path, pages: Pages, entries: Sequence[Entry], *, token: str, settings: Mapping[str, Any],
    made: Sequence[str], seal: Callable[[str], str],
) -> Pages:  # fmt: skip
    """Append a whole plan and bring it to disk: the journal with it. On return, and not before, operations may begin.

    `seal` says what is written beside the digest. Raises OutOfResources on a full disk and SdlabError where the
    journal cannot be written; it is then as before.
    """
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    head = {"is": "run", "token": token, "at": at, "by": __version__, "settings": settings, "made": made}
    root = os.path.abspath(folder)
    lines = [_line(head), *(_line(_record(entry, root)) for entry in entries)]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    sealed = seal(digest)
    end = _write(
        folder / JOURNAL, pages.end, [{"is": "planned", "sha256": digest, "seal": sealed}], before=lines
    )
    try:
        sync_folder(root)  # the journal may be new
    except OSError as reason:
        raise unwritable(reason, folder) from reason
    section = Section(
        dict(settings), tuple(made), tuple(entries), pages.end, "planned", tuple(range(len(entries))),
        digest, sealed,
    )  # fmt: skip
    return replace(pages, sections=(*pages.sections, section), end=end)


def write_mark(folder: Path, pages: Pages, record: Mapping[str, Any]) -> int:
    """Append one line about the last run and bring it to disk; where the journal then ends. Raises as `write_plan`."""
    return _write(folder / JOURNAL, pages.end, [record])


def cut(folder: Path, end: int) -> None:
    """Cut the journal at `end`, on disk. Raises as `write_plan`."""
    try:
        with (folder / JOURNAL).open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    except OSError as reason:
        raise unwritable(reason, folder / JOURNAL) from reason


def _write(path: Path, at: int, records: Sequence[Mapping[str, Any]], before: Sequence[bytes] = ()) -> int:
    data = b"".join([*before, *map(_line, records)])
    try:
        with path.open("r+b", buffering=0) as file:
            file.truncate(at)
            file.seek(at)
            try:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            except BaseException:  # passed on; half a plan takes room on a disk that may be full
                file.truncate(at)
                raise
    except OSError as reason:
        raise unwritable(reason, path) from reason
    return at + len(data)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _line(record: Mapping[str, Any]) -> bytes:
    return (
        json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"
    )  # bytes that are no UTF-8: \udcff


def _record(entry: Entry, root: str) -> dict[str, Any]:
    operation = entry.operation
    record: dict[str, Any] = {"is": "operation", "kind": operation.kind, "path": operation.path}
    if operation.source.startswith(os.path.join(root, "")):  # stays true when the folder is renamed
        record["within"] = os.path.relpath(operation.source, root).replace(os.sep, "/")
    elif operation.source:
        record["source"] = operation.source
    if operation.sha256:
        record["sha256"] = operation.sha256
    for name, data in (("data", operation.data), ("old", operation.old)):
        if data:
            record[name] = base64.b64encode(data).decode()
    return {**record, "size": entry.size_bytes, "mtime": entry.mtime_ns}


def _entry(record: dict[str, Any], root: str, token: str, number: int) -> Entry:
    kind, source = record["kind"], record.get("source", "")
    _check(kind in KINDS, f"unknown kind {kind!r}")
    if "within" in record:
        source = os.path.join(root, *safe(record["within"]).split("/"))
    if kind in ("copy", "link", "move"):
        _check(os.path.isabs(source) and "\0" not in source, "the source is no absolute path")
    data, old = (base64.b64decode(record.get(name, ""), validate=True) for name in ("data", "old"))
    operation = Operation(kind, safe(record["path"]), source, str(record.get("sha256", "")), data, old)
    return Entry(operation, _integer(record["size"]), _integer(record["mtime"]), part_name(token, number))


def safe(path: str) -> str:
    """The path, if it is relative, stays below its folder and is none of the journal's own. Raises ValueError."""
    segments = path.split("/")
    foreign = ("\\", ":") if os.name == "nt" else ()
    _check(
        all(s not in ("", ".", "..") and "\0" not in s and not any(c in s for c in foreign) for s in segments)
        and not segments[-1].startswith(OURS),
        f"{path!r} is no path below the folder",
    )
    return path


def _token(text: str) -> str:
    _check(len(text) == 16 and set(text) <= set("0123456789abcdef"), "no token of a run")
    return text


def _text(value: object) -> str:
    _check(isinstance(value, str), "no text")
    return str(value)


def _integer(value: object) -> int:
    _check(type(value) is int and abs(value) < 1 << 63, "no number of a usual size")
    return int(str(value))


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
