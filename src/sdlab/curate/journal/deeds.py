"""One operation of a journal: made ready, put in its place, recognised after a kill, taken back.

A file is written under a temporary name in the folder it will stand in and is on disk before it gets its name. A
name is never given where one stands, but where a caption is rewritten that still reads as planned. What can be seen
on disk is enough to tell how far an operation got:

    temporary file          being made: removed
    nothing                 not done
    both names, one file    a move between its two halves (the new name given, the old one not yet removed)
    an empty file, and      a name reserved on a file system without hard links, not yet filled: removed
    a temporary file
    the planned content     done
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sdlab.curate.journal.lines import Entry
from sdlab.dataset.disk import copy, follow, look, name_new, remove, sync_folder, take_name_back, write
from sdlab.dataset.files import kind_of, open_regular, sha256_of

CHANGED = "changed since it was looked at"
OCCUPIED = "something else stands there"
OTHER_DISK = "on another disk, where a hard link cannot reach: use --mode copy"


class Fault(Exception):
    """Why an operation is not done."""


class Left(Exception):
    """Why an operation is not taken back; `kept` if that can change, so that the journal still needs it."""

    def __init__(self, reason: str, *, kept: bool = False) -> None:
        super().__init__(reason)
        self.kept = kept


class Tree:
    """The folder that a journal belongs to. Nothing but the sources of moves is touched outside of it."""

    def __init__(self, folder: Path) -> None:
        self.root = os.path.abspath(folder)
        self._real = os.path.join(os.path.realpath(folder), "")
        self._inside: dict[str, bool] = {}

    def target(self, entry: Entry) -> str:
        """Where the operation's file stands."""
        return self.at(entry.operation.path)

    def at(self, path: str) -> str:
        """A path of the journal as one of the system. Raises Fault if a link makes it lead out of the folder."""
        target = os.path.join(self.root, *path.split("/"))
        parent = os.path.dirname(target)
        if parent not in self._inside:
            self._inside[parent] = os.path.join(os.path.realpath(parent), "").startswith(self._real)
        if not self._inside[parent]:
            raise Fault("a link leads out of the folder")
        return target


def survey(tree: Tree, entry: Entry) -> Entry:
    """The entry with its size and time filled in. Raises Fault or OSError if it cannot be done."""
    operation, target = entry.operation, tree.target(entry)
    if operation.kind == "write":
        return entry._replace(size_bytes=len(operation.data))
    if operation.kind == "rewrite":
        info = os.lstat(target)
    elif operation.kind == "move":
        info = os.lstat(operation.source)
    else:
        info = os.stat(operation.source)
    if not stat.S_ISREG(info.st_mode):
        raise Fault("a link, not the file itself" if stat.S_ISLNK(info.st_mode) else kind_of(info.st_mode))
    return entry._replace(size_bytes=info.st_size, mtime_ns=info.st_mtime_ns)


def stage(tree: Tree, entry: Entry) -> None:
    """Bring the bytes to disk under the temporary name. Raises Fault if the source has changed, and OSError."""
    operation, target = entry.operation, tree.target(entry)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    part = _part(target, entry)
    if operation.kind == "copy":
        if copy(operation.source, part) != operation.sha256:
            raise Fault(CHANGED)
    elif operation.kind == "write":
        write(part, operation.data)
    elif operation.kind == "rewrite":
        write(part, operation.data, mode=os.stat(target).st_mode)


def place(tree: Tree, entry: Entry) -> None:
    """Give the staged file its name, or link or move. Raises Fault where that is taken, and OSError."""
    operation, target = entry.operation, tree.target(entry)
    try:
        if operation.kind == "link":
            _link(os.path.realpath(operation.source), target)
        elif operation.kind == "move":
            if not _is_as_planned(look(operation.source), entry):
                raise Fault(CHANGED)
            _move(operation.source, target, entry)
        elif operation.kind == "rewrite":
            if not _reads(target, operation.old):
                raise Fault(CHANGED)
            os.replace(_part(target, entry), target)
        else:
            name_new(_part(target, entry), target)
    except FileExistsError as reason:
        raise Fault(OCCUPIED) from reason


