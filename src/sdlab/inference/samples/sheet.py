"""Labelled contact sheets: what is on one, how large it is, and its bytes. No model library is loaded here.

A sheet is a function of its `Sheet`, its `Look` and the pictures' files: the same ones give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from sdlab.dataset.cache import write_whole
from sdlab.dataset.sheet import Font, best_font, fitted, open_font
from sdlab.errors import SdlabError

MARK = "sdlab samples"  # in the file's Software field: such a file may be written over
MAX_PX = 2 * (1024**3 // 4 // 3)  # Pillow opens no larger picture: 179 megapixels
MAX_SIDE_PX = 65_535  # as many programs read
MAX_CELLS = 10_000
_GREY, _RED, _FRAME = "#6b6b6b", "#c8102e", "#d8d8d8"
_TITLE_LINES, _COLUMN_LINES = 3, 4


@dataclass(frozen=True)
class Cell:
    """A picture's place: its file, or why there is none."""

    file: str  # relative to the folder of the sheet
    fault: str = ""


@dataclass(frozen=True)
class Sheet:
    """What is on one sheet; `cells` has a row for each label of `rows`."""

    file: str
    title: str  # what sets this sheet apart
    common: str  # what all its pictures share
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Look:
    """Size of a picture on the sheet, (width, height), and the font: one of dataset.sheet's, "" for Pillow's own."""

    cell_px: tuple[int, int]
    font: str

    @property
    def text_px(self) -> int:
        """Height of the letters: readable when the whole sheet is looked at."""
        return max(13, min(40, round(min(self.cell_px) * 0.07)))


def look_for(sheets: Sequence[Sheet], cell_px: tuple[int, int]) -> tuple[Look, str]:
    """The look with the font that lacks the fewest characters of the labels, and those that it lacks."""
    texts = [text for sheet in sheets for text in (sheet.title, sheet.common, *sheet.columns, *sheet.rows)]
    name, missing = best_font(texts)
    return Look(cell_px, name), missing


def scaled(size_px: tuple[int, int], side_px: int | None) -> tuple[int, int]:
    """The size that fits in a square of `side_px`, never larger than it was; as it is for None."""
    if side_px is None or max(size_px) <= side_px:
        return size_px
    width, height = size_px
    return max(1, round(width * side_px / max(size_px))), max(1, round(height * side_px / max(size_px)))


def check_size(num_columns: int, num_rows: int, num_sheets: int, cell_px: tuple[int, int]) -> None:
    """Raises SdlabError where the pictures alone are more than a sheet may hold."""
    num_cells = num_columns * num_rows * num_sheets
    what = f"{num_columns} columns and {num_rows} rows"
    if num_cells > MAX_CELLS:
        what += f" on {num_sheets} sheets" if num_sheets > 1 else ""
        raise _too_large(f"{what} are {num_cells:,} pictures, more than {MAX_CELLS:,}", "Give fewer values")
    _check_px((num_columns * cell_px[0], num_rows * cell_px[1]), what, cell_px)


def _check_px(size_px: tuple[int, int], what: str, cell_px: tuple[int, int]) -> None:
    width, height = size_px
    if width * height <= MAX_PX and max(size_px) <= MAX_SIDE_PX:
        return
    shrunk = min((MAX_PX / (width * height)) ** 0.5, MAX_SIDE_PX / max(size_px)) * 0.9
    side = max(n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n <= max(16, max(cell_px) * shrunk))
    limit = f"{MAX_PX // 10**6} megapixels" if width * height > MAX_PX else f"{MAX_SIDE_PX:,} pixels a side"
    raise _too_large(
        f"{what} of {cell_px[0]}x{cell_px[1]} make a sheet of {width}x{height}, more than {limit}",
        f"Give --cell {side} (smaller on the sheet, whole in their own files), or fewer values",
    )


def _too_large(what: str, next_step: str) -> SdlabError:
    return SdlabError(what, where="--grid", next_step=next_step)


