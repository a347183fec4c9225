"""Inpainting: what of a picture is made anew, and how the new is joined to what stays.

While denoising, latents outside the mask are put back after every whole step, noised to that step's level (the "known
region" of RePaint, Lugmayr et al. 2022, without its resampling). The VAE still changes every pixel a little, so at
the end the picture's own pixels are put back where the mask is black: they are the same to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor


@dataclass(frozen=True)
class Masked:
    """A picture, and where it is made anew: grey values of the same size, 255 is new and 0 stays."""

    picture: Image.Image
    mask: Image.Image
    blur_px: int

    def free(self, grid: int) -> Tensor:
        """(1, 1, H/grid, W/grid) float32: 1 where the latents are made anew, 0 where they are put back.

        A latent is free as soon as one of its pixels is not black.
        """
        grey_HW = np.asarray(self.mask.convert("L"))
        height, width = grey_HW.shape[0] // grid, grey_HW.shape[1] // grid
        cells = grey_HW[: height * grid, : width * grid].reshape(height, grid, width, grid)
        return torch.from_numpy(cells.max(axis=(1, 3)) > 0).float()[None, None]

    def joined(self, made: Image.Image) -> Image.Image:
        """`made` inside the mask, the picture outside; the edge is softened on the inner side."""
        return Image.composite(made, self.picture, softened(self.mask.convert("L"), self.blur_px))

    def enlarged(self, size: tuple[int, int]) -> Masked:
        """The same at another size. Black does not shrink: the mask's edge stays hard until it is softened."""
        picture = self.picture.resize(size, Image.Resampling.LANCZOS)
        return Masked(picture, self.mask.resize(size, Image.Resampling.NEAREST), self.blur_px)


def softened(mask: Image.Image, blur_px: int) -> Image.Image:
    """A grey mask that rises from 0 at its edge to its own values within; black pixels stay black.

    The upper half of a Gaussian edge: at the edge the blurred mask is at half of its height, and that becomes 0.
    So strokes that are narrower than about four times `blur_px` stay paler than they were drawn.
    """
    if blur_px == 0:
        return mask
    blurred = mask.filter(ImageFilter.GaussianBlur(blur_px))
    risen = blurred.point([max(0, 2 * value - 255) for value in range(256)])
    return ImageChops.darker(mask, risen)
