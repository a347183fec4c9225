"""A picture and its recipe as the bytes of a PNG, JPEG or WebP, and the recipe out of such a file.

PNG: two text chunks, `sdlab` (iTXt) with the whole recipe as JSON and `parameters` for other programs. JPEG and
WebP: `parameters` in EXIF's UserComment, where A1111 writes it, and the JSON in the MakerNote, which is meant for the
maker's own notes. None holds a time, so the same recipe and picture give the same bytes.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sdlab.errors import SdlabError
from sdlab.inference.record import segments
from sdlab.inference.record.infotext import parameters
from sdlab.inference.record.segments import MAKER_NOTE, USER_COMMENT, Broken
from sdlab.inference.spec import Format

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "sdlab"
_UNICODE, _PLAIN, _PACKED = b"UNICODE\0", b"sdlab\0", b"sdlabz\0"
LARGE_BYTES = 8 << 10  # of JSON: above it is packed, below it can be read in any viewer
JPEG_EXIF_BYTES = 65_533 - len(segments.EXIF)  # a segment's length is written in 16 bits
WEBP_PX = 16_383  # a side


@dataclass(frozen=True)
class Found:
    """The texts in a picture; None for one that it does not hold."""

    recipe: str | None  # JSON, not yet checked
    parameters: str | None


def encoded(image: Image.Image, recipe: Mapping[str, Any], format: Format) -> bytes:
    """The bytes of the picture's file, its recipe inside.

    Raises SdlabError where the format cannot hold it: a JPEG a recipe of more than 64 KB, a WebP a side of more than
    16,383 pixels.
    """
    if format.name == "png":
        return png(image, texts(recipe))
    block = _block(recipe)
    buffer = io.BytesIO()
    if format.name == "jpeg":
        _check_jpeg(block)
        settings = {"quality": format.quality, "subsampling": 0, "progressive": False, "optimize": False}
        image.save(buffer, "JPEG", exif=segments.EXIF + block, **settings)
        return buffer.getvalue()
    if max(image.size) > WEBP_PX:
        raise SdlabError(
            f"{image.width}x{image.height} is more than a WebP holds",
            where="--format webp",
            next_step="Use --format png",
        )
    image.save(
        buffer,
        "WEBP",
        exif=block,
        quality=format.quality,
        lossless=format.quality == 100,
        exact=True,
        method=4,
    )
    return buffer.getvalue()


def check_fits(recipe: Mapping[str, Any], format: Format) -> None:
    """Raises SdlabError as `encoded` where a file of that format cannot hold the recipe; takes no picture."""
    if format.name == "jpeg":
        _check_jpeg(_block(recipe))


def _check_jpeg(block: bytes) -> None:
    if len(block) > JPEG_EXIF_BYTES:
        raise SdlabError(
            "the recipe is too long for a JPEG, which holds 64 KB beside the picture",
            where="--format jpeg",
            next_step="Use --format png or webp",
        )


def png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """The picture as PNG bytes with the given text chunks; nothing else goes in (no profile, no EXIF)."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in texts.items():
        if name == CHUNK:
            chunks.add_itxt(name, text)
        else:
            chunks.add_text(name, text)  # tEXt where Latin-1 will do, as other programs write it, else iTXt
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def texts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Both text chunks of a PNG."""
    return {"parameters": parameters(recipe), CHUNK: to_json(recipe)}


def to_json(recipe: Mapping[str, Any]) -> str:
    """One line of JSON, as readable as can be: file names that are not UTF-8 make all of it ASCII."""
    text = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(recipe, ensure_ascii=True, sort_keys=True)
    return text


def _block(recipe: Mapping[str, Any]) -> bytes:
    plain = to_json(recipe).encode("utf-8")
    note = _PLAIN + plain if len(plain) <= LARGE_BYTES else _PACKED + zlib.compress(plain, 9)
    comment = _UNICODE + parameters(recipe).encode("utf-16-be")
    return segments.exif_block({MAKER_NOTE: note, USER_COMMENT: comment})


def found_in(path: Path) -> Found:
    """The texts in a PNG, JPEG or WebP; no pixel is decoded.

    Raises SdlabError where there is no such file, it is of another kind, cut off before the texts or damaged.
    """
    try:
        if not path.is_file():
            raise SdlabError("there is no such picture", where=str(path))
        with open(path, "rb") as file:
            return _found(file, path)
    except OSError as reason:
        raise SdlabError(f"cannot read the picture ({reason.strerror})", where=str(path)) from reason
    except Broken as reason:
        raise SdlabError(f"cannot read the picture ({reason})", where=str(path)) from reason


def _found(file: BinaryIO, path: Path) -> Found:
    start = file.read(12)
    if start.startswith(segments.PNG):
        file.seek(len(segments.PNG))
        found = segments.png_texts(file)
        return Found(found.get(CHUNK), found.get("parameters"))
    if start.startswith(segments.JPEG):
        file.seek(2)
        return _in_exif(segments.jpeg_exif(file))
    if start.startswith(segments.RIFF) and start.endswith(segments.WEBP):
        return _in_exif(segments.webp_exif(file))
    raise SdlabError("not a PNG, JPEG or WebP, which hold recipes", where=str(path))


def _in_exif(block: bytes) -> Found:
    values = segments.exif_values(block)
    comment, note = values.get(USER_COMMENT, b""), values.get(MAKER_NOTE, b"")
    said = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace") if comment else None
    if note.startswith(_PACKED):
        note = _PLAIN + segments.unpacked(note.removeprefix(_PACKED))
    if not note.startswith(_PLAIN):
        return Found(None, said)
    try:
        return Found(note.removeprefix(_PLAIN).decode("utf-8"), said)
    except UnicodeDecodeError as reason:
        raise Broken("its recipe is damaged") from reason
