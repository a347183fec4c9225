"""The edges of a picture, as ControlNets for `canny` were trained on.

Canny, A Computational Approach to Edge Detection (1986), in the integers of OpenCV's `cv2.Canny`: what comes out is
equal to it bit for bit, so a published ControlNet sees what it was trained on. Arrays are height by width (HW).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CANNY_LOW, CANNY_HIGH = 100, 200  # what lllyasviel/sd-controlnet-canny is usually given
MAX_THRESHOLD = 1000  # a slope of four levels at each of three rows is 1020 in one direction
_TAN_22 = round((2**0.5 - 1) * 2**15)  # tan(22.5°) in 1/2^15


def canny(picture: Image.Image, *, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> Image.Image:
    """Thin edges of an RGB picture: mode L of the same size, 255 on an edge and 0 elsewhere.

    A slope (3x3 Sobel, |dx| + |dy|, the steepest of the three channels) above `high` is an edge, one above `low` where
    it hangs together with such a one. The lower of the two numbers is taken for `low`.
    """
    import numpy as np

    low, high = min(low, high), max(low, high)
    across_HW, down_HW = _slopes(np.asarray(picture.convert("RGB")))
    steep_HW = np.abs(across_HW) + np.abs(down_HW)
    ridge_HW = (steep_HW > low) & _is_ridge(across_HW, down_HW, steep_HW)
    edges_HW = _connected(ridge_HW, ridge_HW & (steep_HW > high))
    return Image.fromarray(edges_HW.astype(np.uint8) * 255)


def _slopes(pixels_HW3: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's slopes across and down, each pixel's of the channel that is steepest there, the first of equals."""
    import numpy as np

    padded = np.pad(pixels_HW3, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.int32)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across_HW3, down_HW3 = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    channel_HW1 = (np.abs(across_HW3) + np.abs(down_HW3)).argmax(axis=2)[..., None]

    def of(slopes_HW3: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.take_along_axis(slopes_HW3, channel_HW1, axis=2)[..., 0]

    return of(across_HW3), of(down_HW3)


def _is_ridge(across_HW: Any, down_HW: Any, steep_HW: Any) -> NDArray[np.bool_]:
    """Where no neighbour along the slope, which is rounded to one of four directions, is steeper."""
    import numpy as np

    around = np.pad(steep_HW, 1)
    height, width = steep_HW.shape

    def beside(down: int, right: int) -> Any:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, tall = np.abs(across_HW) * _TAN_22, np.abs(down_HW) << 15
    level = tall < flat
    upright = ~level & (tall > flat + (np.abs(across_HW) << 16))  # tan(67.5°) = tan(22.5°) + 2
    falling = (across_HW ^ down_HW) < 0
    rising_ridge = (steep_HW > beside(-1, -1)) & (steep_HW > beside(1, 1))
    falling_ridge = (steep_HW > beside(-1, 1)) & (steep_HW > beside(1, -1))
    slanting = np.where(falling, falling_ridge, rising_ridge)
    level_ridge = (steep_HW > beside(0, -1)) & (steep_HW >= beside(0, 1))
    upright_ridge = (steep_HW > beside(-1, 0)) & (steep_HW >= beside(1, 0))
    ridge: NDArray[np.bool_] = np.where(level, level_ridge, np.where(upright, upright_ridge, slanting))
    return ridge


def _connected(there_HW: NDArray[np.bool_], sure_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of `there_HW` that a chain of neighbours, corners too, joins to one of `sure_HW`."""
    import numpy as np

    width = there_HW.shape[1] + 2
    open_, found = np.pad(there_HW, 1).ravel(), np.pad(sure_HW, 1).ravel()
    steps = np.array([down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right])
    open_[found] = False
    reached = np.flatnonzero(found)
    while len(reached):
        near = (reached[:, None] + steps).ravel()
        reached = np.unique(near[open_[near]])
        open_[reached] = False
        found[reached] = True
    return found.reshape(-1, width)[1:-1, 1:-1]
