"""Where to look in a picture: a map of what stands out, or of faces, and the window that holds most of it.

Maps are small float arrays, height by width (HW), with a sum of 1. C are the three channels of CIELAB.

    Achanta, Hemami, Estrada, Süsstrunk 2009, "Frequency-tuned salient region detection"
    Hou, Zhang 2007, "Saliency detection: a spectral residual approach"
    Wei, Wen, Zhu, Sun 2012, "Geodesic saliency using background priors": the border is mostly background
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlab.dataset.picture import cover_box

Map = NDArray[np.float32]
Place = tuple[float, float]  # down and across, 0 to 1
Look = Callable[[Image.Image], tuple[Map | None, str]]  # a map, None for the centre; and what it goes by

CENTER: Place = (0.5, 0.5)

SIDE_PX = 64  # longer side that a picture is looked at in: 3 ms, and a subject of 5 % is still 5 pixels
_SPECTRAL_PX = 64  # as in the paper
_EVEN = 1e-4  # a thousandth of what a small subject adds up to: decides where there is nothing to see


def saliency(image: Image.Image) -> Map:
    """What stands out in an RGB picture, SIDE_PX on the longer side; even where nothing does.

    The mean of three maps: distance of each colour from the picture's mean (Achanta 2009), distance from
    the colours of its border, and the spectral residual of its lightness (Hou 2007), the second counting double.
    """
    small = reduced(image, SIDE_PX)
    lab_HWC = _lab(small)
    parts = (_tuned(lab_HWC), 2 * _unlike_border(lab_HWC), _residual(lab_HWC[..., 0]))
    total_HW = _smooth(sum(parts[1:], parts[0]), 1.5)
    clear_HW = np.clip(total_HW - np.median(total_HW), 0, None) ** 2  # the ground's own unrest counts little
    return normalised(clear_HW + _EVEN)


def looker(kind: str) -> Look:
    """What tells where to look: `saliency`, `face` or `center`. Raises SdlabError where `face` lacks OpenCV."""
    if kind == "face":
        from sdlab.curate.crop.faces import Faces

        return Faces()
    return see_saliency if kind == "saliency" else _see_nothing


def place(
    image: Image.Image, picture_px: tuple[int, int], size_px: tuple[int, int], look: Look
) -> tuple[Place, str]:
    """Where to cut a picture of (height, width) `picture_px` to the shape of `size_px`, and what that goes by.

    `image` is the picture, perhaps smaller. See dataset.picture.cover_box for what a place is.
    """
    left, top, right, bottom = cover_box(picture_px, size_px)
    kept = ((bottom - top) / picture_px[0], (right - left) / picture_px[1])
    if min(kept) > 1 - 1e-6:
        return CENTER, "center"
    map_HW, by = look(image)
    return (CENTER if map_HW is None else best_place(map_HW, kept)), by


def see_saliency(image: Image.Image) -> tuple[Map | None, str]:
    """A Look that goes by what stands out."""
    return saliency(image), "saliency"


def _see_nothing(image: Image.Image) -> tuple[Map | None, str]:
    return None, "center"


def normalised(map_HW: NDArray[np.floating]) -> Map:
    """The map with a sum of 1; even where it was zero."""
    total = float(map_HW.sum())
    even = np.full(map_HW.shape, 1 / map_HW.size, np.float32)
    return (map_HW / total).astype(np.float32) if total > 1e-9 else even


def best_place(map_HW: Map, kept: tuple[float, float], *, near: float = 0.02) -> tuple[float, float]:
    """Where to put a window of the fractions `kept` (of the height and the width): down and across, 0 to 1.

    The window that holds most of the map; of those that hold as much but for `near`, the one with the map's
    centre of mass nearest to its middle. 0.5 in a direction with no room.
    """
    down = _slid(map_HW.sum(axis=1), kept[0], near)
    across = _slid(map_HW.sum(axis=0), kept[1], near)
    return down, across


def _slid(weights_N: NDArray[np.float32], kept: float, near: float) -> float:
    """The best of 201 places of a window over one axis, by the running sum of the weights along it."""
    room = 1 - kept
    if room < 1e-6:
        return 0.5
    edges = np.linspace(0, 1, len(weights_N) + 1)
    sums = np.concatenate([[0], np.cumsum(weights_N, dtype=np.float64)])
    places = np.linspace(0, 1, 201)
    held = np.interp(places * room + kept, edges, sums) - np.interp(places * room, edges, sums)
    middle = float((weights_N * (edges[:-1] + edges[1:]) / 2).sum() / sums[-1])
    off = np.abs(places * room + kept / 2 - middle)
    good = held >= held.max() - near * sums[-1]
    return float(places[good][np.argmin(off[good])])


def reduced(image: Image.Image, side_px: int) -> Image.Image:
    """The picture with a longer side of at most `side_px`, quickly: by whole steps first."""
    scale = max(image.size) / side_px
    if scale <= 1:
        return image
    size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)


def _tuned(lab_HWC: NDArray[np.float32]) -> Map:
    return _stretched(np.linalg.norm(lab_HWC - lab_HWC.mean(axis=(0, 1)), axis=-1), least=5.0)


def _unlike_border(lab_HWC: NDArray[np.float32]) -> Map:
    """How far each colour is from what the border makes one expect at its place, in the border's own spread.

    The border is fitted by a plane for each channel, twice, the second time without what fitted worst: a thing
    that touches the border. Gradients are fitted by the plane; texture and noise are in the spread.
    """
    height, width, _ = lab_HWC.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = ys / max(height - 1, 1) * 2 - 1, xs / max(width - 1, 1) * 2 - 1
    terms_HWT = np.stack([np.ones_like(x), x, y], axis=-1)
    depth = max(2, round(0.06 * min(height, width)))
    rim = np.ones((height, width), bool)
    rim[depth : height - depth, depth : width - depth] = False
    terms, colours = terms_HWT[rim], lab_HWC[rim]
    keep = np.ones(len(terms), bool)
    for _ in range(3):
        fit = np.linalg.solve(*_normal_equations(terms[keep], colours[keep]))
        left = colours - terms @ fit
        spread = np.einsum("nc,nd->cd", left[keep], left[keep]) / keep.sum() + 4.0 * np.eye(
            3
        )  # 2 steps of lightness count for nothing
        far = _whitened(left, spread)
        keep = far <= np.quantile(far, 0.8)
    return _stretched(np.minimum(_whitened(lab_HWC - terms_HWT @ fit, spread), 12.0), least=2.0)


def _normal_equations(
    terms_NT: NDArray[np.float32], values_NC: NDArray[np.float32]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Of least squares with a touch of ridge, so that a picture of one row has a solution too."""
    square = np.einsum("nt,nu->tu", terms_NT, terms_NT) + 1e-3 * np.eye(terms_NT.shape[1])
    return square, np.einsum("nt,nc->tc", terms_NT, values_NC)


