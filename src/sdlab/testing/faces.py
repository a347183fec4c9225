"""A drawn face, seen from the front with light from above, as a face detector knows them."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter

_DRAWN = 4  # times larger than it comes out
Colour = tuple[int, int, int]

HAIR, SKIN, LIGHT, SHADE, BROW = (50, 35, 25), (225, 180, 150), (232, 190, 160), (165, 115, 92), (60, 40, 30)
WHITE, PUPIL, CHEEK, LIP, NOSTRIL = (
    (245, 240, 235),
    (40, 25, 20),
    (232, 165, 140),
    (170, 75, 75),
    (130, 80, 65),
)


def face(radius_px: int, *, ground: Colour = (90, 110, 120)) -> Image.Image:
    """A head of about two radii by two and a half, in a picture of 2.4 by 3 radii on `ground`."""
    unit = radius_px * _DRAWN
    image = Image.new("RGB", (int(2.4 * unit), 3 * unit), ground)
    pen = ImageDraw.Draw(image)
    middle_x, middle_y = image.width / 2, image.height / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return middle_x + x * unit, middle_y + y * unit

    def oval(x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        pen.ellipse((*at(x - rx, y - ry), *at(x + rx, y + ry)), fill=colour)

    oval(0, -0.25, 0.95, 1.1, HAIR)
    pen.rectangle((*at(-0.35, 0.7), *at(0.35, 1.5)), fill=(190, 140, 115))
    oval(0, 0.05, 0.78, 1.02, SKIN)
    oval(0, -0.55, 0.66, 0.35, LIGHT)
    for side in (-0.33, 0.33):
        oval(side, -0.12, 0.24, 0.15, SHADE)
        oval(side, -0.08, 0.17, 0.085, WHITE)
        oval(side, -0.08, 0.085, 0.085, PUPIL)
        brow = [at(side - 0.2, -0.27), at(side, -0.34), at(side + 0.2, -0.27)]
        pen.line(brow, fill=BROW, width=int(0.07 * unit))
        oval(1.5 * side, 0.3, 0.18, 0.16, CHEEK)
    pen.polygon([at(0, -0.1), at(-0.13, 0.3), at(0.13, 0.3)], fill=(212, 162, 135))
    oval(-0.08, 0.3, 0.05, 0.035, NOSTRIL)
    oval(0.08, 0.3, 0.05, 0.035, NOSTRIL)
    oval(0, 0.58, 0.28, 0.09, LIP)
    pen.line([at(-0.27, 0.58), at(0.27, 0.58)], fill=(110, 40, 45), width=int(0.035 * unit))
    small = image.resize((image.width // _DRAWN, image.height // _DRAWN), Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.GaussianBlur(radius_px * 0.03))
