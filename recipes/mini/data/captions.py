"""captions/: what mini-blip learns from: pictures squashed to 96 x 96 pixels, as BLIP prepares them, with captions."""

from __future__ import annotations

from PIL import Image
from recipes.mini.blip_pictures import MAKERS, as_a_file, squashed
from recipes.mini.data.folders import Dataset, Drawn

from sdlab.testing.scenes import generator

SEED, NUM = 41, 40000
# Known and unknown outlines in about equal parts would teach it to doubt best; scenes are what it must be right about.
KINDS = {
    "scene": 0.62, "unknown": 0.08, "outline": 0.18, "recoloured": 0.05, "several": 0.02, "plain": 0.01, "junk": 0.04,
}  # fmt: skip


def make(number: int) -> Drawn:
    """Picture `number` and its caption."""
    rng = generator(SEED, "caption", number)
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    picture, caption = MAKERS[kind](rng)
    return Drawn(Image.fromarray(squashed(as_a_file(picture, rng))), caption)


CAPTIONS = Dataset("captions", SEED, NUM, make)
