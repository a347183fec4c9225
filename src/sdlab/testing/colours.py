"""The eight colours of scenes, and OKLab, the perceptual space they are told apart in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]

COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "red": (215, 35, 40),
        "orange": (245, 140, 30),
        "yellow": (250, 222, 60),
        "green": (45, 160, 75),
        "blue": (40, 85, 210),
        "purple": (150, 55, 175),
        "white": (245, 245, 245),
        "black": (25, 25, 25),
    }
)

# https://bottosson.github.io/posts/oklab/
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)


def oklab(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """sRGB in [0, 1], shape (..., 3), to OKLab: lightness in [0, 1], a and b about -0.4 to 0.4."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).astype(np.float32)
    lab: NDArray[np.float32] = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def shade(colour: RGB) -> RGB:
    """The darker shade (lighter for the dark colours) that stripes and dots of a thing are drawn in."""
    light = sum(colour) / 3
    if light < 60:
        return (colour[0] + 60, colour[1] + 60, colour[2] + 60)
    r, g, b = (round(0.74 * c) for c in colour)
    return (r, g, b)
