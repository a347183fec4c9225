"""What a job has made so far, so that the same command goes on after a kill or a power cut.

It lies beside the pictures as `.sdlab-job-<stamp>.jsonl`, is locked while its process runs, only ever appended to,
and removed when all is made. Its lines: journal_lines.py. The files are only looked at, never opened; whoever puts a
journal of his own into the folder can at most have pictures left out.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sdlab import show
from sdlab.dataset.disk import NEW, hold, look, remove, sync_folder
from sdlab.dataset.files import open_regular
from sdlab.errors import OutOfResources, SdlabError
from sdlab.inference.jobs.journal_lines import (
    ENDED,
    LINE_BYTES,
    Head,
    Noted,
    append,
    head_record,
    read_head,
    read_rest,
)
from sdlab.inference.spec import Format, Shot, Spec

if TYPE_CHECKING:
    from sdlab.inference.load import Source

PREFIX, SUFFIX = ".sdlab-job-", ".jsonl"
NOT_ITS_KIND = ("seed", "restart")  # in a command: what does not make it another job
_OPEN = os.O_RDWR | os.O_APPEND
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _OPEN |= getattr(os, _name, 0)


def key_of(
    shot: Shot,
    spec: Spec,
    loras: Iterable[tuple[Source, float]],
    embeddings: Iterable[Source],
    format: Format,
) -> str:
    """One hash (64 hex) of everything by which a picture differs from others of the same job."""
    about = {
        "shot": dataclasses.asdict(shot),
        "spec": dataclasses.asdict(spec),
        "loras": [[source.name, source.files, weight] for source, weight in loras],
        "embeddings": sorted([source.name, source.files] for source in embeddings),
        "format": dataclasses.asdict(format),
    }
    return _digest(about)


def _digest(about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True, default=str)  # of what is no JSON, as a path, its text
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass
class Journal:
    """An open journal. As a context manager it lets go of its lock at the end, and is left as it is."""

    stamp: str  # the time at which the job began, as it stands in the names of its files
    seed: int
    resumed: bool  # it goes on with what another process began
    path: Path
    _handle: int
    _noted: dict[int, Noted] = field(default_factory=dict)
    has_ended: bool = False  # it came to its end once, and not all of it was good

    @classmethod
    def begin(
        cls, folder: Path, *, command: Mapping[str, Any], seed: int | None, restart: bool, total: int = 0
    ) -> Journal:
        """Go on with the newest unfinished job of the same command in the folder, or begin one.

        `command` is everything that was typed, with the hashes of the model's files. Where no seed is given, a job
        that was stopped gives its own, and a new one draws it. A job that ended with failures is gone on with only
        if its seed is given: else the user wants new pictures, and its journal is removed when the new job begins.
        One whose process still runs is left alone. With `restart` the journals of all earlier jobs of this command
        are removed. Pictures always stay.
        Raises SdlabError where the folder takes no file, OutOfResources where the disk is full.
        """
        digest = _digest({name: value for name, value in command.items() if name not in NOT_ITS_KIND})
        try:
            names = sorted(os.listdir(folder), reverse=True)
            done_with: list[Journal] = []
            for path in (
                folder / name for name in names if name.startswith(PREFIX) and name.endswith(SUFFIX)
            ):
                found = _of_the_job(path, digest, seed)
                if found is None:
                    continue
                if restart or (found.has_ended and seed is None):
                    done_with.append(found)
                    continue
                for other in done_with:
                    other.let_go()
                _tell(found, total)
                return found
            for other in done_with:
                other.close(complete=True)
            return _new(folder, digest, command, seed, total, names)
        except OSError as reason:
            raise _unwritable(reason, folder) from reason

    def made(self, index: int, key: str) -> Path | None:
        """The file of this item, if it was made and is still as it was written."""
        noted = self._noted.get(index)
        if noted is None or noted.key != key:
            return None
        path = self.path.parent / noted.file
        info = look(str(path))
        whole = info is not None and stat.S_ISREG(info.st_mode) and info.st_size == noted.num_bytes
        return path if whole else None

    def is_noted(self, index: int) -> bool:
        """Whether a file was noted for this item, whatever has become of it."""
        return index in self._noted

    @property
    def num_noted(self) -> int:
        """Pictures that were noted, whatever has become of their files."""
        return len(self._noted)

    def note_made(self, index: int, key: str, path: Path) -> None:
        """Note a picture that is on disk; on return the note is, too. Raises OutOfResources on a full disk."""
        noted = Noted(key, path.relative_to(self.path.parent).as_posix(), path.stat().st_size)
        try:
            append(self._handle, {"index": index, **noted.record})
        except OSError as reason:
            raise _unwritable(reason, self.path) from reason
        self._noted[index] = noted

    def close(self, *, complete: bool) -> None:
        """The job came to its end: the journal goes if all of it is made, else it says that it ended."""
        if self._handle < 0:
            return
        try:
            if not complete:
                append(self._handle, ENDED)
            elif os.name == "nt":
                self.let_go()  # an open file cannot be removed there
            if complete:
                sync_folder(str(self.path.parent))  # the pictures' names, before what knows of them goes
                remove(str(self.path))
        except OSError as reason:
            raise _unwritable(reason, self.path) from reason
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Drop the lock; the journal stays as it is, and the next process may go on with it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


def _tell(journal: Journal, total: int) -> None:
    of_all = f" of {total}" if total else ""
    show.note(
        f"going on with the job of {journal.stamp}: {journal.num_noted}{of_all} pictures are made; "
        "--restart begins anew"
    )


def _new(
    folder: Path, digest: str, command: Mapping[str, Any], seed: int | None, total: int, names: list[str]
) -> Journal:
    """A new journal, under a stamp that no picture or journal in the folder has."""
    now = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        stamp = now if number == 1 else f"{now}-{number}"
        number += 1
        if any(name.startswith((f"sd_{stamp}_", f"samples_{stamp}")) for name in names):
            continue
        path = folder / f"{PREFIX}{stamp}{SUFFIX}"
        try:
            handle = os.open(path, NEW | os.O_APPEND, 0o666)
            break
        except FileExistsError:
            continue
    journal = Journal(stamp, secrets.randbelow(2**32) if seed is None else seed, False, path, handle)
    try:
        hold(handle)  # before its first line is there, so that no other process takes it for a stopped one's
        append(handle, head_record(Head(digest, stamp, journal.seed, total), command))
        sync_folder(str(folder))
    except BaseException:  # passed on; half a first line tells nothing
        journal.let_go()
        remove(str(path))
        raise
    return journal


def _of_the_job(path: Path, digest: str, seed: int | None) -> Journal | None:
    """The journal, held for this process, if it is of this command and seed and no process is at it."""
    try:
        with open_regular(str(path)) as file:
            head = read_head(file.readline(LINE_BYTES))
            if head is None or head.digest != digest or (seed is not None and seed != head.seed):
                return None
            journal = Journal(head.stamp, head.seed, True, path, os.open(path, _OPEN))
            try:
                hold(journal._handle)
                if _is_still(file, journal):
                    rest = read_rest(file)
                    os.ftruncate(journal._handle, rest.end)
                    journal._noted, journal.has_ended = rest.noted, rest.has_ended
                    return journal
            except BaseException:  # passed on; only the lock must not stay
                journal.let_go()
                raise
            journal.let_go()  # its process came to its end meanwhile
            return None
    except BlockingIOError:
        show.warn(
            f"the same job is running in {path.parent} already; this one makes all its pictures once more"
        )
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as reason:
        _tell_left_alone(path, reason)
        return None


def _tell_left_alone(path: Path, reason: Exception) -> None:
    if not isinstance(reason, FileNotFoundError):  # one that ended while we looked
        show.warn(f"{path}: not a journal that sdlab can go on with ({reason}), so it is left alone")


def _is_still(file: BinaryIO, journal: Journal) -> bool:
    here = look(str(journal.path))
    return here is not None and all(
        os.path.samestat(here, os.fstat(handle)) for handle in (file.fileno(), journal._handle)
    )


def _unwritable(reason: OSError, where: Path) -> SdlabError:
    said = f"cannot write the journal of the job ({reason.strerror})"
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfResources(said, where=str(where), next_step="Free some space, then repeat the command")
    return SdlabError(said, where=str(where), next_step="Give another --output")