class Layout:
    """Where everything is on a sheet, in pixels."""

    def __init__(self, sheet: Sheet, look: Look) -> None:
        width, height = look.cell_px
        self.font: Font = open_font(look.font, look.text_px)
        self.small: Font = open_font(look.font, max(11, round(look.text_px * 0.85)))
        self.line = round(look.text_px * 1.35)
        self.gap = max(4, round(min(look.cell_px) * 0.02))
        self.margin = 2 * self.gap
        self.columns = [fitted(text, self.font, width, _COLUMN_LINES) for text in sheet.columns]
        self.rows = self._row_labels(sheet, look)
        label_px = max((self.font.getlength(line) for lines in self.rows for line in lines), default=0)
        self.left = self.margin + (round(label_px) + 2 * self.gap if label_px else 0)
        self.width = self.left + len(sheet.columns) * (width + self.gap) - self.gap + self.margin
        room = self.width - 2 * self.margin
        self.title = fitted(sheet.title, self.font, room, _TITLE_LINES) if sheet.title else []
        self.common = fitted(sheet.common, self.small, room, _TITLE_LINES) if sheet.common else []
        num_lines = len(self.title) + len(self.common)
        head = self.margin + num_lines * self.line + (self.gap if num_lines else 0)
        self.labels_top = head
        num_column_lines = max((len(lines) for lines in self.columns), default=0)
        self.labels_px = num_column_lines * self.line
        self.top = head + self.labels_px + (self.gap if num_column_lines else 0)
        self.height = self.top + len(sheet.rows) * (height + self.gap) - self.gap + self.margin

    def _row_labels(self, sheet: Sheet, look: Look) -> list[list[str]]:
        """In a column about as wide as a picture, or wider if a label would not fit beside its picture."""
        width, height = look.cell_px
        num_lines = max(1, height // self.line)
        wide = max(8 * look.text_px, min(round(0.8 * width), 14 * look.text_px))
        return [fitted(text, self.font, wide, num_lines) for text in sheet.rows]

    def at(self, row: int, column: int, cell_px: tuple[int, int]) -> tuple[int, int]:
        """The left upper corner of a cell."""
        return (
            self.left + column * (cell_px[0] + self.gap),
            self.top + row * (cell_px[1] + self.gap),
        )


def check_sheets(sheets: Sequence[Sheet], look: Look) -> None:
    """Raises SdlabError where a sheet, labels and all, is larger than it may be."""
    for sheet in sheets:
        layout = Layout(sheet, look)
        what = f"{len(sheet.columns)} columns and {len(sheet.rows)} rows"
        _check_px((layout.width, layout.height), what, look.cell_px)


def drawn(sheet: Sheet, look: Look, folder: Path) -> Image.Image:
    """The sheet; a picture that failed or cannot be read is a red frame with the reason, a missing one a grey one."""
    layout = Layout(sheet, look)
    image = Image.new("RGB", (layout.width, layout.height), "white")
    draw = ImageDraw.Draw(image)
    y = layout.margin
    for lines, font, colour in (
        (layout.title, layout.font, "black"),
        (layout.common, layout.small, _GREY),
    ):
        for line in lines:
            draw.text((layout.margin, y), line, fill=colour, font=font)
            y += layout.line
    _draw_labels(draw, layout, look)
    for row, cells in enumerate(sheet.cells):
        for column, cell in enumerate(cells):
            _draw_cell(image, cell, layout.at(row, column, look.cell_px), look, layout, folder)
    return image


def _draw_labels(draw: ImageDraw.ImageDraw, layout: Layout, look: Look) -> None:
    width, height = look.cell_px
    for column, lines in enumerate(layout.columns):
        x, _ = layout.at(0, column, look.cell_px)
        y = layout.labels_top + layout.labels_px - len(lines) * layout.line
        for number, line in enumerate(lines):
            place = (x + (width - round(layout.font.getlength(line))) // 2, y + number * layout.line)
            draw.text(place, line, fill="black", font=layout.font)
    for row, lines in enumerate(layout.rows):
        _, y = layout.at(row, 0, look.cell_px)
        y += max(0, (height - len(lines) * layout.line) // 2)
        for number, line in enumerate(lines):
            draw.text((layout.margin, y + number * layout.line), line, fill="black", font=layout.font)


def _draw_cell(
    image: Image.Image, cell: Cell, at: tuple[int, int], look: Look, layout: Layout, folder: Path
) -> None:
    x, y = at
    width, height = look.cell_px
    picture = cell.fault or _picture(folder / cell.file, look.cell_px)
    draw = ImageDraw.Draw(image)
    if isinstance(picture, Image.Image):
        left, top = x + (width - picture.width) // 2, y + (height - picture.height) // 2
        around = (left - 1, top - 1, left + picture.width, top + picture.height)
        draw.rectangle(around, outline=_FRAME)  # or a white picture would have no edge
        image.paste(picture, (left, top))
        return
    colour, line_px = (_RED, max(2, layout.gap // 2)) if picture else (_FRAME, 1)
    draw.rectangle((x, y, x + width - 1, y + height - 1), outline=colour, width=line_px)
    room = max(1, width - 4 * line_px - 4)
    step = round(layout.line * 0.85)
    lines = fitted(picture or "not made", layout.small, room, max(1, (height - 4 * line_px) // step))
    for number, line in enumerate(lines):
        place = (x + 2 * line_px + 2, y + 2 * line_px + number * step)
        draw.text(place, line, fill=colour if picture else _GREY, font=layout.small)


def _picture(path: Path, cell_px: tuple[int, int]) -> Image.Image | str:
    """The picture in at most that size, or why it cannot be read; "" where there is none."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as opened:
            picture = opened.convert("RGB")
    except FileNotFoundError:
        return ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as reason:
        return f"{path.name} cannot be read ({reason})"
    picture.thumbnail(cell_px, Image.Resampling.LANCZOS)
    return picture


def check_target(path: Path) -> None:
    """Raises SdlabError where a file of that name is not a sheet of ours, so that it is not written over."""
    if not os.path.lexists(path):
        return
    try:
        with Image.open(path, formats=["PNG"]) as image:
            ours = image.info.get("Software") == MARK
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise SdlabError(
            "is there and is not a sheet of ours", where=str(path), next_step="Move it, then --redraw"
        )


def write(sheet: Sheet, look: Look, folder: Path) -> Path:
    """Draw the sheet into its file, whole or not at all; an older one of ours is replaced."""
    path = folder / sheet.file
    check_target(path)
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    names = [Path(cell.file).name for row in sheet.cells for cell in row if not cell.fault]
    about = {"kind": "grid", "pictures": names, "schema": 1}
    info.add_itxt("sdlab", json.dumps(about, sort_keys=True))
    buffer = io.BytesIO()
    drawn(sheet, look, folder).save(buffer, "PNG", pnginfo=info)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as reason:
        raise SdlabError(f"cannot be written ({reason.strerror})", where=str(path)) from reason
    return path
