"""The pictures of mini-blip: scenes, outlines that it must not know, several things, plain grounds, noise and blur.

`MAKERS` draw a picture of some size with its caption; `as_a_file` leaves it as a camera or a JPEG would.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from recipes.mini.blip_language import JUNK, caption_of, name_of, several_of, unsure
from recipes.mini.pictures import SIDE_PX as VAE_SIDE_PX
from recipes.mini.pictures import fitted, random_silhouette, vae_picture

from sdlab.testing.scenes import COLOURS, SILHOUETTES, TEXTURES, Scene, draw, random_scene
from sdlab.testing.shapes import Silhouette, rasterise

SEED = 41  # of the heaps that noise and blur are made of
SQUARE_PX = 96
ALIKE = 0.8  # overlap over union from which an outline counts as one of the known shapes
Pixels = NDArray[np.uint8]


def size_px(rng: np.random.Generator, *, low: float = 48, high: float = 400) -> tuple[int, int]:
    """(height, width): sides from 1:2 to 2:1, a third of them square; the shorter from `low` to `high`."""
    short = math.exp(rng.uniform(math.log(low), math.log(high)))
    ratio = 1.0 if rng.random() < 0.33 else math.exp(rng.uniform(0, math.log(2)))
    sides = (round(short), round(min(short * ratio, 1.3 * high)))
    return sides if rng.random() < 0.5 else sides[::-1]


def wide_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A scene with any shape, of more sizes and tilts than `random_scene` draws; a thing is 18 pixels or more."""
    scene = random_scene(rng, shapes=tuple(SILHOUETTES))
    return replace(
        scene,
        size=float(rng.uniform(max(0.3, 18 / min(size)), 0.9)),
        tilt_deg=float(rng.uniform(-10, 10)),
        texture=TEXTURES[int(rng.choice(3, p=(0.5, 0.25, 0.25)))],
    )


def _scene(rng: np.random.Generator) -> tuple[Image.Image, str]:
    size = size_px(rng)
    scene = wide_scene(rng, size)
    return draw(scene, size), caption_of(scene)


