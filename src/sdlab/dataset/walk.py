"""The folders below a root and the files in them, each once, whatever links, pipes and loops lie about.

Ids are paths relative to the root with ``/`` between the segments. No file is opened here.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from sdlab.dataset.files import kind_of, reason_of
from sdlab.errors import SdlabError

JUNK = frozenset({"thumbs.db", "desktop.ini", "@eadir", "__macosx"})  # left by operating systems; lower case
# a.cap.bak, a.cap.bak2 …: captions that `sdlab categorize --captions replace` has put aside
_PUT_ASIDE = re.compile(r".\.cap\.bak\d*\Z", re.DOTALL)


class Refused(NamedTuple):
    """A file, link or unreadable folder that is not used, and why."""

    id: str
    reason: str


class Folder(NamedTuple):
    """A folder of the dataset and the names of the regular files in it, sorted."""

    id: str  # "" for the root
    path: str  # ends with the separator
    names: list[str]

    @property
    def head(self) -> str:
        """What stands before a name to make it an id."""
        return f"{self.id}/" if self.id else ""


class Walk:
    """Walks a root once; `refused`, `skipped` and `num_files` are complete when `folders` has ended."""

    def __init__(self, root: str) -> None:
        self.refused: list[Refused] = []
        self.skipped: list[tuple[str, int]] = []  # folders with ``__`` and how many files they hold
        self.num_files = 0  # everything met that is not a folder, and folders that could not be listed
        self._links: list[tuple[str, str]] = []  # sort key and id of links to folders
        self._seen: dict[tuple[int, int], str] = {}  # which id a folder was entered by
        self._root = os.path.join(root, "")
        self._holders = _folders_above(root)

    def folders(self) -> Iterator[Folder]:
        """Real folders first, then links in order: a folder goes by its own name rather than by a link's.

        Raises SdlabError where the root itself cannot be listed.
        """
        yield from self._below("")
        if self.refused and self.refused[0].id == "":
            raise SdlabError(self.refused[0].reason, where=self._root)
        while self._links:
            self._links.sort(reverse=True)
            yield from self._below(self._links.pop()[1])

    def _below(self, top: str) -> Iterator[Folder]:
        waiting = [top]
        while waiting:
            id = waiting.pop()
            path = os.path.join(self._root, *id.split("/"), "") if id else self._root
            folder = Folder(id, path, [])
            try:
                if self._is_new(id, os.stat(path)):
                    with os.scandir(path) as entries:
                        self._list(folder, entries, waiting)
            except OSError as reason:
                self._refuse(id, f"a folder that cannot be read ({reason_of(reason)})")
            self.num_files += len(folder.names)
            folder.names.sort()
            yield folder

    def _is_new(self, id: str, info: os.stat_result) -> bool:
        identity = (info.st_dev, info.st_ino)
        other = self._seen.setdefault(identity, id)
        if identity in self._holders:
            self._refuse(id, "leads to a folder that holds the whole dataset: a loop")
        elif other != id:
            loop = ": a loop" if f"{id}/".startswith(f"{other}/") or not other else ""
            self._refuse(id, f"leads to {other or 'the top folder'}, which already counts{loop}")
        else:
            return True
        return False

    def _list(self, folder: Folder, entries: Iterator[os.DirEntry[str]], waiting: list[str]) -> None:
        names, head = folder.names, folder.head
        for entry in entries:
            name = entry.name
            lower = name.lower()
            if name[0] == "." or lower in JUNK:
                continue
            if ".cap.bak" in lower and _is_put_aside(entry):
                continue
            if entry.is_file(follow_symlinks=False):
                names.append(name)
            elif not entry.is_dir(follow_symlinks=False):
                self._odd(folder, entry)
            elif name.startswith("__"):
                self.skipped.append((head + name, _count_files(entry.path)))
            else:
                waiting.append(head + name)

    def _odd(self, folder: Folder, entry: os.DirEntry[str]) -> None:
        """A link, or something that is neither file nor folder."""
        id = folder.head + entry.name
        try:
            mode = entry.stat().st_mode
        except OSError as reason:
            itself = reason.errno == errno.ELOOP
            self._refuse(
                id, "a link that leads to itself" if itself else f"a broken link ({reason_of(reason)})"
            )
            return
        if stat.S_ISREG(mode):
            folder.names.append(entry.name)
        elif not stat.S_ISDIR(mode):
            self._refuse(id, f"{kind_of(mode)}, not a regular file")
        elif entry.name.startswith("__"):
            self.skipped.append((id, 0))
        else:
            self._links.append((sort_key(id), id))

    def _refuse(self, id: str, reason: str) -> None:
        self.refused.append(Refused(id, reason))
        self.num_files += 1


def _is_put_aside(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to one, that holds an earlier caption."""
    return _PUT_ASIDE.search(entry.name.lower()) is not None and entry.is_file()


def sort_key(id: str) -> str:
    """Sorts ids by their segments: as NUL, the separator comes before every character of a name."""
    return id.replace("/", "\0")


def _folders_above(root: str) -> frozenset[tuple[int, int]]:
    """Device and inode of every folder that holds the root."""
    found, path = set(), os.path.realpath(root)
    while (parent := os.path.dirname(path)) != path:
        path = parent
        info = os.stat(path)
        found.add((info.st_dev, info.st_ino))
    return frozenset(found)


def _count_files(path: str) -> int:
    """Files below a skipped folder, hidden ones and what cannot be read left out; links are not followed."""
    return sum(not name.startswith(".") for _, _, names in os.walk(path) for name in names)
