"""A contact sheet: the pictures of a dataset with their prompts under them."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdlab.dataset.cache import ahead
from sdlab.dataset.picture import Unusable, open_picture
from sdlab.dataset.tree import Refused, Sample
from sdlab.errors import SdlabError

MAX_PICTURES = 400
SUFFIX = ".png"
MARK = "sdlab check"  # in the file's Software field: such a file may be written over

THUMBNAIL_PX = 176
_GAP_PX, _LINE_PX, _LINES = 10, 15, 3
_FONT_PX = 12
# Pillow's own font has Latin letters; these cover other scripts where the system has one of them.
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansJP-Regular.otf",
    "YuGothM.ttc",
    "msgothic.ttc",
    "msyh.ttc",
    "Hiragino Sans GB.ttc",
    "ipaexg.ttf",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_Item = TypeVar("_Item")


class Sheet(NamedTuple):
    """What is on a sheet."""

    num_pictures: int
    refused: list[Refused]  # those that could not be decoded
    missing: str  # characters of the prompts that no font here can draw


def check_target(path: Path, root: str) -> None:
    """Raises SdlabError where no sheet may be written: in the dataset, over another file, not as a .png."""
    if path.suffix.lower() != SUFFIX:
        raise SdlabError(
            f"the sheet is a {SUFFIX} file", where=str(path), next_step=f"Try {path.stem}{SUFFIX}"
        )
    real, dataset = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, dataset]) == dataset:
        raise SdlabError("lies inside the dataset", where=str(path), next_step="Give a path outside of it")
    if os.path.lexists(path) and not _is_sheet(path):
        raise SdlabError(
            "is there already and is not a sheet of ours", where=str(path), next_step="Give another name"
        )
    if not os.path.isdir(os.path.dirname(real)):
        raise SdlabError(
            "no such folder", where=os.path.dirname(real), next_step="Make it, or give another path"
        )


def write_sheet(
    samples: Sequence[Sample],
    path: Path,
    *,
    background: tuple[int, int, int],
    max_pixels: int,
    num_workers: int,
) -> Sheet:
    """Write the sheet of up to MAX_PICTURES pictures, evenly picked.

    Raises SdlabError where the file cannot be written.
    """
    picked = evenly(samples, MAX_PICTURES)

    def opened(sample: Sample) -> Image.Image | str:
        return thumbnail(sample.path, background=background, max_pixels=max_pixels)

    bad: list[Refused] = []

    def tiles() -> Iterator[tuple[Image.Image | None, str]]:
        for sample, image in ahead(opened, picked, num_workers):
            if isinstance(image, str):
                bad.append(Refused(sample.id, image))
                yield None, f"refused: {sample.id}"
            else:
                yield image, sample.prompt

    font, missing = font_for([sample.prompt for sample in picked])
    sheet = labelled(tiles(), num=len(picked), side_px=THUMBNAIL_PX, font=font)
    save_sheet(sheet, path)
    return Sheet(len(picked) - len(bad), bad, missing)


def thumbnail(path: str, *, background: tuple[int, int, int], max_pixels: int) -> Image.Image | str:
    """The picture in at most THUMBNAIL_PX by THUMBNAIL_PX, or the reason why it cannot be decoded."""
    side = (THUMBNAIL_PX, THUMBNAIL_PX)
    try:
        image = open_picture(path, background=background, max_pixels=max_pixels, at_least_px=side)
    except Unusable as reason:
        return str(reason)
    image.thumbnail(side, Image.Resampling.LANCZOS)
    return image


def labelled(
    tiles: Iterable[tuple[Image.Image | None, str]],
    *,
    num: int,
    side_px: int,
    font: Font,
    height_px: int | None = None,
) -> Image.Image:
    """A sheet of about as many rows as columns of `num` pictures, each with its text below; None is a red frame.

    Pictures are at most `side_px` wide, and as high or at most `height_px`.
    """
    columns = max(1, math.ceil(math.sqrt(num)))
    height_px = side_px if height_px is None else height_px
    step_x, step_y = side_px + _GAP_PX, height_px + _GAP_PX + _LINES * _LINE_PX
    sheet = Image.new(
        "RGB", (columns * step_x + _GAP_PX, math.ceil(num / columns) * step_y + _GAP_PX), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(tiles):
        x, y = _GAP_PX + number % columns * step_x, _GAP_PX + number // columns * step_y
        if image is None:
            draw.rectangle((x, y, x + side_px, y + height_px), outline="red")
        else:
            sheet.paste(image, (x + (side_px - image.width) // 2, y + height_px - image.height))
        for row, line in enumerate(fitted(text, font, side_px, _LINES)):
            draw.text((x, y + height_px + 2 + row * _LINE_PX), line, fill="black", font=font)
    return sheet


def evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, with equal distances between them."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def fitted(text: str, font: Font, width_px: int, num_lines: int) -> list[str]:
    """The text broken into lines of at most width_px, the last one ending in … if there is more."""
    text = "".join(c if c.isprintable() else " " for c in text)[:500]
    lines: list[str] = []
    while text and len(lines) < num_lines:
        lengths = range(1, len(text) + 1)
        end = max(
            1, bisect.bisect_right(lengths, width_px, key=lambda num: math.ceil(font.getlength(text[:num])))
        )
        space = text.rfind(" ", 1, end)
        if end < len(text) and text[end] != " " and space > 0:
            end = space
        lines.append(text[:end].strip())
        text = text[end:].lstrip()
    if text and lines:
        last = lines[-1]
        while last and font.getlength(f"{last}…") > width_px:
            last = last[:-1]
        lines[-1] = f"{last}…"
    return lines


def font_for(texts: Sequence[str]) -> tuple[Font, str]:
    """The font of this system that lacks the fewest characters of the texts, and those that it lacks."""
    name, missing = best_font(texts)
    return open_font(name), missing


def open_font(name: str, size_px: int = _FONT_PX) -> Font:
    """The font that `best_font` has named. Raises OSError where this system does not have it."""
    return ImageFont.truetype(name, size_px) if name else ImageFont.load_default(size_px)


def best_font(texts: Sequence[str]) -> tuple[str, str]:
    """The name of the font that lacks the fewest characters of the texts, "" for Pillow's own, and what it lacks."""
    characters = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
    wanted = "".join(sorted(characters))[:3000]
    best, missing = "", _missing(open_font(""), wanted)
    for name in _FONTS:
        if not missing:
            break
        try:
            fewer = _missing(open_font(name), wanted)
        except OSError:
            continue  # this system does not have it
        if len(fewer) < len(missing):
            best, missing = name, fewer
    return best, missing


def _missing(font: Font, characters: str) -> str:
    box = bytes(font.getmask("\U0010fffe"))  # no font has this one: how the font draws what it lacks
    return "".join(c for c in characters if bytes(font.getmask(c)) == box)


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == MARK
    except (OSError, ValueError, SyntaxError):
        return False


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet under its own mark, whole or not at all. Raises SdlabError where that cannot be."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        sheet.save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    except OSError as reason:
        raise SdlabError(f"cannot be written ({reason.strerror or reason})", where=str(path)) from reason
    finally:
        part.unlink(missing_ok=True)
