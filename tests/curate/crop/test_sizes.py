"""The sizes that pictures are cut to: on the grid, of the shape asked for, never larger than the picture."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sdlab.curate.crop.sizes import Cut, Plan, Wanted, is_strip, plan, read_aspect, shaped
from sdlab.dataset.buckets import bucket_sizes, nearest
from sdlab.dataset.picture import Unusable, cover_box
from sdlab.errors import SdlabError

PICTURES = [(h, w) for h in (40, 333, 512, 700, 3000) for w in (41, 300, 512, 1999, 4000)]
WAYS = [
    Wanted(),
    Wanted(side_px=768, grid=16),
    Wanted(aspect=Fraction(2, 3)),
    Wanted(aspect=Fraction(16, 9), grid=16),
    Wanted(aspect=Fraction("1.91")),
    Wanted(buckets=True),
    Wanted(buckets=True, side_px=1024, grid=16),
    Wanted(max_side_px=640),
]


@pytest.mark.parametrize("wanted", WAYS)
def test_every_size_is_on_the_grid_and_no_picture_is_enlarged(wanted: Wanted) -> None:
    for picture_px in PICTURES:
        (height, width), own_scale, enlarged = plan(picture_px, wanted)
        assert height % wanted.grid == 0 and width % wanted.grid == 0
        assert 0 < height <= picture_px[0] and 0 < width <= picture_px[1]
        assert not enlarged
        if wanted.max_side_px is None:
            full = plan((8000, 8000 * picture_px[1] // picture_px[0]), wanted).size_px
            assert own_scale == (full[0] > picture_px[0] or full[1] > picture_px[1])


def test_upscale_gives_the_full_size_to_small_pictures() -> None:
    assert plan((100, 80), Wanted(upscale=True)) == Plan((512, 512), enlarged=True)
    assert plan((4, 3), Wanted(upscale=True)) == Plan((512, 512), enlarged=True)
    assert plan((512, 600), Wanted(upscale=True)) == Plan((512, 512))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2:3", (624, 416)),
        ("1:1", (512, 512)),
        ("16:9", (360, 640)),
        ("9x16", (640, 360)),
        ("4/3", (432, 576)),
        ("1.91", (368, 704)),
    ],
)
def test_an_aspect_is_exact_where_the_grid_has_it(text: str, size: tuple[int, int]) -> None:
    aspect = read_aspect(text)
    height, width = shaped(aspect, area_px=512**2, grid=8)
    assert (height, width) == size
    assert text == "1.91" or Fraction(width, height) == aspect
    assert abs(height * width / 512**2 - 1) < 0.25


def test_small_pictures_keep_the_shape_at_their_own_scale() -> None:
    assert plan((200, 170), Wanted()) == Plan((168, 168), own_scale=True)
    size, _, _ = plan((200, 170), Wanted(aspect=Fraction(2, 3)))
    assert size == (192, 128)
    size, _, _ = plan((99, 170), Wanted(buckets=True))
    assert size == (96, 160) or abs(size[1] / size[0] - 170 / 99) < 0.15


def test_a_picture_below_one_step_of_the_grid_is_refused_with_its_size() -> None:
    with pytest.raises(Unusable, match="300 x 7 is smaller than 8 x 8"):
        plan((7, 300), Wanted())


def test_buckets_are_those_of_training() -> None:
    sizes = bucket_sizes(512, grid=8)
    for picture_px in PICTURES:
        if min(picture_px) >= 1024:
            assert plan(picture_px, Wanted(buckets=True)).size_px == nearest(picture_px, sizes)


def test_max_side_cuts_less_than_a_step_of_the_grid() -> None:
    for picture_px in PICTURES:
        height, width = plan(picture_px, Wanted(max_side_px=640)).size_px
        scale = min(1, 640 / max(picture_px))
        assert is_strip(picture_px, Wanted(max_side_px=640)) == (min(picture_px) * scale < 8)
        if min(picture_px) * scale < 8:
            continue  # one step of the grid is kept of it
        assert 0 <= picture_px[0] * scale - height < 8 and 0 <= picture_px[1] * scale - width < 8


def test_a_strip_is_one_only_where_sides_are_shrunk() -> None:
    assert is_strip((3000, 20), Wanted(max_side_px=64)) and is_strip((20, 3000), Wanted(max_side_px=64))
    assert not is_strip((512, 8), Wanted(max_side_px=512)) and not is_strip((512, 64), Wanted(max_side_px=64))
    assert not is_strip((3000, 20), Wanted())


def test_a_kept_box_lies_in_the_picture_and_has_the_shape() -> None:
    for picture_px in PICTURES:
        for place in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.9)):
            left, top, right, bottom = cover_box(picture_px, (512, 384), place)
            assert 0 <= left < right <= picture_px[1] and 0 <= top < bottom <= picture_px[0]
            assert (right - left) / (bottom - top) == pytest.approx(384 / 512)
    assert Cut((100, 200), Plan((64, 64)), (0.5, 1.0), "saliency").box() == pytest.approx((0.5, 0, 1, 1))


@pytest.mark.parametrize("text", ["", "wide", "2:0", "0:2", "-2:3", "100:1", "nan", "1e400:1", "2:3:4"])
def test_what_is_no_aspect_is_refused(text: str) -> None:
    with pytest.raises(SdlabError, match="--aspect"):
        read_aspect(text)


@pytest.mark.parametrize("text", ["0:1", "-2:3", "0"])
def test_no_width_is_no_aspect(text: str) -> None:
    with pytest.raises(SdlabError, match=f"{text} is no width:height"):
        read_aspect(text)
