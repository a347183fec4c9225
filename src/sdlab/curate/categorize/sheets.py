"""Contact sheets: what went into each folder, with the caption below each picture."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sdlab.curate.journal.run import Operation
from sdlab.curate.names import Names
from sdlab.dataset.cache import ahead, write_whole
from sdlab.dataset.sheet import THUMBNAIL_PX, evenly, font_for, labelled, thumbnail

FOLDER = "__sheets"  # training skips it
MAX_PICTURES = 100
_TOP = "_top"  # the sheet of pictures that lie in no folder
_QUALITY = 88  # a sheet of a hundred photographs then takes about half a megabyte


class Tile(NamedTuple):
    """A picture on a sheet."""

    path: str
    text: str


@dataclass(frozen=True)
class Look:
    """How pictures are opened."""

    background: tuple[int, int, int]
    max_pixels: int
    num_workers: int


def name_of(folder: Sequence[str]) -> str:
    """The stem of a folder's sheet: ``fish__red`` for fish/red."""
    return "__".join(folder) or _TOP


def write_sheets(
    tiles: Mapping[tuple[str, ...], Sequence[Tile]],
    *,
    names: Names,
    drawn_in: Path,
    look: Look,
    advance: Callable[[float], None],
    stop: Callable[[], bool],
) -> list[Operation]:
    """A sheet for each folder of up to MAX_PICTURES, evenly picked, as operations that bring it to FOLDER.

    The sheets are drawn into `drawn_in` and moved from there: the journal then holds their hashes rather than
    their pixels. Ends early, with fewer operations, once `stop` says so.
    """
    operations: list[Operation] = []
    done = 0
    for folder in sorted(tiles):
        if stop():
            break
        data = _drawn(tiles[folder], look)
        digest = hashlib.sha256(data).hexdigest()
        stem = names.stem(FOLDER, name_of(folder))
        drawn = drawn_in / f"{digest[:32]}-{len(operations)}.jpg"  # two folders may hold the same
        write_whole(drawn, data)
        operations.append(Operation("move", f"{FOLDER}/{stem}.jpg", os.path.abspath(drawn), digest))
        done += len(tiles[folder])
        advance(done)
    return operations


def _drawn(tiles: Sequence[Tile], look: Look) -> bytes:
    """The sheet as a JPEG; a red frame stands for a picture that cannot be opened any more."""
    picked = evenly(tiles, MAX_PICTURES)

    def opened(tile: Tile) -> Image.Image | str:
        return thumbnail(tile.path, background=look.background, max_pixels=look.max_pixels)

    pairs = (
        (None, image) if isinstance(image, str) else (image, tile.text)
        for tile, image in ahead(opened, picked, look.num_workers)
    )
    font, _ = font_for([tile.text for tile in picked])
    sheet = labelled(pairs, num=len(picked), side_px=THUMBNAIL_PX, font=font)
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()
