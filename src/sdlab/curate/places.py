"""Where things go: the folder of the results and the cache, kept apart from the pictures themselves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlab.dataset.files import reason_of
from sdlab.errors import OutOfResources, SdlabError

CACHE = ".sdlab-cache"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OTHER_CACHE = "give --cache-dir DIR"


def output_for(images: Path, asked: Path | None, *, flag: str = "--output-dir", ending: str = "") -> Path:
    """The folder of the results: `asked`, or ``__name`` and `ending` beside the folder ``name`` of pictures.

    `flag` is the option to name. Raises SdlabError where it is no folder, holds the pictures, or lies in the dataset
    that they are.
    """
    inside = os.path.realpath(images)
    if asked is None and os.path.dirname(inside) == inside:
        raise SdlabError("has no folder beside it", where=str(images), next_step=f"Give {flag} DIR")
    beside = _beside(images, ending)
    folder = beside if asked is None else asked
    real, where = os.path.realpath(folder), f"{flag} {folder}"
    other = f"Give another one; without {flag} it is {beside}"
    if real == inside or (os.path.exists(real) and os.path.exists(inside) and os.path.samefile(real, inside)):
        raise SdlabError("is the folder of the pictures itself", where=where, next_step=other)
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if there is not None and not os.path.isdir(there):
        raise SdlabError("is there and is not a folder", where=str(there), next_step=f"Give another {flag}")
    if _holds(real, inside):
        raise SdlabError(f"holds the pictures of {images}", where=where, next_step=other)
    among = images / f"_{ending or '_sorted'}"
    if _holds(inside, real) and not any(
        part.startswith(("__", ".")) for part in os.path.relpath(real, inside).split(os.sep)
    ):
        raise SdlabError(
            "lies among the pictures, which would be found twice",
            where=where,
            next_step=f"Give one outside, or one whose name starts with __, as {among}",
        )
    return folder


def cache_for(images: Path, output: Path | None, asked: Path | None) -> Path:
    """The folder of the cache: `asked`, or `.sdlab-cache` beside the output, else beside the pictures.

    Raises SdlabError where it lies among the pictures, or there is no beside.
    """
    inside = os.path.realpath(images)
    if asked is not None:
        real = os.path.realpath(asked)
        if real == inside or _holds(inside, real):
            raise SdlabError(
                f"lies among the pictures of {images}",
                where=f"--cache-dir {asked}",
                next_step="Give one outside",
            )
        return asked
    if output is not None and not _holds(inside, os.path.realpath(output)):
        return output.parent / CACHE
    beside = os.path.dirname(inside)
    if beside == inside:
        raise SdlabError(
            "has no folder beside it for a cache", where=str(images), next_step=_begun(_OTHER_CACHE)
        )
    return _parent(images) / CACHE


def check_writable(cache: Path) -> None:
    """Make the cache's folder. Raises SdlabError where that or a file in it is refused."""
    try:
        with room_in(cache):
            cache.mkdir(parents=True, exist_ok=True)
            probe = cache / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
    except OSError as reason:
        raise SdlabError(
            f"no cache can be kept here ({reason_of(reason)})",
            where=str(cache),
            next_step=_begun(_OTHER_CACHE),
        ) from reason


@contextmanager
def room_in(cache: Path) -> Iterator[None]:
    """For work that writes nowhere but into the cache: OutOfResources names that where its disk is full."""
    try:
        yield
    except OSError as reason:
        if reason.errno not in NO_SPACE:
            raise
        raise unwritable(reason, cache, or_else=_OTHER_CACHE) from reason


def unwritable(reason: OSError, where: Path, *, or_else: str = "") -> SdlabError:
    """The error to raise where something cannot be brought to disk: OutOfResources on a full one.

    `or_else` is another way on, said in lower case.
    """
    said = f"cannot be written ({reason_of(reason)}); nothing is lost"
    if reason.errno in NO_SPACE:
        other = f", or {or_else}" if or_else else ""
        return OutOfResources(
            said, where=str(where), next_step=f"Free some space, then run the same again{other}"
        )
    return SdlabError(said, where=str(where), next_step=_begun(or_else))


def _begun(words: str) -> str:
    return words[:1].upper() + words[1:]


def _beside(images: Path, ending: str) -> Path:
    name = images.name if images.name not in ("", "..") else os.path.basename(os.path.realpath(images))
    return _parent(images) / f"__{name}{ending}"


def _parent(images: Path) -> Path:
    """The folder that holds it, as the user wrote it where that can be told from the words."""
    if images.name in ("", ".."):
        return Path(os.path.dirname(os.path.realpath(images)))
    return images.parent


def _holds(outer: str, inner: str) -> bool:
    """Whether the real path `inner` lies in the folder `outer`."""
    return inner != outer and inner.startswith(os.path.join(outer, ""))
