"""Which results of `sdlab crop` are in a folder, what they were made of, and whether they are still as they were.

`.sdlab-crop.jsonl` has a line for the settings and one for each picture, written before its results get their
names. Lines are only added; the last one for a picture counts, and one that a kill cut off is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from sdlab.curate.crop.sizes import Cut, Plan
from sdlab.curate.places import unwritable
from sdlab.dataset.disk import hold, name_new
from sdlab.dataset.files import sha256_of
from sdlab.errors import SdlabError

INDEX = ".sdlab-crop.jsonl"
PARTS = ".sdlab-crop.parts"
OTHER_OUTPUT = "give another --output"

State = Literal["absent", "ours", "edited", "stranger"]


class Taken(Exception):
    """A result cannot get its name; the text is the reason."""


@dataclass(frozen=True)
class Mark:
    """A file's content, and by what it is taken for unchanged without being read."""

    size: int
    mtime_ns: int
    ctime_ns: int  # 0 for results: giving them their name changes it
    sha256: str


@dataclass(frozen=True)
class Entry:
    """What was made of one picture."""

    id: str
    settings: str  # digest
    stem: str  # id of the results without suffixes
    inputs: dict[str, Mark]  # by id: the picture, its captions and references
    outputs: dict[str, Mark]  # by id below the folder
    cut: Cut


class Results:
    """The results in `folder`. Nothing is made on disk before the first `put`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}  # by the picture's id
        self.settings: dict[str, object] | None = None  # that the last run was given
        self.images = ""  # the real path of the pictures' folder of the last run
        self._ours: dict[str, set[str]] = defaultdict(set)  # every content a result ever had, by its id
        self._owner: dict[str, str] = {}  # whose result it was last
        self._real = os.path.realpath(folder)
        self._num_parts = 0
        self._index: BinaryIO | None = None
        self._read()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._index is not None:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
            try:
                self._index.close()  # and with it the lock
            except OSError:  # a full disk has no room for a line's rest: told before
                if error is None:
                    raise

    def begin(self, settings: dict[str, object], *, images: str = "") -> None:
        """Make the folder, hold it for this process, remove what a killed run left unfinished, note the settings.

        Raises SdlabError where it cannot be written, or another process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._index = (self.folder / INDEX).open("ab+")
            self._hold(self._index)
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
            (self.folder / PARTS).mkdir()
            self._read()  # what another process has written while this one waited to start
            if (settings, images) != (self.settings, self.images):
                self._append({"settings": settings, "images": images})
                self.settings, self.images = settings, images
        except OSError as reason:
            raise unwritable(reason, self.folder, or_else=OTHER_OUTPUT) from reason

    def _hold(self, index: BinaryIO) -> None:
        try:
            hold(index.fileno())
        except BlockingIOError as reason:
            raise SdlabError(
                "another sdlab is at work on this folder",
                where=str(self.folder),
                next_step="Wait for it to end",
            ) from reason

    def path(self, id: str) -> str:
        """The file of a result."""
        return os.path.join(self.folder, *id.split("/"))

    def state(self, id: str) -> State:
        """Whether a result is there, as it was written. Raises OSError where it cannot be read."""
        path = self.path(id)
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return "absent"
        entry = self.entries.get(self._owner.get(id, ""))
        mark = entry.outputs.get(id) if entry else None
        if mark and (mark.size, mark.mtime_ns) == (info.st_size, info.st_mtime_ns):
            return "ours"
        if id not in self._ours:
            return "stranger"
        if info.st_size == 0:
            return "absent"
        return "ours" if os.path.isfile(path) and sha256_of(path) in self._ours[id] else "edited"

    def put(self, entry: Entry, contents: Mapping[str, bytes]) -> list[str]:
        """Write the results of one picture; those that the user has changed are left, and returned.

        `entry` has no outputs yet. Older results of the picture under other names are removed, if unchanged.
        Raises Taken where a name belongs to a file that is not ours, and OSError.
        """
        states = {id: self._checked(id, data) for id, data in contents.items()}
        parts = {id: self._write_part(data) for id, data in contents.items()}
        outputs = {id: _mark_of_part(part, contents[id]) for id, part in parts.items()}
        older = (
            {id for id, owner in self._owner.items() if owner == entry.id}
            if entry.id in self.entries
            else set()
        )
        self._add(_with_outputs(entry, outputs), write=True)
        for id, part in parts.items():
            self._place(part, id, states[id])
        for id in older - set(outputs):
            if self._owner[id] == entry.id and self.state(id) == "ours":
                os.unlink(self.path(id))
        return [id for id, state in states.items() if state == "edited"]

    def _checked(self, id: str, data: bytes) -> State:
        """The state of a result that is about to be written, its folder made."""
        path = self.path(id)
        parent = os.path.join(self._real, *id.split("/")[:-1])
        if os.path.realpath(parent) != parent:
            raise Taken(f"the folder {parent} is a link that leads elsewhere")
        os.makedirs(parent, exist_ok=True)
        state = self.state(id)
        if state == "stranger":
            if not (os.path.isfile(path) and sha256_of(path) == hashlib.sha256(data).hexdigest()):
                raise Taken(
                    f"{path} is there already and is not ours: move it away, or give another --output"
                )
            return "ours"
        return state

    def _write_part(self, data: bytes) -> str:
        self._num_parts += 1
        part = os.path.join(self.folder, PARTS, f"{self._num_parts}.part")
        with open(part, "wb") as file:
            file.write(data)
        return part

    def _place(self, part: str, id: str, state: State) -> None:
        path = self.path(id)
        if state == "ours":
            os.replace(part, path)
        elif state == "edited":
            os.unlink(part)
        else:
            _place_new(part, path)

    def _read(self) -> None:
        try:
            data = (self.folder / INDEX).read_bytes()
        except FileNotFoundError:
            return
        for line in data.split(b"\n")[:-1]:
            try:
                values = json.loads(line)
                if "id" in values:
                    self._add(_entry(values), write=False)
                else:
                    self.settings, self.images = values["settings"], str(values.get("images", ""))
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill; the results are still there, and are compared when made again

    def _add(self, entry: Entry, *, write: bool) -> None:
        if write:
            values = asdict(entry)
            for key in ("inputs", "outputs"):
                values[key] = {id: list(mark.values()) for id, mark in values[key].items()}
            self._append(values)
        self.entries[entry.id] = entry
        for id, mark in entry.outputs.items():
            self._ours[id].add(mark.sha256)
            self._owner[id] = entry.id

    def _append(self, values: Mapping[str, object]) -> None:
        assert self._index is not None, "begin() comes first"
        end = self._index.seek(0, os.SEEK_END)
        self._index.seek(max(end - 1, 0))
        torn = end > 0 and self._index.read(1) != b"\n"
        self._index.write(b"\n" * torn + json.dumps(values).encode("ascii") + b"\n")
        self._index.flush()


