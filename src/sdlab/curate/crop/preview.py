"""A sheet that shows what `sdlab crop` keeps of each picture: the box, and what is lost dimmed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from sdlab.curate.crop.run import Outcome
from sdlab.dataset.cache import ahead
from sdlab.dataset.sheet import MAX_PICTURES, THUMBNAIL_PX, evenly, font_for, labelled, save_sheet, thumbnail

_FRAME = (255, 60, 0)
_DIMMED = 0.35


def write_preview(
    outcomes: Sequence[Outcome],
    path: Path,
    *,
    background: tuple[int, int, int],
    max_pixels: int,
    num_workers: int,
) -> int:
    """Write the sheet of up to MAX_PICTURES pictures, evenly picked; how many are on it.

    Raises SdlabError where the file cannot be written.
    """
    picked = evenly([one for one in outcomes if one.cut], MAX_PICTURES)

    def opened(one: Outcome) -> Image.Image | str:
        return thumbnail(one.task.sample.path, background=background, max_pixels=max_pixels)

    def tiles() -> Iterator[tuple[Image.Image | None, str]]:
        for one, image in ahead(opened, picked, num_workers):
            yield (None if isinstance(image, str) else framed(image, one)), _text(one)

    font, _ = font_for([one.task.sample.id for one in picked])
    save_sheet(labelled(tiles(), num=len(picked), side_px=THUMBNAIL_PX, font=font), path)
    return len(picked)


def framed(image: Image.Image, one: Outcome) -> Image.Image:
    """The picture with what is lost dimmed, and a frame around what is kept."""
    assert one.cut
    left, top, right, bottom = one.cut.box()
    x, y = (min(round(start * side), side - 1) for start, side in ((left, image.width), (top, image.height)))
    box = (x, y, max(x + 1, round(right * image.width)), max(y + 1, round(bottom * image.height)))
    shown = ImageEnhance.Brightness(image).enhance(_DIMMED)
    shown.paste(image.crop(box), box[:2])
    ImageDraw.Draw(shown).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_FRAME, width=2)
    return shown


def _text(one: Outcome) -> str:
    assert one.cut
    height, width = one.cut.plan.size_px
    note = ", small" if one.cut.plan.own_scale else ", enlarged" if one.cut.plan.enlarged else ""
    return f"{width}x{height}{note} {one.task.sample.id}"
