"""Any mode of picture to 8-bit sRGB: deep greys, colour profiles, transparency.

Arrays are height by width (HW).
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

from PIL import Image, ImageCms, ImageColor

from sdlab.errors import SdlabError

if TYPE_CHECKING:
    import numpy as np


def colour_of(text: str) -> tuple[int, int, int]:
    """Red, green, blue in 0..255 of a colour's name or ``#rrggbb``. Raises SdlabError for anything else."""
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError as reason:
        raise SdlabError(
            f"unknown colour '{text}'",
            where="--background",
            next_step="Give a name or a code, as white or #7f7f7f",
        ) from reason
    return red, green, blue


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A decoded picture in mode RGB and sRGB, on `background` where it is transparent.

    Raises ValueError for a mode that cannot be converted, or floats of which none is finite.
    """
    profile = image.info.get("icc_profile")
    image = _eight_bit(image)
    alpha = None
    if image.mode in ("LA", "La"):
        image = image.convert("LA")
        image, alpha = image.getchannel("L"), image.getchannel("A")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    picture = _to_srgb(image, profile)
    if alpha is None:
        return picture
    base = Image.new("RGB", picture.size, background)
    base.paste(picture, mask=alpha)
    return base


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits, 32 bits or floats as L or LA; others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np

    values_HW = np.asarray(image)
    transparent = image.info.get("transparency")
    grey = Image.fromarray(_to_bytes(values_HW, deep=image.mode.startswith("I;16")))
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_bytes(values_HW: np.ndarray, *, deep: bool) -> np.ndarray:
    """To uint8. White is 65535 if `deep`, else the least of 1 (float), 255, 65535, peak that fits."""
    import numpy as np

    is_float = values_HW.dtype.kind == "f"
    if is_float and not np.isfinite(values_HW).any():
        raise ValueError("no pixel is a finite number")
    finite_HW = np.nan_to_num(values_HW.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(finite_HW.max())
    whites = [65535.0] if deep else [1.0, 255.0, 65535.0, peak] if is_float else [255.0, 65535.0, peak]
    white = next(white for white in whites if peak <= white)
    bytes_HW: np.ndarray = np.rint(np.clip(finite_HW / white, 0, 1) * 255).astype(np.uint8)
    return bytes_HW


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture without alpha in sRGB, mode RGB; a profile that is broken or does not fit is ignored."""
    if image.mode == "LAB":
        profile = profile or b""
    elif image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile is not None else None
    if transform is not None:
        converted = transform.apply(image)
        return converted
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Profile to sRGB for pictures of `mode`; None if it changes nothing, is broken or does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode == "RGB":
        levels = (0, 64, 128, 192, 255)
        probe = Image.frombytes(
            "RGB", (25, 5), bytes(c for r in levels for g in levels for b in levels for c in (r, g, b))
        )
        changed = transform.apply(probe).tobytes()
        if max(abs(a - b) for a, b in zip(changed, probe.tobytes(), strict=True)) <= 1:
            return None  # sRGB under one of its many names: most pictures, and a third of the time saved
    return transform
