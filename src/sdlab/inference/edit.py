"""Pictures to start from: finding them, and the size they are made in."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError
from sdlab.inference.spec import Init, Reference

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_PX, LARGEST_PX = 32, 4096  # sides of a picture
LOOKED_AT_PX, LONGEST_SHAPE = 64, 8  # FLUX.2 looks at nothing smaller, and at no picture longer than 8:1
BACKGROUND, MAX_PIXELS = "white", 64_000_000  # where nothing else was said
OWN_SIZE_FROM, OWN_SIZE_TO = 1 / 4, 9 / 4  # of the model's area: outside, the picture is scaled to that area


@dataclass(frozen=True)
class Wanted:
    """The size asked for; None for what was not said."""

    width: int | None
    height: int | None
    image_size: int | None


def pictures_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Every picture file in the folder and below, sorted by relative path, and what could not be listed.

    Folders starting with ``_`` or ``__`` count like any other; hidden files and folders do not. A folder
    reached twice over links is walked once. Raises SdlabError where there is nothing.
    """
    from sdlab.dataset.picture import SUFFIXES
    from sdlab.dataset.walk import JUNK

    found: list[Path] = []
    failed: list[str] = []
    seen: set[str] = set()

    def note(reason: OSError) -> None:
        failed.append(f"{reason.filename}: a folder that cannot be read ({reason.strerror})")

    for top, folders, files in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in JUNK)
        found += [Path(top, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in SUFFIXES]
    if not found and not failed:
        raise SdlabError(
            "no pictures in it", where=str(folder), next_step="Give a picture or a folder of pictures"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts), failed


def size_for(width: int, height: int, wanted: Wanted, *, model_size: int, grid: int) -> tuple[int, int]:
    """(width, height) in which to make an edit of a width x height picture, multiples of `grid`.

    What was asked for wins; a side left out follows the picture's shape. Otherwise the picture's own size,
    cut to a multiple of `grid`; scaled to the model's area (`model_size` squared) where it is less than a
    quarter of it or more than nine quarters, far from what the model has learnt. Raises SdlabError for a
    picture so narrow that a side would leave 32 to 4096.
    """
    if wanted.width and wanted.height:
        return wanted.width, wanted.height
    if wanted.width or wanted.height:
        scale = wanted.width / width if wanted.width else (wanted.height or 0) / height
        sides = (wanted.width or _near(width * scale, grid), wanted.height or _near(height * scale, grid))
        return _sane(sides, width, height)
    area = (wanted.image_size or model_size) ** 2
    share = width * height / area
    if wanted.image_size is None and OWN_SIZE_FROM <= share <= OWN_SIZE_TO:
        return _sane((width // grid * grid, height // grid * grid), width, height)
    scale = 1 / math.sqrt(share)
    return _sane((_near(width * scale, grid), _near(height * scale, grid)), width, height)


def _near(side: float, grid: int) -> int:
    return max(grid, round(side / grid) * grid)


def _sane(sides: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    if min(sides) < SMALLEST_PX or max(sides) > LARGEST_PX:
        raise SdlabError(
            f"{width}x{height} would be made in {sides[0]}x{sides[1]}, outside {SMALLEST_PX} to {LARGEST_PX}",
            next_step="Give --width and --height; the picture is cut to that shape",
        )
    return sides


def size_to_look_at(width: int, height: int, *, model_size: int, grid: int) -> tuple[int, int]:
    """(width, height) in which a width x height picture is looked at: its own, or scaled to the model's area."""
    return lookable(*size_for(width, height, Wanted(None, None, None), model_size=model_size, grid=grid))


def lookable(width: int, height: int) -> tuple[int, int]:
    """The size given. Raises SdlabError where FLUX.2 does not look at pictures of it."""
    if min(width, height) < LOOKED_AT_PX or max(width, height) > LONGEST_SHAPE * min(width, height):
        raise SdlabError(
            f"{width}x{height} cannot be looked at: sides are {LOOKED_AT_PX} or more, and at most "
            f"{LONGEST_SHAPE} to 1",
            next_step="Give --width and --height, or cut the picture",
        )
    return width, height


def pictured(path: Path, *, background: str, max_pixels: int) -> tuple[Init, Image.Image]:
    """What a recipe says of the picture, and the picture. Raises SdlabError for one that cannot be used."""
    picture = opened(path, background=background, max_pixels=max_pixels)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Init(path, digest, background, max_pixels), picture


def mask_for(picture: Image.Image, path: Path, *, max_pixels: int) -> tuple[Init, Image.Image]:
    """A mask in the picture's size, white (painted, in any bright colour) is made anew, the rest black.

    Raises SdlabError for one of another shape, or without anything white.
    """
    from PIL import Image, ImageChops

    init, mask = pictured(path, background="black", max_pixels=max_pixels)
    if abs(mask.width * picture.height - mask.height * picture.width) > 0.01 * mask.width * picture.height:
        raise SdlabError(
            f"is {mask.width}x{mask.height}, the picture {picture.width}x{picture.height}",
            where=f"--mask {path}",
            next_step="Draw the mask on a copy of the picture",
        )
    red, green, blue = mask.resize(picture.size, Image.Resampling.BILINEAR).split()
    painted = ImageChops.lighter(ImageChops.lighter(red, green), blue).point([0] * 128 + [255] * 128)
    if painted.getbbox() is None:
        raise SdlabError(
            "is black everywhere, so nothing would be made anew",
            where=f"--mask {path}",
            next_step="Paint white what is to change",
        )
    return init, painted


def looked_at(path: Path, *, model_size: int, grid: int) -> tuple[Reference, Image.Image]:
    """A picture given with --ref, in the size in which it is looked at. Raises SdlabError, naming it."""
    init, picture = pictured(path, background=BACKGROUND, max_pixels=MAX_PIXELS)
    try:
        width, height = size_to_look_at(*picture.size, model_size=model_size, grid=grid)
    except SdlabError as reason:
        raise SdlabError(reason.what, where=f"--ref {path}", next_step="Cut it") from reason
    return Reference(init, width, height), prepared(picture, width=width, height=height, grid=grid)


def opened_as(init: Init, width: int, height: int, *, grid: int) -> Image.Image:
    """The picture in that size, as it was when the recipe was written."""
    picture = opened(init.path, background=init.background, max_pixels=init.max_pixels)
    return prepared(picture, width=width, height=height, grid=grid)


def opened(path: Path, *, background: str, max_pixels: int) -> Image.Image:
    """The picture as seen, in RGB. Raises SdlabError if it cannot be used or `background` is no colour."""
    from sdlab.dataset.colour import colour_of
    from sdlab.dataset.picture import Unusable, open_picture

    try:
        return open_picture(str(path), background=colour_of(background), max_pixels=max_pixels)
    except Unusable as reason:
        raise SdlabError(str(reason), where=str(path)) from reason


def prepared(picture: Image.Image, *, width: int, height: int, grid: int) -> Image.Image:
    """The RGB picture in the given size, without distortion.

    Cut from its middle where less than `grid` pixels a side are too many, else scaled to cover it, then cut.
    """
    from sdlab.dataset.picture import cover

    left, top = picture.width - width, picture.height - height
    if 0 <= left < grid and 0 <= top < grid:
        return picture.crop((left // 2, top // 2, left // 2 + width, top // 2 + height))
    return cover(picture, (height, width))


def refuse_overlap(source: Path, output: Path) -> None:
    """Raises SdlabError where the folder of pictures and the output are one, or one lies in the other."""
    source, output = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if source == output:
        what = "the output is the folder of pictures itself"
    elif source in output.parents:
        what = f"the output lies inside the folder of pictures {source}"
    elif output in source.parents:
        what = f"the folder of pictures {source} lies inside the output"
    else:
        return
    raise SdlabError(what, where=str(output), next_step="Give another --output")
