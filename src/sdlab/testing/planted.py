"""Pictures with one subject off centre on grounds of many kinds, for measuring where a crop looks.

Also `photo`: a large picture with the statistics of a photograph, for measuring speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sdlab.testing.colours import COLOURS
from sdlab.testing.scenes import generator
from sdlab.testing.shapes import SILHOUETTES, rasterise

GROUNDS = ("flat", "gradient", "texture", "clouds", "clutter")
ASPECTS = (0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0)  # width over height
LONG_PX = 288


@dataclass(frozen=True)
class Planted:
    """A picture and the box of its subject: left, top, right, bottom in pixels as seen."""

    image: Image.Image
    box: tuple[int, int, int, int]
    ground: str


def planted(seed: int) -> Planted:
    """A coloured shape of 15 to 40 % of the shorter side, its middle well off the picture's, on one of GROUNDS."""
    rng = generator(seed, "planted")
    aspect = ASPECTS[seed % len(ASPECTS)]
    size_px = (round(LONG_PX / max(aspect, 1)), round(LONG_PX * min(aspect, 1)))
    ground = GROUNDS[seed // len(ASPECTS) % len(GROUNDS)]
    ground_HWC, ground_rgb = _ground(ground, size_px, rng)
    mask_HW, box = _subject(size_px, rng)
    subject = _far_colour(ground_rgb, rng)
    shading = 1 + 0.12 * _clouds(size_px, rng, 1.5)[..., None]
    pixels = ground_HWC * (1 - mask_HW[..., None]) + subject * shading * mask_HW[..., None]
    pixels = pixels + rng.normal(0, 2, pixels.shape)
    return Planted(_image(pixels), box, ground)


def _subject(
    size_px: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float32], tuple[int, int, int, int]]:
    height, width = size_px
    shape = list(SILHOUETTES)[int(rng.integers(len(SILHOUETTES)))]
    radius = float(rng.uniform(0.075, 0.2)) * min(size_px)
    centre = [float(rng.uniform(1.2 * radius, side - 1.2 * radius)) for side in (width, height)]
    long = int(height > width)
    side = max(size_px)
    off = float(rng.uniform(0.22, 0.5)) * side  # of the middle, along the longer side
    sign = 1 if rng.random() < 0.5 else -1
    centre[long] = float(np.clip(side / 2 + sign * off, 1.2 * radius, side - 1.2 * radius))
    mask_HW = rasterise(
        SILHOUETTES[shape],
        size_px,
        centre_px=(centre[0], centre[1]),
        radius_px=radius,
        tilt_deg=float(rng.uniform(-30, 30)),
        supersample=2,
    )
    rows, columns = np.nonzero(mask_HW.max(axis=1) > 0.1)[0], np.nonzero(mask_HW.max(axis=0) > 0.1)[0]
    return mask_HW, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _ground(
    kind: str, size_px: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The pixels and a colour that stands for them."""
    height, width = size_px
    base = rng.uniform(30, 225, 3).astype(np.float32)
    flat = np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    along = ((xs / width - 0.5) * np.cos(turn) + (ys / height - 0.5) * np.sin(turn))[..., None]
    if kind == "gradient":
        return flat + along * rng.uniform(-90, 90, 3).astype(np.float32), base
    if kind == "texture":
        step = rng.uniform(5, 15)
        waves = np.sin(2 * np.pi * (xs * np.cos(turn) + ys * np.sin(turn)) / step)
        waves = waves * (
            np.sin(2 * np.pi * (ys * np.cos(turn) - xs * np.sin(turn)) / step) if turn > 3 else 1
        )
        return flat + waves[..., None] * rng.uniform(8, 30, 3).astype(np.float32), base
    if kind == "clouds":
        tints = rng.uniform(0.5, 1, 3).astype(np.float32)
        return flat + _clouds(size_px, rng, 1.1)[..., None] * 22 * tints, base
    if kind == "clutter":
        return _clutter(flat + along * 25, base, rng), base
    return flat, base


def _clutter(
    pixels: NDArray[np.float32], base: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Two dozen small blots and strokes of colours not far from the ground's."""
    image = _image(pixels)
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        colour = tuple(int(v) for v in np.clip(base + rng.uniform(-28, 28, 3), 0, 255))
        x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
        across, down = int(rng.integers(3, 25)), int(rng.integers(3, 25))
        if rng.random() < 0.5:
            pen.ellipse((x, y, x + across, y + down), fill=colour)
        else:
            pen.line((x, y, x + across, y + down), fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(image, np.float32)


def _far_colour(ground: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """One of the named colours that a person tells from the ground at once."""
    colours = [np.array(rgb, np.float32) for rgb in COLOURS.values()]
    far = [colour for colour in colours if np.linalg.norm(colour - ground) > 130]
    return far[int(rng.integers(len(far)))]


def _clouds(size_px: tuple[int, int], rng: np.random.Generator, power: float) -> NDArray[np.float32]:
    """Noise with a spectrum of 1 / frequency ** power, mean 0, deviation 1."""
    height, width = size_px
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    shape = frequency.shape
    noise = rng.standard_normal(shape, np.float32) + 1j * rng.standard_normal(shape, np.float32)
    clouds: NDArray[np.float32] = np.fft.irfft2(noise / frequency**power, size_px).astype(np.float32)
    clouds /= clouds.std()
    return clouds


def photo(seed: int, size_px: tuple[int, int] = (3000, 4000)) -> Image.Image:
    """A picture like a photograph in how its detail falls off (1/f), with edges, lettering and grain."""
    rng = generator(seed, "photo")
    height, width = size_px
    common = _clouds(size_px, rng, 1.3)
    pixels = np.stack([128 + 32 * common + 16 * _clouds(size_px, rng, 1.3) for _ in range(3)], axis=-1)
    pixels += (
        np.linspace(-20, 20, width)[None, :, None] + np.linspace(-15, 15, height)[:, None, None]
    ).astype("f4")
    image = _image(pixels)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(height / 33)
    for number in range(18):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        r = int(rng.integers(height // 60, height // 8))
        if number % 3 == 0:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif number % 3 == 1:
            pen.rectangle((x - r, y - r, x + r, y + r // 2), fill=colour)
        else:
            pen.text((x - r, y), "a dog by the river, 1987", fill=colour, font=font)
    grain = rng.standard_normal((height, width, 1), np.float32) * 1.5
    return _image(np.asarray(image, np.float32) + grain)


def _image(pixels: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
