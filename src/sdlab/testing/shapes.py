"""Silhouettes: the outlines of the things in scenes, in a box that reaches from -1 to 1 (x right, y down)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Point = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One polygon; `filled` False cuts a hole into the parts before it."""

    points: tuple[Point, ...]
    filled: bool = True


Silhouette = tuple[Part, ...]


def oval(x: float, y: float, rx: float, ry: float, *, tilt_deg: float = 0.0, corners: int = 48) -> Part:
    """An ellipse around (x, y), as a polygon of `corners` points."""
    c, s = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    angles = [2 * math.pi * i / corners for i in range(corners)]
    flat = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return Part(tuple((x + c * px - s * py, y + s * px + c * py) for px, py in flat))


def hole(part: Part) -> Part:
    """The same polygon, cut out."""
    return Part(part.points, filled=False)


def box(x0: float, y0: float, x1: float, y1: float) -> Part:
    """An upright rectangle."""
    return Part(((x0, y0), (x1, y0), (x1, y1), (x0, y1)))


def _star() -> Silhouette:
    radii = (1.05, 0.44)
    angles = [-math.pi / 2 + math.pi * i / 5 for i in range(10)]
    points = [(radii[i % 2] * math.cos(a), 0.06 + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]
    return (Part(tuple(points)),)


def _heart() -> Silhouette:
    # the usual curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the box
    ts = [2 * math.pi * i / 72 for i in range(72)]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return (Part(tuple((math.sin(t) ** 3, -(y + 2.5) / 15.5) for t, y in zip(ts, ys, strict=True))),)


def _flower() -> Silhouette:
    around = [-math.pi / 2 + 2 * math.pi * i / 5 for i in range(5)]
    petals = [oval(0.58 * math.cos(a), 0.58 * math.sin(a), 0.4, 0.4) for a in around]
    return (*petals, oval(0, 0, 0.5, 0.5), hole(oval(0, 0, 0.22, 0.22)))


def _house() -> Silhouette:
    roof = Part(((-1.0, 0.0), (-0.6, -0.7), (0.6, -0.7), (1.0, 0.0)))
    chimney = box(0.28, -0.98, 0.55, -0.5)
    return (roof, chimney, box(-0.84, -0.02, 0.84, 0.8), hole(box(-0.2, 0.28, 0.2, 0.81)))


def _fish() -> Silhouette:
    tail = Part(((0.3, 0.0), (1.0, -0.6), (0.8, 0.0), (1.0, 0.6)))
    return (tail, oval(-0.25, 0.0, 0.75, 0.5), hole(oval(-0.6, -0.1, 0.1, 0.1)))


SILHOUETTES: Mapping[str, Silhouette] = MappingProxyType(
    {
        "circle": (oval(0, 0, 0.95, 0.95),),
        "square": (box(-0.85, -0.85, 0.85, 0.85),),
        "triangle": (Part(((0, -0.95), (1.0, 0.8), (-1.0, 0.8))),),
        "star": _star(),
        "heart": _heart(),
        "diamond": (Part(((0, -1.0), (0.68, 0), (0, 1.0), (-0.68, 0))),),
        "cross": (box(-0.95, -0.3, 0.95, 0.3), box(-0.3, -0.95, 0.3, 0.95)),
        "ring": (oval(0, 0, 0.97, 0.97), hole(oval(0, 0, 0.5, 0.5))),
        "moon": (oval(0.12, 0, 0.95, 0.95), hole(oval(0.55, 0, 0.78, 0.78))),
        "arrow": (box(-1.0, -0.3, 0.15, 0.3), Part(((0.05, -0.85), (1.0, 0.0), (0.05, 0.85)))),
        "fish": _fish(),
        "house": _house(),
        "flower": _flower(),
    }
)

NEW_SHAPES: tuple[str, ...] = ("fish", "house", "flower")  # never shown to mini-sd: the demo teaches them
BASE_SHAPES: tuple[str, ...] = tuple(name for name in SILHOUETTES if name not in NEW_SHAPES)


def rasterise(
    silhouette: Silhouette,
    size_px: tuple[int, int],
    *,
    centre_px: Point,
    radius_px: float,
    tilt_deg: float = 0.0,
    supersample: int = 4,
) -> NDArray[np.float32]:
    """The mask of a silhouette, (height, width) in [0, 1]; a unit of the silhouette is `radius_px` pixels."""
    height, width = size_px
    canvas = Image.new("L", (width * supersample, height * supersample), 0)
    pen = ImageDraw.Draw(canvas)
    for part in silhouette:
        corners = _placed(part.points, centre_px, radius_px, tilt_deg, supersample)
        pen.polygon(corners, fill=255 if part.filled else 0)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32) / np.float32(255)


def _placed(
    points: Sequence[Point], centre: Point, radius: float, tilt_deg: float, factor: int
) -> list[Point]:
    c, s = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    return [
        (factor * (centre[0] + radius * (c * x - s * y)), factor * (centre[1] + radius * (s * x + c * y)))
        for x, y in points
    ]
