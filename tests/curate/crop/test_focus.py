"""What stands out is kept: measured on drawn pictures with a planted subject, off centre."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdlab.curate.crop import focus
from sdlab.curate.crop.sizes import Cut, Plan
from sdlab.dataset.picture import cover_box, open_picture, read_size
from sdlab.errors import SdlabError
from sdlab.testing.faces import face
from sdlab.testing.planted import planted

NUM, FIRST = 210, 50_000  # seeds that the method was not made with; every shape and ground six times
SQUARE, TALL = (512, 512), (624, 416)
TURNED_BACK = {
    1: None,
    2: 0,
    3: 3,
    4: 1,
    5: 5,
    6: 2,
    7: 6,
    8: 4,
}  # PIL's transpose that the orientation undoes


def is_inside(box: tuple[int, int, int, int], kept: tuple[float, float, float, float]) -> bool:
    return kept[0] <= box[0] and kept[1] <= box[1] and box[2] <= kept[2] and box[3] <= kept[3]


def stored(image: Image.Image, orientation: int, path: Path) -> None:
    """The picture as a camera held otherwise would write it."""
    turn = TURNED_BACK[orientation]
    pixels = image if turn is None else image.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels.save(path, "JPEG", quality=92, exif=exif)


@pytest.mark.slow
def test_the_subject_is_kept_in_95_of_100_pictures_in_all_eight_orientations(tmp_path: Path) -> None:
    kept, in_the_centre = [], []
    for number in range(NUM):
        one, path = planted(FIRST + number), tmp_path / "a.jpg"
        stored(one.image, number % 8 + 1, path)
        picture_px = read_size(str(path))
        assert picture_px == (one.image.height, one.image.width)
        image = open_picture(str(path))
        size_px = SQUARE if picture_px[0] != picture_px[1] else TALL
        place, by = focus.place(image, picture_px, size_px, focus.looker("saliency"))
        assert by == "saliency"
        kept.append(is_inside(one.box, cover_box(picture_px, size_px, place)))
        in_the_centre.append(is_inside(one.box, cover_box(picture_px, size_px)))
    assert np.mean(kept) >= 0.95
    assert np.mean(in_the_centre) < 0.5


def test_the_written_orientation_is_undone_by_pillow_too(tmp_path: Path) -> None:
    image = planted(FIRST).image
    for orientation in TURNED_BACK:
        stored(image, orientation, tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as plain:
            seen = np.asarray(ImageOps.exif_transpose(plain), float)
        assert np.abs(seen - np.asarray(image)).mean() < 6


@pytest.mark.parametrize("colour", ["black", "white", "#808080", "red"])
def test_an_empty_picture_is_cut_at_its_centre(colour: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(file, "JPEG")
    for image in (Image.new("RGB", (300, 200), colour), Image.open(file)):
        place, _ = focus.place(image.convert("RGB"), (200, 300), SQUARE, focus.looker("saliency"))
        assert place == pytest.approx((0.5, 0.5), abs=0.01)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2), (16, 5000)])
def test_any_size_of_picture_has_a_map(size: tuple[int, int]) -> None:
    map_HW = focus.saliency(Image.effect_noise(size, 50).convert("RGB"))
    assert map_HW.sum() == pytest.approx(1, abs=1e-3) and (map_HW >= 0).all()


def test_the_map_does_not_depend_on_how_far_a_jpeg_was_shrunk(tmp_path: Path) -> None:
    one = planted(FIRST + 3)
    large = one.image.resize((one.image.width * 4, one.image.height * 4), Image.Resampling.BICUBIC)
    places = [
        focus.place(image, (one.image.height, one.image.width), SQUARE, focus.looker("saliency"))[0]
        for image in (one.image, large)
    ]
    assert places[0] == pytest.approx(places[1], abs=0.06)


def test_the_window_that_holds_most_is_found_and_ties_go_to_its_middle() -> None:
    map_HW = np.zeros((10, 40), np.float32)
    map_HW[4:6, 30:34] = 1
    down, across = focus.best_place(focus.normalised(map_HW), (1.0, 0.25))
    assert down == 0.5
    left = across * 0.75
    assert left + 0.125 == pytest.approx(32 / 40, abs=0.01)
    assert focus.best_place(focus.normalised(np.zeros((4, 8))), (1.0, 0.5)) == (0.5, pytest.approx(0.5))


def test_looking_takes_few_milliseconds() -> None:
    image = planted(FIRST).image.resize((1000, 750))
    taken = []
    for _ in range(20):
        started = time.thread_time()
        focus.saliency(image)
        taken.append(time.thread_time() - started)
    assert min(taken) < 0.010


def test_without_opencv_the_one_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SdlabError, match=r'pip install "sdlab\[face\]"'):
        focus.looker("face")


def test_a_face_is_kept_whole_and_its_lack_is_told() -> None:
    pytest.importorskip("cv2")
    look = focus.looker("face")
    for radius, x in ((30, 500), (60, 20), (90, 380)):
        image = Image.new("RGB", (640, 360), (90, 110, 120))
        image.paste((230, 60, 20), (260, 100, 380, 220))  # what stands out more than a face
        image.paste(face(radius), (x, 20))
        place, by = focus.place(image, (360, 640), SQUARE, look)
        left, _, right, _ = Cut((360, 640), Plan(SQUARE), place, by).box()
        assert by == "face"
        assert left * 640 <= max(x + 0.4 * radius, 0) and x + 2 * radius <= right * 640
    image = Image.new("RGB", (640, 360), (90, 110, 120))
    image.paste((230, 60, 20), (560, 100, 620, 160))
    place, by = focus.place(image, (360, 640), SQUARE, look)
    assert by == "saliency" and place[1] > 0.9