def _entry(values: dict[str, Any]) -> Entry:
    """Back from JSON, where tuples are lists."""
    inputs, outputs = ({id: Mark(*mark) for id, mark in values[key].items()} for key in ("inputs", "outputs"))
    (height, width), (size_px, *flags), (down, across), by = values["cut"]
    cut = Cut((height, width), Plan((size_px[0], size_px[1]), *flags), (down, across), by)
    return Entry(values["id"], values["settings"], values["stem"], inputs, outputs, cut)


def mark_of(path: str, known: Mark | None = None) -> Mark:
    """The mark of a file; it is read only if it is not the `known` one. Raises OSError."""
    info = os.stat(path)
    seen = (info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    if known and (known.size, known.mtime_ns, known.ctime_ns) == seen:
        return known
    return Mark(*seen, sha256_of(path))


def same_content(some: Mapping[str, Mark], others: Mapping[str, Mark]) -> bool:
    """Whether these are the same files by content."""
    return {id: mark.sha256 for id, mark in some.items()} == {id: mark.sha256 for id, mark in others.items()}


def digest_of(settings: Mapping[str, object]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _with_outputs(entry: Entry, outputs: dict[str, Mark]) -> Entry:
    return Entry(entry.id, entry.settings, entry.stem, entry.inputs, outputs, entry.cut)


def _mark_of_part(part: str, data: bytes) -> Mark:
    return Mark(len(data), os.stat(part).st_mtime_ns, 0, hashlib.sha256(data).hexdigest())


def _place_new(part: str, path: str) -> None:
    """Give a finished file a name that is free. Raises Taken where it is not free any more."""
    if os.path.lexists(path) and os.lstat(path).st_size == 0:
        os.unlink(path)  # left by a power cut; see `state`
    try:
        name_new(part, path)
    except FileExistsError as reason:
        raise Taken(f"{path} was made by another program meanwhile") from reason
