"""Files brought to disk and renamed so that no file is ever replaced and a kill leaves a known state."""

from __future__ import annotations

import errno
import hashlib
import os
import stat

from sdlab.dataset.files import open_regular

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def look(path: str) -> os.stat_result | None:
    """What stands under the name, links not followed; None for nothing."""
    try:
        return os.lstat(path)
    except OSError as reason:
        if reason.errno in _ABSENT:
            return None
        raise


def follow(path: str) -> os.stat_result | None:
    """As `look`, through links."""
    try:
        return os.stat(path)
    except OSError as reason:
        if reason.errno in (*_ABSENT, errno.ELOOP):
            return None
        raise


def copy(source: str, part: str) -> str:
    """Bring a copy of a regular file to disk, with its time; the sha256 of what was read. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(source) as reading, os.fdopen(os.open(part, NEW, 0o666), "wb") as writing:
        info = os.fstat(reading.fileno())
        while block := reading.read(1 << 20):
            digest.update(block)
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
    os.utime(part, ns=(info.st_atime_ns, info.st_mtime_ns))
    return digest.hexdigest()


def write(part: str, data: bytes, *, mode: int | None = None) -> None:
    """Bring a new file to disk. Raises OSError."""
    with os.fdopen(os.open(part, NEW, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        if mode is not None:
            os.chmod(part, stat.S_IMODE(mode))
        os.fsync(file.fileno())


def name_new(source: str, target: str, *, marker: str = "") -> None:
    """Rename a file, never over another: FileExistsError then. Raises OSError EXDEV if the disks differ.

    Killed in between, it leaves both names of the one file; where there are no hard links, the old name and an empty
    file under the new. `marker` is a file that stands as long as that can be: `source`, or one made for it.
    """
    if os.name == "nt":
        os.rename(source, target)  # does not replace there
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as reason:
        if isinstance(reason, FileExistsError) or reason.errno == errno.EXDEV:
            raise
        _rename_over_claim(
            source, target, marker or source
        )  # no hard links (exFAT, some shares), or not of a file of others
        return
    try:
        os.unlink(source)
    except OSError:
        take_name_back(source, target)
        raise


def _rename_over_claim(source: str, target: str, marker: str) -> None:
    num_bytes = os.lstat(source).st_size  # FileNotFoundError before anything is claimed
    if marker != source:
        os.close(os.open(marker, NEW, 0o666))
    try:
        os.close(os.open(target, NEW, 0o666))
        try:
            os.replace(source, target)
        except OSError:
            if num_bytes and look(source) is None and os.lstat(target).st_size == 0:
                os.unlink(target)  # the claim; the source has gone elsewhere
            take_name_back(source, target)
            raise
    finally:
        if marker != source:
            remove(marker)


def take_name_back(source: str, target: str) -> None:
    """Remove a name that was given in vain; a network's disk can fail and still have done what was asked."""
    if look(source) is not None:
        os.unlink(target)


def remove(path: str) -> None:
    """Remove a file, if it is there. Raises OSError."""
    try:
        os.unlink(path)
    except OSError as reason:
        if reason.errno not in _ABSENT:
            raise


def sync_folder(path: str) -> None:
    """Bring the names in a folder to disk, where the system can. A folder that is gone has none."""
    if os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        os.fsync(handle)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some shares cannot sync a folder
            raise
    finally:
        os.close(handle)


def hold(handle: int) -> bool:
    """Lock an open file for this process, until it is closed or the process ends. False where there are no locks.

    Raises BlockingIOError if another process has it.
    """
    try:
        _lock_exclusive(handle)
    except OSError as reason:
        if reason.errno in _NO_LOCKS:
            return False
        raise BlockingIOError(*reason.args) from reason
    return True


def _lock_exclusive(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, 1 << 40, os.SEEK_SET)  # far behind the end: a locked byte cannot be read by others
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