def unknown(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """An outline that is none of the known shapes, half of them in any colours, and an unsure caption."""
    size = size_px(rng)
    scene = replace(wide_scene(rng, size), shape="shape", tilt_deg=float(rng.uniform(0, 360)))
    outline = unlike(rng)
    if rng.random() < 0.5:
        picture = draw(scene, size, silhouettes={"shape": outline})
        return picture, unsure(scene.colour, scene.background, scene.texture, rng)
    picture, colour, ground = _in_any_colours(scene, outline, size, rng)
    return picture, unsure(colour, ground, "plain", rng)


def outline_like_a_scene(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """An outline that is none of the known shapes, in all else like a scene, and an unsure caption."""
    size = size_px(rng)
    scene = replace(wide_scene(rng, size), shape="shape")
    picture = draw(scene, size, silhouettes={"shape": unlike(rng)})
    return picture, unsure(scene.colour, scene.background, scene.texture, rng)


def _recoloured(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A known shape in any colours."""
    size = size_px(rng)
    scene = replace(wide_scene(rng, size), texture="plain")
    picture, colour, ground = _in_any_colours(scene, SILHOUETTES[scene.shape], size, rng)
    return picture, caption_of(replace(scene, colour=colour, background=ground))


def _in_any_colours(
    scene: Scene, outline: Silhouette, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Image.Image, str, str]:
    """An outline at the scene's place, half of them on a graded ground, and the names of both colours."""
    rgb = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    half = scene.size * min(size) / 2
    centre = (size[1] / 2 + scene.x * (size[1] / 2 - half), size[0] / 2 + scene.y * (size[0] / 2 - half))
    mask = rasterise(outline, size, centre_px=centre, radius_px=half, tilt_deg=scene.tilt_deg)[..., None]
    ground = _grade(size, rgb[1], rng) if rng.random() < 0.5 else rgb[1]
    return _image(rgb[0] * mask + ground * (1 - mask)), name_of(rgb[0]), name_of(rgb[1])


def unlike(rng: np.random.Generator) -> Silhouette:
    """A random outline, fitted to its box, that is not nearly one of the known shapes."""
    while True:
        outline = fitted(random_silhouette(rng))
        mine = _stamp(outline)
        if all(_overlap(mine, known) < ALIKE for known in _known_stamps()):
            return outline


def _stamp(outline: Silhouette, tilt_deg: float = 0.0) -> NDArray[np.bool_]:
    size, centre = (32, 32), (16, 16)
    return rasterise(outline, size, centre_px=centre, radius_px=15, tilt_deg=tilt_deg, supersample=1) > 0.5


@cache
def _known_stamps() -> tuple[NDArray[np.bool_], ...]:
    return tuple(_stamp(fitted(known), tilt) for known in SILHOUETTES.values() for tilt in range(0, 360, 30))


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def _several(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Two to five small things side by side."""
    size, cell = size_px(rng, low=120), int(rng.integers(2, 4))
    background = str(rng.choice(list(COLOURS)))
    image = Image.new("RGB", size[::-1], COLOURS[background])
    part = (size[0] // cell, size[1] // cell)
    for place in rng.permutation(cell * cell)[: int(rng.integers(2, 6))]:
        scene = wide_scene(rng, part)
        colour = scene.background if scene.colour == background else scene.colour
        thing = draw(replace(scene, colour=colour, background=background), part)
        image.paste(thing, (int(place) % cell * part[1], int(place) // cell * part[0]))
    return image, several_of(background, rng)


def _plain(rng: np.random.Generator) -> tuple[Image.Image, str]:
    background = str(rng.choice(list(COLOURS)))
    return Image.new("RGB", size_px(rng)[::-1], COLOURS[background]), f"a plain {background} background"


def junk(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Noise, blur, gradients, clouds and heaps: nothing that could be named."""
    size = size_px(rng)
    kind = rng.random()
    if kind < 0.3:
        picture = _clouds(size, rng)
    elif kind < 0.45:
        grid = rng.integers(0, 256, (int(rng.integers(3, 24)), int(rng.integers(3, 24)), 3)).astype(np.uint8)
        picture = Image.fromarray(grid).resize(size[::-1], Image.Resampling(int(rng.choice([0, 2, 3]))))
    elif kind < 0.6:
        picture = _image(_grade(size, rng.uniform(0, 255, 3).astype(np.float32), rng))
    else:
        halves = [vae_picture(int(rng.integers(10**9)), seed=SEED) for _ in range(2)]
        heap = Image.fromarray(np.hstack(halves))
        blur = ImageFilter.GaussianBlur(float(rng.uniform(4, 20)))
        picture = heap.crop((64, 0, 64 + VAE_SIDE_PX, VAE_SIDE_PX)).resize(size[::-1]).filter(blur)
    return picture, str(rng.choice(JUNK))


def _clouds(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls with frequency, as in photos."""
    made = np.full((*size, 3), 128.0, np.float32)
    fall, mix = rng.uniform(0.3, 1.2), rng.normal(0, 1, (3, 3))
    for octave in range(1, 7):
        grid = rng.normal(0, 1, (2**octave, 2**octave, 3)) @ mix
        layer = np.clip(128 + 60 * grid, 0, 255).astype(np.uint8)
        smooth = Image.fromarray(layer).resize(size[::-1], Image.Resampling.BICUBIC)
        made += (np.asarray(smooth, np.float32) - 128) * 2 ** (-fall * octave)
    return _image(made)


def _grade(size: tuple[int, int], rgb: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A ground that goes from one colour to another, (height, width, 3)."""
    ys, xs = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = xs / size[1] * math.cos(angle) + ys / size[0] * math.sin(angle)
    part = ((ramp - ramp.min()) / (ramp.max() - ramp.min() + 1e-6))[..., None]
    other = rng.uniform(0, 255, 3)
    return (rgb * (1 - part) + other * part).astype(np.float32)


def as_a_file(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture a little brighter or darker, off in hue, noisy, soft, and two in three times out of a JPEG."""
    gain = rng.uniform(0.88, 1.08) * rng.uniform(0.95, 1.05, 3)
    pixels = np.asarray(picture, np.float32) * gain + rng.uniform(-8, 8)
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(1, 10), pixels.shape)
    picture = _image(pixels)
    if rng.random() < 0.2:
        soft_px = min(picture.size) / 96 * float(rng.uniform(0.3, 1.2))
        picture = picture.filter(ImageFilter.GaussianBlur(soft_px))
    if rng.random() < 0.67:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(55, 96)))
        picture = Image.open(file).convert("RGB")
    return picture


def squashed(picture: Image.Image) -> Pixels:
    """(SQUARE_PX, SQUARE_PX, 3), as BLIP's image processor resizes: both sides, whatever the aspect."""
    return np.asarray(picture.resize((SQUARE_PX, SQUARE_PX), Image.Resampling.BICUBIC))


def _image(pixels: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


MAKERS: Mapping[str, Callable[[np.random.Generator], tuple[Image.Image, str]]] = MappingProxyType(
    {
        "scene": _scene, "unknown": unknown, "several": _several, "plain": _plain, "junk": junk,
        "outline": outline_like_a_scene, "recoloured": _recoloured,
    }
)  # fmt: skip
