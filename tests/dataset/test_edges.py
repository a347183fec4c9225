"""Edges are those of cv2.Canny, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sdlab.dataset.edges import canny

cv2 = pytest.importorskip("cv2", reason="needs the extra `face`, which brings OpenCV")

THRESHOLDS = [(100, 200), (0, 0), (0, 1000), (1, 2), (50, 50), (300, 700), (1000, 1000), (200, 100)]


def _noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _scene(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with shapes on them: long chains of weak edges."""
    rng = np.random.default_rng(seed)
    picture = _noise(4, 4, seed).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, w, h = (int(n) for n in rng.integers(0, (width, height, width // 2 + 1, height // 2 + 1)))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    return picture.filter(ImageFilter.GaussianBlur(float(rng.random() * 2)))


PICTURES = {
    "noise": _noise(97, 61, 1),
    "scene": _scene(128, 128, 2),
    "large scene": _scene(413, 257, 3),
    "one column": _noise(1, 40, 4),
    "one row": _noise(40, 1, 5),
    "one pixel": _noise(1, 1, 6),
    "one colour": Image.new("RGB", (32, 32), "red"),
    "grey": _scene(64, 64, 7).convert("L").convert("RGB"),
}


@pytest.mark.parametrize("low_high", THRESHOLDS, ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_the_edges_are_those_of_opencv(name: str, low_high: tuple[int, int]) -> None:
    picture, (low, high) = PICTURES[name], low_high
    edges = canny(picture, low=low, high=high)
    assert (edges.mode, edges.size) == ("L", picture.size)
    assert np.array_equal(np.asarray(edges), cv2.Canny(np.asarray(picture), low, high))


def test_a_picture_of_many_sizes_and_thresholds_too() -> None:
    rng = np.random.default_rng(8)
    for seed in range(40):
        width, height = (int(n) for n in rng.integers(2, 90, 2))
        low, high = sorted(int(n) for n in rng.integers(0, 700, 2))
        picture = (_scene if seed % 2 else _noise)(width, height, seed)
        edges = np.asarray(canny(picture, low=low, high=high))
        assert np.array_equal(edges, cv2.Canny(np.asarray(picture), low, high)), (width, height, low, high)


def test_a_grey_or_transparent_picture_is_seen_as_rgb() -> None:
    grey = _scene(50, 40, 9).convert("L")
    assert canny(grey).tobytes() == canny(grey.convert("RGB")).tobytes()
