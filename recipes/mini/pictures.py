"""What the drawn datasets are made of: random outlines, named outlines, and heaps of outlines for the VAE."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdlab.testing.scenes import BASE_SHAPES, COLOURS, SILHOUETTES, draw, generator, random_scene
from sdlab.testing.shapes import Part, Silhouette, box, hole, oval, rasterise

SIDE_PX = 128
Pixels = NDArray[np.uint8]


def words() -> list[str]:
    """The common words of words.txt, sorted, without duplicates."""
    lines = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines if not line.startswith("#") for word in line.split()})


def random_silhouette(rng: np.random.Generator) -> Silhouette:
    """An outline that looks like no scene's shape: a polygon, a blob or a cluster, often mirrored, maybe with a
    hole."""
    kind = rng.choice(["polygon", "blob", "cluster"])
    if kind == "polygon":
        parts = [_polygon(rng)]
    elif kind == "blob":
        parts = [_blob(rng)]
    else:
        parts = _cluster(rng)
    if rng.random() < 0.5:
        parts = parts + [_mirrored(part) for part in parts]
    if rng.random() < 0.3:
        parts = [*parts, hole(oval(0, float(rng.uniform(-0.2, 0.2)), 0.22, float(rng.uniform(0.15, 0.35))))]
    return tuple(parts)


def _polygon(rng: np.random.Generator) -> Part:
    corners = int(rng.integers(3, 10))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.3, 1.0, corners)
    return Part(tuple(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True)))


def _blob(rng: np.random.Generator) -> Part:
    angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    waves = [rng.normal(0, 0.5 / k) * np.cos(k * angles + rng.uniform(0, 2 * math.pi)) for k in range(1, 6)]
    radii = np.clip(0.6 + 0.4 * np.sum(waves, axis=0), 0.15, 1.0)
    return Part(tuple(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True)))


def _cluster(rng: np.random.Generator) -> list[Part]:
    parts = [oval(0, 0, float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.2, 0.5)))]
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.uniform(-0.6, 0.6, 2).tolist()
        rx, ry = rng.uniform(0.15, 0.45, 2).tolist()
        parts.append(oval(x, y, rx, ry) if rng.random() < 0.5 else box(x - rx, y - ry, x + rx, y + ry))
        parts.append(Part(((0.12, 0.12), (-0.12, -0.12), (x, y))))  # joins it to the middle
    return parts


def _mirrored(part: Part) -> Part:
    return Part(tuple((-x, y) for x, y in part.points), part.filled)


def named_silhouettes(seed: int, num: int, *, taken: set[str]) -> dict[str, Silhouette]:
    """`num` random silhouettes, each with a common word that is not `taken` for a name: they teach mini-sd to
    bind any word to any outline."""
    free = [word for word in words() if word not in taken]
    names = generator(seed, "names").permutation(free)[:num].tolist()
    return {name: fitted(random_silhouette(generator(seed, "silhouette", name))) for name in names}


def fitted(silhouette: Silhouette) -> Silhouette:
    """The silhouette moved and scaled to fill its box."""
    points = np.array([point for part in silhouette if part.filled for point in part.points])
    low, high = points.min(axis=0), points.max(axis=0)
    centre, scale = (low + high) / 2, 1.9 / float((high - low).max())
    return tuple(
        Part(tuple(((x - centre[0]) * scale, (y - centre[1]) * scale) for x, y in part.points), part.filled)
        for part in silhouette
    )


def vae_picture(index: int, *, seed: int) -> Pixels:
    """A picture for the VAE, (SIDE_PX, SIDE_PX, 3): a plain scene, or one to four textured outlines in any
    colours on a flat, graded or rough background."""
    rng = generator(seed, "vae", index)
    if rng.random() < 0.4:
        return np.asarray(draw(random_scene(rng), (SIDE_PX, SIDE_PX)))
    pixels = _ground(rng)
    for _ in range(int(rng.integers(1, 5))):
        outline = SILHOUETTES[str(rng.choice(BASE_SHAPES))] if rng.random() < 0.3 else random_silhouette(rng)
        centre = (float(rng.uniform(16, 112)), float(rng.uniform(16, 112)))
        mask = rasterise(
            outline, (SIDE_PX, SIDE_PX), centre_px=centre, radius_px=float(rng.uniform(8, 60)),
            tilt_deg=float(rng.uniform(0, 360)), supersample=3,
        )[..., None]  # fmt: skip
        pixels = pixels * (1 - mask) + _filling(rng) * mask
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    if rng.random() < 0.5:
        return np.array(list(COLOURS.values())[int(rng.integers(len(COLOURS)))], np.float32)
    return rng.uniform(0, 255, 3).astype(np.float32)


def _ramp(rng: np.random.Generator) -> NDArray[np.float32]:
    ys, xs = np.mgrid[0:SIDE_PX, 0:SIDE_PX].astype(np.float32) / SIDE_PX - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    ramp: NDArray[np.float32] = (xs * math.cos(angle) + ys * math.sin(angle)).astype(np.float32)[..., None]
    return ramp


def _ground(rng: np.random.Generator) -> NDArray[np.float32]:
    flat = np.broadcast_to(_colour(rng), (SIDE_PX, SIDE_PX, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.6:
        return flat
    if kind < 0.85:
        part = np.clip(_ramp(rng) + 0.5, 0, 1)
        return (flat * (1 - part) + _colour(rng) * part).astype(np.float32)
    coarse = rng.normal(0, rng.uniform(3, 25), (SIDE_PX // 8, SIDE_PX // 8, 3))
    return flat + np.kron(coarse, np.ones((8, 8, 1))).astype(np.float32)


def _filling(rng: np.random.Generator) -> NDArray[np.float32]:
    colour = np.broadcast_to(_colour(rng), (SIDE_PX, SIDE_PX, 3)).astype(np.float32)
    if rng.random() < 0.6:
        return colour
    waves = np.sin(_ramp(rng) * float(rng.uniform(20, 90)))
    if rng.random() < 0.5:
        waves = waves * np.sin(_ramp(rng) * float(rng.uniform(20, 90)))
    return np.where(waves > 0, colour, 0.5 * colour + 0.5 * _colour(rng)).astype(np.float32)
