"""Opening what a stranger put into a folder: only regular files, never waiting for one that is not."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import BinaryIO

# O_NONBLOCK: the open of a pipe nobody writes to would wait for ever. O_BINARY: Windows would change bytes.
_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


class NotRegular(OSError):
    """What stands under the name is a folder, pipe, socket or device."""


def open_regular(path: str) -> BinaryIO:
    """The file opened for reading bytes. Raises NotRegular, or OSError with the system's reason."""
    _refuse_special(os.stat(path).st_mode)  # opening a device can already do something, so look first
    descriptor = os.open(path, _FLAGS)
    try:
        _refuse_special(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:  # passed on; only the descriptor must not leak
        os.close(descriptor)
        raise


def read_start(path: str, length: int) -> bytes:
    """At most `length` bytes from the start of a file that was listed as a regular one. Raises OSError.

    Half the time of open_regular, which counts where a hundred thousand captions are read.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        info = os.fstat(descriptor)
        _refuse_special(info.st_mode)
        length = min(length, info.st_size)
        data = os.read(descriptor, length)
        while len(data) < length and (more := os.read(descriptor, length - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def kind_of(mode: int) -> str:
    """What a user calls the kind of file that `st_mode` tells of."""
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "not a regular file"


def reason_of(error: OSError) -> str:
    """The system's words for why a file could not be read, without the path."""
    return error.strerror or str(error) or type(error).__name__


def sha256_of(path: str) -> str:
    """The sha256 of a regular file's bytes in hex. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegular(f"{kind_of(mode)}, not a regular file")