def _whitened(left: NDArray[np.float32], spread: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mahalanobis distances of the last axis."""
    inverse = np.linalg.inv(spread)
    far: NDArray[np.float32] = np.sqrt(np.einsum("...i,ij,...j->...", left, inverse, left)).astype(np.float32)
    return far


def _residual(lightness_HW: NDArray[np.float32]) -> Map:
    height, width = lightness_HW.shape
    scale = _SPECTRAL_PX / max(height, width)
    small = Image.fromarray(lightness_HW).resize(
        (max(4, round(width * scale)), max(4, round(height * scale))), Image.Resampling.BILINEAR
    )
    spectrum = np.fft.fft2(np.asarray(small))
    logs = np.log(np.abs(spectrum) + 1e-6).astype(np.float32)
    wrapped = np.pad(logs, 1, mode="wrap")
    rows, columns = logs.shape
    around = sum(wrapped[i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9
    back = np.abs(np.fft.ifft2(np.exp(logs - around + 1j * np.angle(spectrum)))) ** 2
    spots = Image.fromarray(_smooth(back.astype(np.float32), 2.0))
    seen = min(1.0, float(lightness_HW.std()) / 2)  # the residual has no scale: noise would do as well
    return _stretched(np.asarray(spots.resize((width, height), Image.Resampling.BILINEAR))) * np.float32(seen)


def _stretched(map_HW: NDArray[np.floating], least: float = 1e-6) -> Map:
    """From 0 at the median to 1 at the top (the 99.5th percentile, so that one pixel does not set it).

    Lower where the top is less than `least` above the median: nothing that an eye would see.
    """
    low, high = np.quantile(map_HW, (0.5, 0.995))
    stretched: Map = np.clip((map_HW - low) / max(float(high - low), least), 0, 1).astype(np.float32)
    return stretched


def _smooth(values: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Gaussian blur over the first two axes, the kernel scaled up where it is cut off at the edges."""
    rows, columns = _blur(values.shape[0], radius), _blur(values.shape[1], radius)
    smooth: NDArray[np.float32] = np.einsum(
        "ij,jk...->ik...", rows, np.einsum("lk,jk...->jl...", columns, values)
    )
    return smooth


@functools.lru_cache(maxsize=256)
def _blur(length: int, radius: float) -> NDArray[np.float32]:
    """The blur along an axis of so many pixels, as a matrix: at these sizes the quickest way.

    It is applied by einsum, as the threads of a BLAS wait for each other on a busy computer (120 ms, not 0.4).
    """
    places = np.arange(length, dtype=np.float32)
    weights = np.exp(-0.5 * ((places[:, None] - places[None]) / radius) ** 2)
    matrix: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def _lab(image: Image.Image) -> NDArray[np.float32]:
    """CIELAB of an sRGB picture (D65), lightness 0..100."""
    rgb = np.asarray(image, np.float32) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    lab: NDArray[np.float32] = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(
        np.float32
    )
    return lab


_XYZ = np.array(  # linear sRGB to XYZ over the white point D65 (IEC 61966-2-1)
    [
        [0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505],
        [0.2126, 0.7152, 0.0722],
        [0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089],
    ],
    np.float32,
)
