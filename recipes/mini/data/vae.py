"""vae/: pictures for the autoencoder, without captions: scenes and heaps of textured outlines in any colours."""

from __future__ import annotations

from PIL import Image
from recipes.mini.data.folders import Dataset, Drawn
from recipes.mini.pictures import vae_picture

SEED, NUM = 20, 6000


def make(number: int) -> Drawn:
    """Picture `number`, 128 x 128 pixels."""
    return Drawn(Image.fromarray(vae_picture(number, seed=SEED)))


VAE = Dataset("vae", SEED, NUM, make)
