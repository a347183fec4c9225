"""Aspect-ratio buckets: a few sizes of about equal area, so that pictures keep nearly their own shape.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdlab.dataset.tree import Sample
from sdlab.errors import SdlabError

MAX_ASPECT = 2.0
_AREA_TOLERANCE = 0.2  # sizes so small that whole steps miss the area by more are left out


@dataclass(frozen=True)
class Item:
    """One visit of a sample in an epoch."""

    sample: Sample
    size_px: tuple[int, int]  # of its bucket
    repeat: int = 0  # 0 for the first visit
    flip: bool = False  # mirrored, its references too
    reference_sizes: tuple[
        tuple[int, int], ...
    ] = ()  # one for each of the sample's references, in their order


def bucket_sizes(image_size: int, *, grid: int) -> tuple[tuple[int, int], ...]:
    """Sizes of about image_size² pixels, from 1:2 to 2:1, sorted; the square is among them.

    Sides are the square's plus or minus whole steps of an eighth of it, and multiples of `grid`.
    Raises SdlabError where image_size is no multiple of `grid`.
    """
    if image_size < grid or image_size % grid:
        below = max(image_size // grid, 0) * grid
        near = " or ".join(str(size) for size in (below, below + grid) if size >= grid)
        raise SdlabError(
            f"{image_size} is not a multiple of {grid}", where="--image-size", next_step=f"Try {near}"
        )
    step = max(grid, round(image_size / 8 / grid) * grid)
    sizes = {(image_size, image_size)}
    for long in range(image_size + step, 2 * image_size, step):
        short = image_size - round((image_size - image_size**2 / long) / step) * step
        fits = abs(long * short / image_size**2 - 1) <= _AREA_TOLERANCE
        if short < long <= MAX_ASPECT * short and fits:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest(picture_size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to the picture's, as a ratio; the largest of several."""
    aspect = math.log(picture_size[1] / picture_size[0])
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - aspect), -size[0] * size[1], size))


def assign(
    samples: Sequence[Sample],
    sizes_px: Sequence[tuple[int, int]],
    *,
    image_size: int,
    grid: int,
    times: Sequence[int] | None = None,
    reference_sizes_px: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> tuple[Item, ...]:
    """Every visit of every sample with its bucket, in the order of the samples.

    `sizes_px` are the pictures' own sizes, `times` the visits of each (see tree.weigh), one each by default,
    `reference_sizes_px` the own sizes of each one's references, none by default. A reference goes to the bucket
    of its own shape, so one that was made from its picture is cut where the picture is.
    Raises SdlabError where image_size is no multiple of `grid`.
    """
    sizes = bucket_sizes(image_size, grid=grid)
    every = zip(
        samples,
        sizes_px,
        times or [1] * len(samples),
        reference_sizes_px or [()] * len(samples),
        strict=True,
    )
    return tuple(
        Item(
            sample,
            nearest(size_px, sizes),
            repeat,
            reference_sizes=tuple(nearest(other_px, sizes) for other_px in others_px),
        )
        for sample, size_px, count, others_px in every
        for repeat in range(count)
    )


def is_upscaled(picture_size: tuple[int, int], bucket: tuple[int, int]) -> bool:
    """Whether the picture has to be enlarged to cover its bucket."""
    return picture_size[0] < bucket[0] or picture_size[1] < bucket[1]
