"""Buckets: sizes that fit the model, the area and the picture."""

from __future__ import annotations

import math

import pytest

from sdlab.dataset.buckets import Item, assign, bucket_sizes, is_upscaled, nearest
from sdlab.dataset.tree import Sample
from sdlab.errors import SdlabError

SIZES = [
    (64, 8),
    (128, 8),
    (256, 8),
    (512, 8),
    (520, 8),
    (768, 8),
    (1024, 8),
    (512, 16),
    (1024, 16),
    (8, 8),
    (48, 16),
]


@pytest.mark.parametrize("image_size, grid", SIZES)
def test_sizes_are_on_the_grid_with_about_the_area_and_at_most_two_to_one(image_size: int, grid: int) -> None:
    sizes = bucket_sizes(image_size, grid=grid)
    assert (image_size, image_size) in sizes
    assert sizes == tuple(sorted(set(sizes)))
    for height, width in sizes:
        assert height % grid == width % grid == 0
        assert 0.8 <= height * width / image_size**2 <= 1.2
        assert 0.5 <= height / width <= 2
        assert (width, height) in sizes


def test_sizes_for_stable_diffusion_are_these() -> None:
    wide = [(384, 640), (384, 704), (448, 576)]
    assert bucket_sizes(512, grid=8) == tuple(sorted([*wide, (512, 512), *((w, h) for h, w in wide)]))


@pytest.mark.parametrize(
    "image_size, grid, near",
    [(500, 8, "496 or 504"), (4, 8, "Try 8"), (0, 8, "Try 8"), (520, 16, "512 or 528"), (-8, 8, "Try 8")],
)
def test_a_size_off_the_grid_is_an_error_naming_the_nearest(image_size: int, grid: int, near: str) -> None:
    with pytest.raises(SdlabError, match=near):
        bucket_sizes(image_size, grid=grid)


@pytest.mark.parametrize(
    "picture, bucket",
    [
        ((512, 512), (512, 512)),
        ((30, 30), (512, 512)),
        ((3000, 4000), (448, 576)),
        ((4000, 3000), (576, 448)),
        ((1080, 1920), (384, 704)),
        ((100, 10_000), (384, 704)),
        ((10_000, 1), (704, 384)),
        ((1, 1), (512, 512)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_shape(
    picture: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert nearest(picture, bucket_sizes(512, grid=8)) == bucket


def test_turning_a_picture_turns_its_bucket() -> None:
    sizes = bucket_sizes(512, grid=8)
    for height in range(100, 2000, 37):
        for width in range(100, 2000, 41):
            found = nearest((height, width), sizes)
            assert nearest((width, height), sizes) == found[::-1]
            off = abs(math.log(width / height) - math.log(found[1] / found[0]))
            assert all(off <= abs(math.log(width / height) - math.log(w / h)) + 1e-12 for h, w in sizes)


def test_visits_are_numbered_and_in_the_order_of_the_samples() -> None:
    samples = [Sample(id, id, "", "folder") for id in ("a", "b")]
    items = assign(samples, [(100, 100), (100, 200)], image_size=64, grid=8, times=(2, 1))
    assert items == (
        Item(samples[0], (64, 64), 0),
        Item(samples[0], (64, 64), 1),
        Item(samples[1], (48, 88), 0),
    )
    assert len({*items}) == 3  # they key the cache
    assert [item.repeat for item in assign(samples, [(1, 1), (2, 2)], image_size=64, grid=8)] == [0, 0]


def test_references_go_to_buckets_of_their_own_shape() -> None:
    samples = [
        Sample("a", "a", "", "folder", ("a.ref", "a.ref2")),
        Sample("b", "b", "", "folder"),
        Sample("c", "c", "", "folder", ("c.ref",)),
    ]
    items = assign(
        samples,
        [(100, 200), (9, 9), (30, 40)],
        image_size=64,
        grid=8,
        times=(2, 1, 1),
        reference_sizes_px=[[(50, 100), (7, 7)], [], [(30, 40)]],
    )
    assert [item.reference_sizes for item in items] == [
        ((48, 88), (64, 64)),
        ((48, 88), (64, 64)),
        (),
        ((56, 72),),
    ]
    assert items[3].size_px == (56, 72)  # a reference of its picture's shape is cut like the picture
    without = assign(samples, [(1, 1)] * 3, image_size=64, grid=8)
    assert [item.reference_sizes for item in without] == [(), (), ()]


@pytest.mark.parametrize(
    "picture, bucket, enlarged",
    [
        ((64, 64), (64, 64), False),
        ((63, 900), (64, 64), True),
        ((900, 63), (64, 64), True),
        ((65, 70), (64, 64), False),
    ],
)
def test_pictures_smaller_than_their_bucket_are_told(
    picture: tuple[int, int], bucket: tuple[int, int], enlarged: bool
) -> None:
    assert is_upscaled(picture, bucket) == enlarged
