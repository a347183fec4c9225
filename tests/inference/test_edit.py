"""Sizes of edits, and which pictures of a folder are taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlab.dataset.colour import colour_of
from sdlab.errors import SdlabError
from sdlab.inference import edit
from sdlab.inference.edit import Wanted

NOTHING = Wanted(None, None, None)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((512, 512), NOTHING, (512, 512)),
        ((640, 427), NOTHING, (640, 424)),  # its own size, cut
        ((4000, 3000), NOTHING, (592, 440)),  # scaled to the model's area
        ((100, 100), NOTHING, (512, 512)),
        ((1, 1), NOTHING, (512, 512)),
        ((4000, 3000), Wanted(640, None, None), (640, 480)),
        ((4000, 3000), Wanted(None, 480, None), (640, 480)),
        ((4000, 3000), Wanted(256, 512, None), (256, 512)),
        ((4000, 3000), Wanted(None, None, 256), (296, 224)),
        ((640, 427), Wanted(None, None, 512), (624, 416)),
    ],
)
def test_size_of_an_edit(size: tuple[int, int], wanted: Wanted, expected: tuple[int, int]) -> None:
    assert edit.size_for(*size, wanted, model_size=512, grid=8) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 427), (640, 416)), ((40, 40), (512, 512)), ((4000, 600), (1328, 192))]
)
def test_size_in_which_a_picture_is_looked_at(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert edit.size_to_look_at(*size, model_size=512, grid=16) == expected


@pytest.mark.parametrize("size", [(48, 64), (64, 528), (63, 63)])
def test_picture_that_cannot_be_looked_at_is_refused(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    with pytest.raises(SdlabError, match=f"{size[0]}x{size[1]} cannot be looked at"):
        edit.lookable(*size)
    with pytest.raises(ValueError, match="too"):  # the library would stop there
        Flux2ImageProcessor.check_image_input(Image.new("RGB", size))
    for good in [(64, 64), (64, 512)]:
        assert edit.lookable(*good) == good
        Flux2ImageProcessor.check_image_input(Image.new("RGB", good))


def test_needle_is_refused_with_the_way_on() -> None:
    with pytest.raises(SdlabError, match="--width and --height"):
        edit.size_for(10_000, 3, NOTHING, model_size=512, grid=8)


@pytest.mark.parametrize(
    ("size", "target"), [((70, 53), (64, 48)), ((300, 100), (64, 64)), ((20, 20), (64, 48))]
)
def test_pictures_are_cut_not_stretched(size: tuple[int, int], target: tuple[int, int]) -> None:
    width, height = size
    y, x = np.mgrid[:height, :width]
    # a disc in the middle stays a disc
    disc = ((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2) < (min(size) / 3) ** 2
    picture = Image.fromarray(np.repeat((disc * 255).astype(np.uint8)[..., None], 3, 2))
    fitting = edit.prepared(picture, width=target[0], height=target[1], grid=8)
    assert fitting.size == target
    white = np.asarray(fitting)[..., 0] > 127
    columns, rows = white.any(0).sum(), white.any(1).sum()
    assert abs(int(columns) - int(rows)) <= 2


def test_every_picture_below_a_folder_is_taken_once(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    names = [
        "b.png",
        "a/z.jpg",
        "a/A.PNG",
        "__review/c.webp",
        "_v2/d.bmp",
        ".hidden/e.png",
        "@eaDir/f.png",
        ".g.png",
    ]
    root = pictures({name: (8, 8) for name in names})
    (root / "notes.txt").write_text("x")
    os.symlink(root, root / "loop")
    found, failed = edit.pictures_below(root)
    assert [p.relative_to(root).as_posix() for p in found] == [
        "__review/c.webp",
        "_v2/d.bmp",
        "a/A.PNG",
        "a/z.jpg",
        "b.png",
    ]
    assert failed == []


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SdlabError, match="no pictures"):
        edit.pictures_below(tmp_path)


@pytest.mark.parametrize(
    ("source", "target", "refused"),
    [
        ("in", "in", True),
        ("in", "in/out", True),
        ("in/deep", "in", True),
        ("in", "link", True),
        ("in", "./in/../in", True),
        ("in", "out", False),
        ("in", "in2", False),
    ],
)
def test_output_that_overlaps_the_input_is_refused(
    tmp_path: Path, source: str, target: str, refused: bool
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    if refused:
        with pytest.raises(SdlabError, match="--output"):
            edit.refuse_overlap(tmp_path / source, tmp_path / target)
    else:
        edit.refuse_overlap(tmp_path / source, tmp_path / target)


def test_bad_colour_and_bad_picture_are_refused_with_where(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(SdlabError, match=r"a\.png"):
        edit.opened(tmp_path / "a.png", background="white", max_pixels=100)
    with pytest.raises(SdlabError, match="--background"):
        colour_of("reddish")
    assert colour_of("#ff8000") == (255, 128, 0)
