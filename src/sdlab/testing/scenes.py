"""Scenes: a coloured shape on a coloured background, as a picture and as a prompt, and read back from pixels.

Everything that sdlab's mini models learn is drawn here; `score` tells how many pictures show what their
prompts say. numpy and Pillow only, no network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlab.testing.colours import COLOURS, RGB, shade
from sdlab.testing.reader import Reading, read
from sdlab.testing.shapes import BASE_SHAPES, NEW_SHAPES, SILHOUETTES, Silhouette, rasterise

__all__ = [
    "BASE_SHAPES", "COLOURS", "NEW_SHAPES", "PREFIX", "SILHOUETTES", "STYLES", "TEXTURES", "Reading", "Scene",
    "Score", "Wanted", "draw", "generator", "prompt_of", "random_scene", "read", "score", "wanted",
]  # fmt: skip

PREFIX = "(masterpiece), best quality, best composition, "  # what `sdlab generate` puts in front of prompts
TEXTURES = ("plain", "striped", "dotted")
STYLES = ("folders", "split", "photo", "drawing", "short")
MARGIN = 0.05  # of the shorter side, kept free around the thing


@dataclass(frozen=True)
class Scene:
    """One thing on a flat background."""

    shape: str
    colour: str
    background: str
    size: float = 0.65  # width of the thing's box over the shorter side of the picture
    x: float = 0.0  # place in the free room, -1 (left) to 1 (right)
    y: float = 0.0  # -1 (top) to 1 (bottom)
    tilt_deg: float = 0.0
    texture: str = "plain"


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for; None where it does not say."""

    shape: str | None
    colour: str | None
    background: str | None


@dataclass(frozen=True)
class Score:
    """Fractions of pictures, in [0, 1], that show what their prompts say."""

    num: int
    all_three: float
    shape: float
    colour: float
    background: float


def generator(seed: int, *name: object) -> np.random.Generator:
    """A random generator of its own for every (seed, name), the same on every computer."""
    text = "/".join(str(part) for part in (seed, *name))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def random_scene(rng: np.random.Generator, *, shapes: Sequence[str] = BASE_SHAPES) -> Scene:
    """A scene with everything drawn from `rng`; the background is never of the thing's colour."""
    colours = list(COLOURS)
    colour, background = rng.choice(len(colours), 2, replace=False)
    return Scene(
        shape=shapes[int(rng.integers(len(shapes)))],
        colour=colours[colour],
        background=colours[background],
        size=float(rng.uniform(0.45, 0.8)),
        x=float(rng.uniform(-1, 1)),
        y=float(rng.uniform(-1, 1)),
        tilt_deg=float(rng.uniform(-8, 8)),
        texture=TEXTURES[int(rng.choice(3, p=(0.6, 0.2, 0.2)))],
    )


def draw(
    scene: Scene,
    size_px: tuple[int, int] = (128, 128),
    *,
    silhouettes: Mapping[str, Silhouette] = SILHOUETTES,
) -> Image.Image:
    """The picture of a scene, RGB of (height, width) `size_px`, antialiased."""
    height, width = size_px
    short = min(size_px)
    half = scene.size * short / 2
    centre = (
        width / 2 + scene.x * (width / 2 - half - MARGIN * short),
        height / 2 + scene.y * (height / 2 - half - MARGIN * short),
    )
    mask = rasterise(
        silhouettes[scene.shape], size_px, centre_px=centre, radius_px=half, tilt_deg=scene.tilt_deg
    )[..., None]  # fmt: skip
    pattern = _pattern(scene.texture, size_px, centre, half)[..., None]
    colour = COLOURS[scene.colour]
    thing = _rgb(colour) * (1 - pattern) + _rgb(shade(colour)) * pattern
    pixels = thing * mask + _rgb(COLOURS[scene.background]) * (1 - mask)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _rgb(colour: RGB) -> NDArray[np.float32]:
    return np.array(colour, np.float32)


def _pattern(
    texture: str, size_px: tuple[int, int], centre: tuple[float, float], half: float
) -> NDArray[np.float32]:
    """How much of each pixel is in the thing's second shade, (height, width) in [0, 1]."""
    height, width = size_px
    if texture == "plain":
        return np.zeros((height, width), np.float32)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    u, v = (xs - centre[0]) / half, (ys - centre[1]) / half
    edge = 1.0 / half  # a pixel, in units of the silhouette: the width of the soft edge
    if texture == "striped":
        inside = 0.09 - np.abs((u + v) / np.sqrt(2) % 0.48 - 0.24)
    else:
        inside = 0.13 - np.hypot(u % 0.48 - 0.24, v % 0.48 - 0.24)
    pattern: NDArray[np.float32] = np.clip(inside / edge + 0.5, 0, 1).astype(np.float32)
    return pattern


def prompt_of(scene: Scene, style: str = "folders", *, extras: bool = False, prefix: str = "") -> str:
    """The prompt of a scene in one of `STYLES`; `extras` adds what is notable of size, texture and place."""
    adjectives, places = _extras(scene) if extras else ([], [])
    thing, ground = scene.shape.replace("_", " "), f"{scene.background} background"
    if style == "folders":
        return prefix + ", ".join([f"{scene.colour} {thing}", ground, *adjectives, *places])
    if style == "split":
        return prefix + ", ".join([thing, scene.colour, ground, *adjectives, *places])
    named = _with_article(" ".join([*adjectives, scene.colour, thing]))
    if style == "short":
        return prefix + f"{named} on {scene.background}"
    assert style in STYLES, style
    return prefix + f"a {style} of {named} on {_with_article(ground)}"


def _extras(scene: Scene) -> tuple[list[str], list[str]]:
    adjectives = ["large"] * (scene.size > 0.7) + ["small"] * (scene.size < 0.52)
    adjectives += [scene.texture]
    if scene.size > 0.7:  # too little free room to tell a place
        return adjectives, []
    places = ["left"] * (scene.x < -0.6) + ["right"] * (scene.x > 0.6)
    return adjectives, places + ["top"] * (scene.y < -0.6) + ["bottom"] * (scene.y > 0.6)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def wanted(prompt: str, *, shapes: Sequence[str] = tuple(SILHOUETTES)) -> Wanted:
    """Shape, colour and background that a prompt in any of `STYLES` asks for."""
    words = re.findall(r"[a-z]+", prompt.removeprefix(PREFIX).lower())
    ground = _background_at(words)
    colour = next((w for i, w in enumerate(words) if w in COLOURS and i != ground), None)
    shape = next((w for w in words if w in shapes), None)
    return Wanted(shape, colour, None if ground is None else words[ground])


def _background_at(words: Sequence[str]) -> int | None:
    """Where the background's colour stands: before "background", else after "on"."""
    for i, word in enumerate(words):
        before, after = words[max(0, i - 2) : i], words[i + 1 : i + 2]
        if word in COLOURS and (after == ["background"] or "on" in before):
            return i
    return None


def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Score:
    """How many pictures show the shape, the colour, the background and all three that their prompts name."""
    hits = np.array([_hits(read(p), wanted(t)) for p, t in zip(pictures, prompts, strict=True)], bool)
    shape, colour, background = hits.mean(axis=0).tolist()
    return Score(len(hits), float(hits.all(axis=1).mean()), shape, colour, background)


def _hits(seen: Reading, asked: Wanted) -> tuple[bool, bool, bool]:
    return (
        asked.shape is not None and seen.shape == asked.shape,
        asked.colour is not None and seen.colour == asked.colour,
        asked.background is not None and seen.background == asked.background,
    )
