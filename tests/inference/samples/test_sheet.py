"""Sheets: their size, what is on them, and the same bytes again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdlab.errors import SdlabError
from sdlab.inference.samples import about, sheet
from sdlab.inference.samples.about import About
from sdlab.inference.samples.sheet import MAX_PX, Cell, Look, Sheet, check_size, drawn, look_for, scaled

RED, GREEN = (200, 0, 0), (0, 150, 0)
FRAME = (0xC8, 0x10, 0x2E)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A samples folder with two pictures, one that failed and one that is missing."""
    (tmp_path / "cells").mkdir()
    Image.new("RGB", (64, 64), RED).save(tmp_path / "cells" / "0000.png")
    Image.new("RGB", (64, 32), GREEN).save(tmp_path / "cells" / "0001.webp", lossless=True)
    cells = (
        (Cell("cells/0000.png"), Cell("cells/0001.webp")),
        (Cell("cells/0002.png", "a blank picture"), Cell("cells/0003.png")),
    )
    one = Sheet("sheet.png", "a title", "mini-sd · 8 steps", ("seed 1", "seed 2"), ("red", "green"), cells)
    look, missing = look_for([one], (64, 64))
    assert not missing
    about.save(About(1, ("x:seed=1,2",), look, (one,)), tmp_path)
    return tmp_path


def colours(image: Image.Image) -> dict[tuple[int, int, int], int]:
    return {colour: num for num, colour in image.getcolors(1 << 20)}


def test_pictures_stand_whole_beside_their_labels(folder: Path) -> None:
    told = about.read(folder)
    image = drawn(told.sheets[0], told.look, folder)
    found = colours(image)
    assert found[RED] == 64 * 64 and found[GREEN] == 64 * 32
    layout = sheet.Layout(told.sheets[0], told.look)
    assert layout.columns == [["seed 1"], ["seed 2"]] and layout.rows == [["red"], ["green"]]
    assert image.getpixel(layout.at(0, 0, (64, 64))) == RED
    x, y = layout.at(0, 1, (64, 64))
    assert image.getpixel((x, y + 16)) == GREEN and image.getpixel((x, y)) == (255, 255, 255)  # in the middle
    labels = image.crop((0, 0, image.width, layout.top))
    assert (0, 0, 0) in colours(labels)


def test_a_failed_picture_is_a_red_frame_and_a_missing_one_a_grey(folder: Path) -> None:
    told = about.read(folder)
    image = drawn(told.sheets[0], told.look, folder)
    layout = sheet.Layout(told.sheets[0], told.look)
    assert image.getpixel(layout.at(1, 0, (64, 64))) == FRAME
    assert image.getpixel(layout.at(1, 1, (64, 64))) == (0xD8, 0xD8, 0xD8)
    (folder / "cells" / "0000.png").write_bytes(b"no picture")
    image = drawn(told.sheets[0], told.look, folder)
    assert image.getpixel(layout.at(0, 0, (64, 64))) == FRAME


def test_redraw_gives_the_same_bytes(folder: Path) -> None:
    [path], bad = about.redraw(folder, cell=None)
    assert len(bad) == 3  # which are not pictures of a job
    first = path.read_bytes()
    path.unlink()
    assert about.redraw(folder, cell=None) == ([path], bad) and path.read_bytes() == first
    about.redraw(folder, cell=None)  # over its own file
    [smaller], _ = about.redraw(folder, cell=32)
    with Image.open(smaller) as image:
        assert image.info["Software"] == sheet.MARK
        assert json.loads(image.info["sdlab"])["pictures"] == ["0000.png", "0001.webp", "0003.png"]
        assert colours(image.convert("RGB"))[RED] == 32 * 32


def test_redraw_loads_no_model_library(folder: Path) -> None:
    code = (
        "import sys; from sdlab import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 3, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, "samples", "--redraw", str(folder)], check=True)
    assert (folder / "sheet.png").is_file()


def test_a_file_that_is_not_a_sheet_is_not_written_over(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    before = (folder / "sheet.png").read_bytes()
    with pytest.raises(SdlabError, match="not a sheet of ours"):
        about.redraw(folder, cell=None)
    assert (folder / "sheet.png").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"is": "x"},
        {"version": 99},
        {"sheets": [{}]},
        {"sheets": None},
        {"look": {"cell_px": [0, 4], "font": ""}},
        {"look": {"cell_px": [4], "font": ""}},
        {"seed": "7"},
        {"grid": "x"},
    ],
)
def test_a_damaged_samples_json_is_one_line(folder: Path, change: dict) -> None:
    path = folder / about.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SdlabError, match=r"samples\.json") as raised:
        about.redraw(folder, cell=None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "file", ["../sheet.png", "/tmp/sheet.png", "a/b.png", "sheet.txt", "C:sheet.png", ""]
)
def test_a_sheet_is_never_written_elsewhere(folder: Path, file: str) -> None:
    told = about.read(folder)
    changed = dataclasses.replace(told, sheets=(dataclasses.replace(told.sheets[0], file=file),))
    about.save(changed, folder)
    with pytest.raises(SdlabError, match=r"samples\.json"):
        about.redraw(folder, cell=None)


def test_a_folder_without_samples_is_named(tmp_path: Path) -> None:
    with pytest.raises(SdlabError, match=r"holds no samples\.json.*samples_"):
        about.redraw(tmp_path, cell=None)


def test_long_labels_are_broken_and_cut_and_other_scripts_keep_their_letters() -> None:
    cells = ((Cell("cells/0000.png"),),)
    long = "portrait of an old fisherman, weathered face, grey beard, window light " * 8
    one = Sheet("sheet.png", long, "", (long,), (long,), cells)
    look, _ = look_for([one], (128, 128))
    layout = sheet.Layout(one, look)
    assert len(layout.title) == 3 and layout.title[-1].endswith("…")
    assert len(layout.columns[0]) == 4 and len(layout.rows[0]) * layout.line <= 128
    assert layout.left + 128 < layout.width < 128 + 400


@pytest.mark.parametrize(
    ("num", "cell_px", "said"),
    [
        ((101, 100, 1), (8, 8), "10,100 pictures, more than 10,000"),
        ((100, 10, 11), (8, 8), "on 11 sheets are 11,000 pictures"),
        ((30, 30, 1), (512, 512), "15360x15360, more than 178 megapixels. Give --cell 256"),
        ((9000, 1, 1), (8, 8), r"more than 65,535 pixels a side"),
    ],
)
def test_an_absurd_sheet_is_refused_with_what_would_help(num, cell_px, said) -> None:
    with pytest.raises(SdlabError, match=said):
        check_size(*num, cell_px)


def test_what_is_accepted_can_be_opened_by_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PX == 2 * Image.MAX_IMAGE_PIXELS
    check_size(100, 100, 1, (128, 128))
    with pytest.raises(SdlabError, match="--cell 64"):  # the labels do not fit
        many = tuple(f"seed {i}" for i in range(100))
        cells = ((Cell("cells/0.png"),) * 100,) * 100
        sheet.check_sheets([Sheet("sheet.png", "", "", many, many, cells)], Look((133, 133), ""))


def test_pictures_are_made_smaller_never_larger() -> None:
    assert scaled((512, 256), 128) == (128, 64)
    assert scaled((64, 32), 128) == (64, 32)
    assert scaled((64, 32), None) == (64, 32)
