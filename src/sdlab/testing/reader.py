"""Reads shape, colour and background back from the pixels of a picture of one thing on a flat background."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlab.testing.colours import COLOURS, oklab
from sdlab.testing.shapes import SILHOUETTES, rasterise

Mask = NDArray[np.float32]

WORK_PX = 64  # longer side of the picture that is read: averages noise away and bounds the time
GRID = 28  # side of the normalised masks that are compared
SPREAD = 2.6  # half a normalised mask's side, in root-mean-square radii of the mask
TILTS_DEG = (-12.0, -6.0, 0.0, 6.0, 12.0)
MIN_CONTRAST = 0.10  # OKLab distance between thing and background; the closest two colours are 0.13 apart
MIN_OVERLAP = 0.74  # intersection over union with the best silhouette; noise stays below 0.6
MAX_COLOUR_DISTANCE = 0.16  # OKLab distance to the palette, beyond which a colour has no name


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it cannot be told. `confidence` is the overlap with the shape."""

    shape: str | None
    colour: str | None
    background: str | None
    confidence: float  # intersection over union, 0 to 1


UNREADABLE = Reading(None, None, None, 0.0)


def read(picture: Image.Image) -> Reading:
    """The thing's shape and colour and the background's colour, each None where there is none to see."""
    lab = _small_lab(picture)
    border = _border(lab)
    background_lab = np.median(border, axis=0)
    flat = float(np.mean(np.linalg.norm(border - background_lab, axis=1) < MIN_CONTRAST))
    if flat < 0.7:
        return UNREADABLE
    background = _name(background_lab)
    distance = np.linalg.norm(lab - background_lab, axis=2)
    mask = _thing(distance)
    if mask is None:
        return Reading(None, None, background, 0.0)
    inner = _eroded(mask)
    colour = _name(np.median(lab[inner if inner.sum() >= 12 else mask], axis=0))
    shape, overlap = _match(mask.astype(np.float32))
    return Reading(shape, colour, background, overlap)


def _small_lab(picture: Image.Image) -> NDArray[np.float32]:
    rgb = picture.convert("RGB")
    factor = WORK_PX / max(rgb.size)
    size = (max(8, round(rgb.width * factor)), max(8, round(rgb.height * factor)))
    return oklab(np.asarray(rgb.resize(size, Image.Resampling.BOX), np.float32) / np.float32(255))


def _border(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([lab[:2].reshape(-1, 3), lab[-2:].reshape(-1, 3), lab[:, :2].reshape(-1, 3),
                           lab[:, -2:].reshape(-1, 3)])  # fmt: skip


def _name(lab: NDArray[np.float32]) -> str | None:
    names, palette = _palette()
    distances = np.linalg.norm(palette - lab, axis=1)
    nearest = int(np.argmin(distances))
    return names[nearest] if distances[nearest] <= MAX_COLOUR_DISTANCE else None


@cache
def _palette() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    return tuple(COLOURS), oklab(np.array(list(COLOURS.values()), np.float32) / np.float32(255))


def _thing(distance: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """The largest connected region unlike the background; None where there is none of a fair size."""
    seen = distance > MIN_CONTRAST
    if not 0.01 < seen.mean() < 0.85:
        return None
    contrast = float(np.median(distance[seen]))
    region = _largest_region(distance > max(0.45 * contrast, 0.6 * MIN_CONTRAST))
    return region if 0.015 < region.mean() < 0.8 else None


def _largest_region(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 4-connected region of a mask, by joining the runs of its rows."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        here: list[int] = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            here.append(len(runs))
            parent.append(len(runs))
            runs.append((y, start, stop))
            for i in above:
                if runs[i][1] < stop and start < runs[i][2]:
                    parent[root(i)] = root(here[-1])
        above = here
    areas: dict[int, int] = {}
    for i, (_, start, stop) in enumerate(runs):
        areas[root(i)] = areas.get(root(i), 0) + stop - start
    largest = max(areas, key=lambda r: areas[r], default=-1)
    region = np.zeros_like(mask)
    for i, (y, start, stop) in enumerate(runs):
        if root(i) == largest:
            region[y, start:stop] = True
    return region


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _match(mask: Mask) -> tuple[str | None, float]:
    """The silhouette that overlaps most with the mask and by how much; None below `MIN_OVERLAP`."""
    names, templates = _templates()
    seen = _normalised(mask).ravel()
    overlaps = np.minimum(templates, seen).sum(axis=1) / np.maximum(templates, seen).sum(axis=1)
    best = int(np.argmax(overlaps))
    return (names[best] if overlaps[best] >= MIN_OVERLAP else None), float(overlaps[best])


@cache
def _templates() -> tuple[tuple[str, ...], Mask]:
    size_px, centre_px = (WORK_PX, WORK_PX), (WORK_PX / 2, WORK_PX / 2)
    masks = [
        rasterise(silhouette, size_px, centre_px=centre_px, radius_px=0.34 * WORK_PX, tilt_deg=tilt)
        for silhouette in SILHOUETTES.values()
        for tilt in TILTS_DEG
    ]
    names = tuple(name for name in SILHOUETTES for _ in TILTS_DEG)
    return names, np.stack([_normalised(mask).ravel() for mask in masks])


def _normalised(mask: Mask) -> Mask:
    """The mask moved to its centroid and scaled to one root-mean-square radius, (GRID, GRID) in [0, 1]."""
    height, width = mask.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    total = float(mask.sum())
    cx, cy = float((mask * xs).sum()) / total, float((mask * ys).sum()) / total
    radius = float(np.sqrt((mask * ((xs - cx) ** 2 + (ys - cy) ** 2)).sum() / total))
    half = SPREAD * radius
    box = (cx - half, cy - half, cx + half, cy + half)
    image = Image.fromarray((255 * mask).astype(np.uint8))
    warped = image.transform((GRID * 2, GRID * 2), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(warped.resize((GRID, GRID), Image.Resampling.BOX), np.float32) / np.float32(255)
