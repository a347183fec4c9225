"""Files that are whole or absent, never overwrite another, and never collide between processes."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import os
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.dataset.files import read_start
from sdlab.errors import OutOfResources, SdlabError

if TYPE_CHECKING:
    from PIL import Image

GRID_MAX_PX = 4096  # longest side of a contact sheet
LEFT_OVER_S = 3600.0  # writing a picture takes seconds, so an older unfinished file belongs to nobody


def make_folder(folder: Path) -> None:
    """Make the folder and check that a file can be made in it. Raises SdlabError if not.

    Unfinished files that a killed process left there an hour ago or more are removed.
    """
    probe = folder / f".sdlab-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as reason:
        raise SdlabError(
            f"cannot write there ({reason.strerror})", where=str(folder), next_step="Give another --output"
        ) from reason
    for path in folder.glob(".sdlab-*.tmp"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if time.time() - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink()


def numbered(stamp: str, first: int, suffix: str = ".png") -> Iterator[str]:
    """``sd_{stamp}_{first:04d}.png`` and the numbers after it."""
    return (f"sd_{stamp}_{index:04d}{suffix}" for index in itertools.count(first))


def mirrored(stem: str, suffix: str = ".png") -> Iterator[str]:
    """``stem.png``, then ``stem_2.png``, ``stem_3.png`` ..."""
    return itertools.chain([f"{stem}{suffix}"], (f"{stem}_{index}{suffix}" for index in itertools.count(2)))


def planned(pictures: list[Path], count: int, suffix: str = ".png") -> list[list[Path]]:
    """For each of the pictures (paths below a folder) the paths of its `count` results, below another folder.

    ``a.jpg`` gives ``a.png``, ``a_2.png`` ...; where there is an ``a.png`` too, they give ``a_jpg.png`` and
    ``a_png.png``. No two are alike, also not where upper and lower case are one; what exists plays no part.
    """
    same_stem = Counter(_folded(path.with_suffix("")) for path in pictures)
    taken: set[str] = set()

    def free(path: Path, names: Iterator[str]) -> Path:
        for name in names:
            wanted = path.with_name(name)
            if _folded(wanted) not in taken:
                taken.add(_folded(wanted))
                return wanted
        raise AssertionError("names without end")

    stems = [
        p.stem if same_stem[_folded(p.with_suffix(""))] == 1 else f"{p.stem}_{p.suffix[1:]}" for p in pictures
    ]
    first = [free(path, mirrored(stem, suffix)) for path, stem in zip(pictures, stems, strict=True)]
    more = [(one, mirrored(one.stem, suffix)) for one in first]  # only when every picture has its first name
    return [[one, *(free(one, names) for _ in range(count - 1))] for one, names in more]


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", path.as_posix()).casefold()


def is_there(path: Path) -> bool:
    """Whether there is a file of that name, or anything else in its place.

    An empty file counts as none and is removed: a kill can leave it where a file system has no hard links.
    """
    try:
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_size == 0:
            path.unlink()
            return False
        return True
    except OSError:
        return False  # mostly that there is none; what else is wrong, writing the picture will tell


def write_new(folder: Path, names: Iterable[str], data: bytes) -> Path | None:
    """Write the bytes under the first of the names that is free, and return the path; None where none is.

    The file appears under its name only when complete, with the permissions the umask gives; an existing file
    is never replaced, also not by two processes that pick the same name at once. Raises OutOfResources when the
    disk is full or the folder gone, SdlabError when the folder takes no file.
    """
    with _written(folder, data, "a picture") as temporary:
        return next((folder / name for name in names if _place(temporary, folder / name)), None)


def write_over(folder: Path, names: Iterable[str], data: bytes, *, ours: bytes) -> Path | None:
    """As `write_new`, but a file that starts with the bytes `ours` is replaced, all at once."""
    with _written(folder, data, "a report") as temporary:
        for name in names:
            if _starts_with(folder / name, ours):
                os.replace(temporary, folder / name)
                return folder / name
            if _place(temporary, folder / name):
                return folder / name
        return None


def _starts_with(path: Path, ours: bytes) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode) and read_start(str(path), len(ours)) == ours
    except OSError:  # mostly that there is none; placing the file will tell
        return False


@contextlib.contextmanager
def _written(folder: Path, data: bytes, what: str) -> Iterator[Path]:
    """A temporary file in the folder with these bytes, on disk; what is left of it at the end is removed."""
    temporary = folder / f".sdlab-{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as reason:
        said = f"cannot write {what} ({reason.strerror})"
        if not folder.is_dir():
            lost = "Repeat the command: it makes what is missing"
            raise OutOfResources("the output folder is gone", where=str(folder), next_step=lost) from reason
        if reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(said, where=str(folder), next_step="Free some space") from reason
        raise SdlabError(said, where=str(folder)) from reason


def _place(temporary: Path, final: Path) -> bool:
    """Give the finished file its name; False if that is taken."""
    try:
        os.link(temporary, final)
        return True
    except FileExistsError:
        return False
    except OSError:
        pass  # a file system without hard links (exFAT, some shares): reserve the name, then rename over it
    try:
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, final)
    except (
        BaseException
    ):  # passed on; the reserved name must not stay as an empty file, not even after Ctrl-C
        final.unlink()
        raise
    return True


def grid(paths: list[Path]) -> Image.Image:
    """A contact sheet of the pictures in order, near square, scaled down to at most 4096 pixels a side."""
    from PIL import Image

    sizes = []
    for path in paths:
        with Image.open(path) as picture:
            sizes.append(picture.size)
    columns = math.ceil(math.sqrt(len(paths)))
    rows = math.ceil(len(paths) / columns)
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    scale = min(1.0, GRID_MAX_PX / (columns * width), GRID_MAX_PX / (rows * height))
    cell = (max(1, int(width * scale)), max(1, int(height * scale)))
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    for index, path in enumerate(paths):
        with Image.open(path) as picture:
            tile = picture.convert("RGB")
        if scale < 1:
            tile = tile.resize(
                (max(1, int(tile.width * scale)), max(1, int(tile.height * scale))), Image.Resampling.LANCZOS
            )
        left = index % columns * cell[0] + (cell[0] - tile.width) // 2
        top = index // columns * cell[1] + (cell[1] - tile.height) // 2
        sheet.paste(tile, (left, top))
    return sheet


def grid_bytes(paths: list[Path], about: Mapping[str, Any]) -> bytes:
    """The contact sheet as PNG, with what it says about itself as JSON in a text chunk `sdlab`."""
    from PIL.PngImagePlugin import PngInfo

    chunks, buffer = PngInfo(), io.BytesIO()
    chunks.add_itxt("sdlab", json.dumps(about, sort_keys=True))
    grid(paths).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()
