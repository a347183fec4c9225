"""``samples.json``: everything by which the sheets of a folder are drawn, and drawn again."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdlab import show
from sdlab.dataset.cache import write_whole
from sdlab.dataset.sheet import open_font
from sdlab.errors import SdlabError
from sdlab.inference.record import metadata
from sdlab.inference.samples.sheet import Cell, Look, Sheet, check_sheets, look_for, scaled, write

NAME, IS, VERSION = "samples.json", "sdlab samples", 1
FILE_BYTES = 1 << 26


@dataclass(frozen=True)
class About:
    """What samples.json says."""

    seed: int
    grid: tuple[str, ...]  # the axes as they were typed
    look: Look
    sheets: tuple[Sheet, ...]

    def told(self, files: Mapping[int, str], faults: Mapping[int, str]) -> About:
        """The same with the files that pictures have got, and why others have none, by the pictures' numbers."""
        number = itertools.count()

        def renewed(cell: Cell) -> Cell:
            index = next(number)
            return Cell(files.get(index, cell.file), faults.get(index, ""))

        sheets = [
            dataclasses.replace(sheet, cells=tuple(tuple(map(renewed, row)) for row in sheet.cells))
            for sheet in self.sheets
        ]
        return dataclasses.replace(self, sheets=tuple(sheets))


def save(about: About, folder: Path) -> None:
    """Write samples.json, whole or not at all."""
    record = {"is": IS, "version": VERSION, **dataclasses.asdict(about)}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    try:
        write_whole(folder / NAME, text.encode("utf-8", "backslashreplace") + b"\n", sync=True)
    except OSError as reason:
        raise SdlabError(f"cannot be written ({reason.strerror})", where=str(folder / NAME)) from reason


def read(folder: Path) -> About:
    """What samples.json says. Raises SdlabError where there is none, or it is not as sdlab writes it."""
    path = folder / NAME
    try:
        if path.stat().st_size > FILE_BYTES:
            raise ValueError("far too large")
        record = json.loads(path.read_bytes())
        if record["is"] != IS or record["version"] != VERSION:
            raise ValueError("another program's, or of another version")
        look = record["look"]
        return About(
            _number(record["seed"], 2**53),
            _texts(record["grid"]),
            Look((_side(look["cell_px"][0]), _side(look["cell_px"][1])), _text(look["font"])),
            tuple(_sheet(sheet) for sheet in record["sheets"]),
        )
    except FileNotFoundError as reason:
        raise SdlabError(
            f"holds no {NAME}", where=str(folder), next_step="Give the samples_... folder of sdlab samples"
        ) from reason
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as reason:
        what = f"is not as sdlab writes it ({type(reason).__name__}: {reason})"
        raise SdlabError(what, where=str(path)) from reason


def redraw(folder: Path, *, cell: int | None) -> tuple[list[Path], list[str]]:
    """Draw the sheets of a samples folder from its samples.json and its pictures: the same bytes as before.

    `cell` is the longer side of a picture on the sheets, where that is to be another. Gives the sheets, and in words
    what is not the picture that was made.
    """
    about = read(folder)
    look = about.look
    if cell is not None:
        look = dataclasses.replace(look, cell_px=scaled(look.cell_px, cell))
    try:
        open_font(look.font)
    except OSError:
        look, _ = look_for(about.sheets, look.cell_px)
        name = look.font or "Pillow's own"
        show.warn(f"{about.look.font}, in which the labels were written, is not here: taking {name}")
    check_sheets(about.sheets, look)
    bad = [
        why for sheet in about.sheets for row in sheet.cells for one in row if (why := _wrong(one, folder))
    ]
    return [write(sheet, look, folder) for sheet in about.sheets], bad


def _wrong(cell: Cell, folder: Path) -> str:
    """What is wrong with a cell that should hold a picture, "" if nothing is."""
    if cell.fault:
        return ""
    path = folder / cell.file
    if not path.exists():
        return f"{cell.file} is not there"
    recipe = metadata.peek(path)
    own = recipe is not None and f"{recipe['index']:04d}" == path.stem
    return "" if own else f"{cell.file} is not the picture that was made"


def _sheet(record: Any) -> Sheet:
    columns, rows = _texts(record["columns"]), _texts(record["rows"])
    cells = tuple(
        tuple(Cell(_below(cell["file"]), _text(cell["fault"])) for cell in row) for row in record["cells"]
    )
    if len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        raise ValueError("cells and labels do not match")
    file = _below(record["file"])
    if "/" in file or not file.endswith(".png"):
        raise ValueError(f"{file[:50]!r} is no name of a sheet")
    return Sheet(file, _text(record["title"]), _text(record["common"]), columns, rows, cells)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("no list where one should stand")
    return tuple(_text(one) for one in value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:50]!r} where a text should stand")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:50]!r} where a number should stand")
    return value


def _side(value: Any) -> int:
    if _number(value, 1 << 16) < 1:
        raise ValueError("a picture without a side")
    return int(value)


def _below(value: Any) -> str:
    """A path below the folder. Raises ValueError for any other."""
    text = _text(value)
    path = PurePosixPath(text)
    if (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or any(c in text for c in ("\\", ":", "\0"))
    ):
        raise ValueError(f"{text[:50]!r} is no path below the folder")
    return text


def sheet_name(number: int) -> str:
    """``sheet.png``, ``sheet_2.png`` ..."""
    return "sheet.png" if number == 0 else f"sheet_{number + 1}.png"
