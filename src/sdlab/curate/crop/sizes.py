"""The sizes that pictures are cut to: pure geometry, no pixels.

Sizes are (height, width) in pixels. A picture keeps its proportions: it is scaled alike in both directions and
what does not fit the shape is cut off.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sdlab.dataset.buckets import bucket_sizes, nearest
from sdlab.dataset.picture import Unusable, cover_box
from sdlab.errors import SdlabError

Size = tuple[int, int]
Place = tuple[float, float]  # of the kept part: down and across, 0 to 1; see dataset.picture.cover_box

MAX_ASPECT = 8
EXACT_FROM = 0.8  # an exact shape is preferred to the nearest one on the grid down to this part of its area


@dataclass(frozen=True)
class Wanted:
    """Which sizes come out. At most one of `aspect`, `buckets` and `max_side_px`; without them, squares."""

    side_px: int = 512  # of the square; the other shapes have about as many pixels
    grid: int = 8  # sides are multiples of this
    aspect: Fraction | None = None  # width over height
    buckets: bool = False  # training's own sizes, each picture the nearest to its shape
    max_side_px: int | None = None  # only shrink, every picture in its own shape
    upscale: bool = False  # small pictures are enlarged, else they are cut to the shape at their own scale


class Plan(NamedTuple):
    """What becomes of one picture."""

    size_px: Size
    own_scale: bool = False  # smaller than the size that was asked for, and cut without being enlarged
    enlarged: bool = False


class Cut(NamedTuple):
    """What is kept of a picture."""

    from_px: Size
    plan: Plan
    place: Place
    by: str  # what the place was chosen by: saliency, face or center

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in the picture, as fractions of its width and height."""
        height, width = self.from_px
        left, top, right, bottom = cover_box(self.from_px, self.plan.size_px, self.place)
        return left / width, top / height, right / width, bottom / height


def plan(picture_px: Size, wanted: Wanted, *, shape_of: Size | None = None) -> Plan:
    """The size that a picture comes out in; its shape is chosen for a picture of the size `shape_of`, if given.

    Raises Unusable where it is smaller than one step of the grid.
    """
    if min(picture_px) < wanted.grid and not wanted.upscale:
        height, width = picture_px
        raise Unusable(
            f"{width} x {height} is smaller than {wanted.grid} x {wanted.grid}, the least that is kept"
        )
    if wanted.max_side_px is not None:
        return Plan(_shrunk(picture_px, wanted.max_side_px, wanted.grid))
    size_px = full_size(shape_of or picture_px, wanted)
    if size_px[0] <= picture_px[0] and size_px[1] <= picture_px[1]:
        return Plan(size_px)
    if wanted.upscale:
        return Plan(size_px, enlarged=True)
    return Plan(within(picture_px, size_px, wanted.grid), own_scale=True)


def full_size(picture_px: Size, wanted: Wanted) -> Size:
    """The size for a picture that is large enough; not for `max_side_px`."""
    if wanted.buckets:
        return nearest(picture_px, bucket_sizes(wanted.side_px, grid=wanted.grid))
    return shaped(wanted.aspect or Fraction(1), area_px=wanted.side_px**2, grid=wanted.grid)


def read_aspect(text: str) -> Fraction:
    """Width over height from ``2:3`` (or 2x3, 2/3, 0.67). Raises SdlabError for anything else, and beyond 1:8."""
    width, _, height = re.sub("[x/]", ":", text).partition(":")
    try:
        aspect = Fraction(width.strip()) / Fraction(height.strip() or 1)
    except (ValueError, ZeroDivisionError) as reason:
        raise SdlabError(f"{text} is no width:height", where="--aspect", next_step="Try 2:3") from reason
    if aspect <= 0:
        raise SdlabError(f"{text} is no width:height", where="--aspect", next_step="Try 2:3")
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise SdlabError(f"{text} is more than 1:{MAX_ASPECT}", where="--aspect", next_step="Try 2:3")
    return aspect


def shaped(aspect: Fraction, *, area_px: int, grid: int) -> Size:
    """The size on the grid of `aspect` (width over height) with about `area_px` pixels.

    Exactly of that shape where there is one with an area within a fifth of it, else of the nearest shape.
    """
    step = (aspect.denominator * grid, aspect.numerator * grid)
    times = max(1, round(math.sqrt(area_px / (step[0] * step[1]))))
    exact = (times * step[0], times * step[1])
    if EXACT_FROM <= exact[0] * exact[1] / area_px <= 1 / EXACT_FROM:
        return exact
    height, width = math.sqrt(area_px / aspect), math.sqrt(area_px * aspect)
    around = itertools.product(_around(height, grid), _around(width, grid))
    return min(around, key=lambda size: (abs(math.log(size[1] / size[0] / aspect)), -size[0] * size[1]))


def within(picture_px: Size, shape: Size, grid: int) -> Size:
    """The largest size on the grid inside the picture that has the shape of the size `shape`.

    Exactly that shape if this costs less than a fifth of the area, else the nearest below. The picture has at
    least one step of the grid on each side, and so does the result.
    """
    aspect = Fraction(shape[1], shape[0])
    step = (aspect.denominator * grid, aspect.numerator * grid)
    times = min(picture_px[0] // step[0], picture_px[1] // step[1])
    scale = min(picture_px[0] / shape[0], picture_px[1] / shape[1])
    height, width = (max(1, int(scale * side + 1e-6) // grid) * grid for side in shape)
    exact_enough = (times * step[0]) * (times * step[1]) >= EXACT_FROM * height * width
    return (times * step[0], times * step[1]) if exact_enough else (height, width)


def is_strip(picture_px: Size, wanted: Wanted) -> bool:
    """Whether it is so long that `max_side_px` leaves less than a step of the grid of its shorter side.

    That side then gets the whole step, and the longer one loses more than the grid takes.
    """
    if wanted.max_side_px is None:
        return False
    return _scale(picture_px, wanted.max_side_px) * min(picture_px) < wanted.grid - 1e-6


def _scale(picture_px: Size, max_side_px: int) -> float:
    return min(1.0, max_side_px / max(picture_px))


def _shrunk(picture_px: Size, max_side_px: int, grid: int) -> Size:
    scale = _scale(picture_px, max_side_px)
    height, width = (max(1, int(scale * side + 1e-6) // grid) * grid for side in picture_px)
    return height, width


def _around(side: float, grid: int) -> set[int]:
    return {max(1, round_(side / grid)) * grid for round_ in (math.floor, math.ceil)}
