"""A dataset that is drawn at once, for tests. A module of its own: worker processes import it."""

from __future__ import annotations

import time

from PIL import Image
from recipes.mini.data.folders import PART, Dataset, Drawn


def picture(number: int) -> Drawn:
    return Drawn(Image.new("RGB", (16, 16), (number % 256, 0, 0)), f"number {number}")


def slow_picture(number: int) -> Drawn:
    time.sleep(0.002)
    return picture(number)


PLAIN = Dataset("plain", 1, 3 * PART - 100, picture)