def settle(tree: Tree, entry: Entry) -> bool:
    """True if the operation has been done, by a process that may have been killed in it; its last half is done here.

    Raises Fault if something else stands in its place, and OSError.
    """
    operation, target = entry.operation, tree.target(entry)
    _recover(tree, entry)
    here = look(target)
    if operation.kind == "rewrite":
        return _reads(target, operation.data)
    if here is None:
        return False
    if operation.kind == "move":
        return _settle_move(target, here, entry)
    good = _reads(target, operation.data) if operation.kind == "write" else _is_made_of(target, here, entry)
    if not good:
        raise Fault(OCCUPIED)
    return True


def stands(tree: Tree, entry: Entry) -> bool:
    """True if the operation's file is there though an error came: the journal still needs the operation then."""
    operation, target = entry.operation, tree.target(entry)
    here = look(target)
    if operation.kind in ("write", "rewrite"):
        return _reads(target, operation.data)
    return here is not None and _is_made_of(target, here, entry)


def sweep(tree: Tree, entry: Entry) -> None:
    """Remove the operation's temporary files."""
    for path in _places(tree, entry):
        remove(_part(path, entry))


def _recover(tree: Tree, entry: Entry) -> None:
    """Remove what a killed process left of temporary files, and the name that one of them was to get."""
    for path in _places(tree, entry):
        if look(_part(path, entry)) is None:
            continue
        here = look(path)
        if here and stat.S_ISREG(here.st_mode) and here.st_size == 0 and entry.size_bytes > 0:
            os.unlink(path)
        remove(_part(path, entry))


def _places(tree: Tree, entry: Entry) -> tuple[str, ...]:
    """Where the operation gives names: a move also when it is taken back."""
    target = tree.target(entry)
    return (target, entry.operation.source) if entry.operation.kind == "move" else (target,)


def take_back(tree: Tree, entry: Entry) -> str | None:
    """Undo the operation: a remark where what is back is not as it was, else ""; None if there was nothing to undo.

    Raises Left and OSError.
    """
    target = tree.target(entry)
    _recover(tree, entry)
    here = look(target)
    if entry.operation.kind == "rewrite":
        return _restore(target, here, entry)
    if here is None and entry.operation.kind != "move":
        return None
    if here and not stat.S_ISREG(here.st_mode):
        raise Left(OCCUPIED, kept=entry.operation.kind == "move")
    if entry.operation.kind == "move":
        return _move_back(target, here, entry)
    assert here is not None
    _discard(target, here, entry)
    return ""


def _discard(target: str, here: os.stat_result, entry: Entry) -> None:
    """Remove a file that the operation made, if its content stands elsewhere too."""
    operation = entry.operation
    if operation.kind == "write":
        if not _reads(target, operation.data):
            raise Left("changed since")
    elif not _is_name_of(target, here, entry):
        if not _holds(target, entry):
            raise Left("changed since")
        if not _still_has_it(here, entry):
            raise Left(f"the only one left: {operation.source} is gone or has changed")
    os.unlink(target)


def _move_back(target: str, here: os.stat_result | None, entry: Entry) -> str | None:
    source = entry.operation.source
    there = look(source)
    if here is None:
        if there is None:
            raise Left("is neither here nor at its old place", kept=True)
        return None
    if there and (_are_one(here, there) or _hold_the_same(target, source)):
        os.unlink(target)
        return ""
    if there:
        raise Left(f"its old place {source} holds something else", kept=True)
    as_planned = _is_as_planned(here, entry) or _holds(target, entry)
    os.makedirs(os.path.dirname(source), exist_ok=True)
    _move(target, source, entry)
    return "" if as_planned else "changed since; moved back as it is now"


def _restore(target: str, here: os.stat_result | None, entry: Entry) -> str | None:
    """Bring back the bytes that a rewrite replaced; None if they are there."""
    operation = entry.operation
    if here and _reads(target, operation.old):
        return None
    if here and not _reads(target, operation.data):
        raise Left("changed since; the journal keeps what it held before", kept=True)
    part = _part(target, entry)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    write(part, operation.old, mode=here.st_mode if here else None)
    os.utime(part, ns=(entry.mtime_ns, entry.mtime_ns))
    if here:
        os.replace(part, target)
    else:
        name_new(part, target)
    return ""


