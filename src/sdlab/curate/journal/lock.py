"""One process at a time on a folder: the lock is on its journal, and the system drops it with the process."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlab import show
from sdlab.curate.journal.lines import JOURNAL, OURS, Pages, begins, has_plan, load, write_head
from sdlab.curate.places import unwritable
from sdlab.dataset.disk import hold, remove, sync_folder
from sdlab.dataset.files import reason_of
from sdlab.errors import SdlabError


@contextmanager
def locked(folder: Path, *, make: bool = True) -> Iterator[None]:
    """Hold the folder and its journal for this process; both are made if they are not there.

    A journal without a run goes at the end, and with it the folder, if it was made for the journal and is empty.
    With `make=False` (to undo) nothing is made: SdlabError where there is no journal. Raises SdlabError if another
    process holds the folder, or it cannot be written.
    """
    _make(folder) if make else _sweep(folder)
    handle = _take(folder / JOURNAL, make)
    try:
        if not begins(folder / JOURNAL):  # new, or its first line was torn: the folder was there before
            write_head(folder / JOURNAL, folder, made=0)
        yield
    finally:
        _leave(folder, handle)


def _make(folder: Path) -> None:
    """Make the folder and those above it, and the journal that says so, at once: a kill leaves all or a hidden part."""
    missing = _sweep(folder)
    if not missing:
        return
    top, part = missing[-1], _part(missing[-1])
    inner = part / os.path.relpath(missing[0], top)
    try:
        inner.mkdir(parents=True)
        (inner / JOURNAL).touch()
        write_head(inner / JOURNAL, folder, made=len(missing))
        os.rename(part, top)
        for path in (*missing, top.parent):
            sync_folder(str(path))
    except (OSError, SdlabError) as reason:
        _remove_part(part)
        if isinstance(reason, SdlabError):
            raise
        raise unwritable(reason, folder) from reason


def _sweep(folder: Path) -> list[Path]:
    """The folder and those above it that are not there; what a kill left of making or removing them goes."""
    missing = _missing(folder)
    if not missing:
        return []
    try:
        _drop(_part(missing[-1]), missing[-1])
    except OSError as reason:
        if os.path.lexists(_part(missing[-1])):  # else what was in it stands under its name again
            raise SdlabError(
                f"cannot be removed ({reason_of(reason)})",
                where=str(_part(missing[-1])),
                next_step=f"It was {missing[-1]}; move it back there, or away",
            ) from reason
    return _missing(folder)


def _missing(folder: Path) -> list[Path]:
    here = Path(os.path.abspath(folder))
    return [path for path in (here, *here.parents) if not os.path.lexists(path)]


def _unmake(folder: Path, num_made: int) -> None:
    """Remove the journal, and the folders that were made for it as far as nothing else is in them, at once."""
    here = Path(os.path.abspath(folder))
    empty: list[Path] = []
    for path in [here, *here.parents][:num_made]:
        if os.listdir(path) != [empty[-1].name if empty else JOURNAL]:
            break
        empty.append(path)
    if not empty:
        remove(str(here / JOURNAL))
        return
    part = _part(empty[-1])
    os.rename(empty[-1], part)
    _drop(part, empty[-1])


def _drop(part: Path, top: Path) -> None:
    """Remove the folder `part`; where something has come into it, it gets the name `top`. Raises OSError then."""
    try:
        _remove_part(part)
    except OSError:
        if not os.path.lexists(top):
            os.rename(part, top)
        raise


def _remove_part(part: Path) -> None:
    for holder, _, names in os.walk(part, topdown=False):
        if JOURNAL in names:
            remove(os.path.join(holder, JOURNAL))
        os.rmdir(holder)


def _part(top: Path) -> Path:
    name = hashlib.sha256(os.fsencode(top.name)).hexdigest()[:16]
    return top.with_name(f"{OURS}{name}.part")


def _take(path: Path, make: bool) -> int:
    """A handle on the journal that holds the lock."""
    flags = os.O_RDWR | (os.O_CREAT if make else 0)
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    while True:
        try:
            handle = os.open(path, flags, 0o666)
        except (FileNotFoundError, NotADirectoryError) as reason:
            said = "no journal of sdlab here, so there is nothing to undo"
            raise SdlabError(
                said, where=str(path.parent), next_step="Name the folder that was organised"
            ) from reason
        except OSError as reason:
            raise SdlabError(f"cannot be opened ({reason_of(reason)})", where=str(path)) from reason
        try:
            _lock(handle, path)
            if _is_at(handle, path):  # else the process before removed it between our two steps
                return handle
        except BaseException:  # passed on
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise SdlabError("is not a regular file, so not a journal that sdlab wrote", where=str(path))
    try:
        if not hold(handle):
            show.warn(f"{path.parent}: this file system has no locks; start no second sdlab on this folder")
    except BlockingIOError as reason:
        raise SdlabError(
            "another sdlab is at work on this folder", where=str(path.parent), next_step="Wait for it to end"
        ) from reason


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _leave(folder: Path, handle: int) -> None:
    """Let go; remove a journal without runs and the folders made for it, where nothing else is in them."""
    try:
        pages = Pages() if has_plan(folder / JOURNAL) else load(folder)
    except (OSError, SdlabError):  # gone or damaged: it stays, and has been reported
        os.close(handle)
        return
    empty = pages.end > 0 and not pages.sections and _is_at(handle, folder / JOURNAL)
    if os.name == "nt":  # there an open file cannot be removed
        os.close(handle)
    if empty:
        is_here = pages.folder == os.path.abspath(
            folder
        )  # else it was renamed, perhaps into a folder of others
        try:
            _unmake(folder, pages.made if is_here else min(pages.made, 1))
        except OSError as reason:
            show.warn(f"{folder} cannot be removed ({reason_of(reason)})")
    if os.name != "nt":
        os.close(handle)