def _settle_move(target: str, here: os.stat_result, entry: Entry) -> bool:
    source = entry.operation.source
    there = look(source)
    if there and _are_one(here, there):
        os.unlink(source)
    elif _is_as_planned(there, entry) and _hold_the_same(target, source):  # copied to another disk
        sync_folder(os.path.dirname(target))
        os.unlink(source)
    elif not _is_as_planned(here, entry) and not _holds(target, entry):
        raise Fault(OCCUPIED)
    return True  # what may stand at the old place has come there later


def _still_has_it(here: os.stat_result, entry: Entry) -> bool:
    """True if the source has the planned content, and is no link to what was made of it (to save room)."""
    there = follow(entry.operation.source)
    if there is None or os.path.samestat(here, there) or not stat.S_ISREG(there.st_mode):
        return False
    # not by size and time alone: an edit can keep both, and what is removed here may be the last of its content
    return there.st_size == entry.size_bytes and sha256_of(entry.operation.source) == entry.operation.sha256


def _is_made_of(target: str, here: os.stat_result, entry: Entry) -> bool:
    """True if a copy, link or move has the planned content, or is the source itself."""
    return _is_name_of(target, here, entry) or _holds(target, entry)


def _is_name_of(target: str, here: os.stat_result, entry: Entry) -> bool:
    """True if the source is another name of the file here; a link that someone put there is none."""
    source = entry.operation.source
    if entry.operation.kind == "link":
        source = os.path.realpath(source)  # what was linked
    return os.path.realpath(source) != os.path.realpath(target) and _are_one(here, look(source))


def _are_one(here: os.stat_result, there: os.stat_result | None) -> bool:
    """True if both are names of one file, so that one can go; on one name in two spellings the count is 1."""
    return there is not None and os.path.samestat(here, there) and here.st_nlink > 1


def _hold_the_same(target: str, source: str) -> bool:
    infos = (look(target), look(source))
    if not all(info and stat.S_ISREG(info.st_mode) for info in infos):
        return False
    return os.path.getsize(target) == os.path.getsize(source) and sha256_of(target) == sha256_of(source)


def _is_as_planned(info: os.stat_result | None, entry: Entry) -> bool:
    """True for a file with the size and time that the source had when it was planned."""
    about = (entry.size_bytes, entry.mtime_ns)
    return info is not None and stat.S_ISREG(info.st_mode) and (info.st_size, info.st_mtime_ns) == about


def _holds(path: str, entry: Entry) -> bool:
    """True if a regular file, no link, has the planned content."""
    info = look(path)
    if info is None or not stat.S_ISREG(info.st_mode) or info.st_size != entry.size_bytes:
        return False
    return sha256_of(path) == entry.operation.sha256


def _reads(path: str, data: bytes) -> bool:
    info = look(path)
    if info is None or not stat.S_ISREG(info.st_mode) or info.st_size != len(data):
        return False
    with open_regular(path) as file:
        return file.read(len(data) + 1) == data


def _part(target: str, entry: Entry) -> str:
    return os.path.join(os.path.dirname(target), entry.part)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as reason:
        if reason.errno == errno.EXDEV:
            raise Fault(OTHER_DISK) from reason
        if reason.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise Fault("cannot have a hard link here: use --mode copy") from reason
        raise


def _move(source: str, target: str, entry: Entry) -> None:
    """Give a file another name, on another disk through a copy that is read while it is made."""
    part = _part(target, entry)
    try:
        name_new(source, target, marker=part)
        return
    except OSError as reason:
        if reason.errno != errno.EXDEV:
            raise
    info = os.lstat(source)
    digest = copy(source, part)
    os.chmod(part, stat.S_IMODE(info.st_mode))
    if sha256_of(part) != digest:
        raise Fault("its copy on the other disk does not read back")
    name_new(part, target)
    sync_folder(os.path.dirname(target))
    now = os.lstat(source)
    if (now.st_size, now.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
        os.unlink(target)
        raise Fault("changed while it was moved")
    try:
        os.unlink(source)
    except OSError:  # a folder that cannot be written
        take_name_back(source, target)
        raise
