"""Picture files to RGB: oriented, in sRGB, on a background, or refused with a reason.

What a file is, is told by its first bytes and never by its suffix; only the formats of `_FACTORIES` are ever
handed to a decoder. Shapes are (height, width) in pixels.
"""

from __future__ import annotations

import codecs
import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sdlab.dataset.colour import to_rgb
from sdlab.dataset.files import open_regular, reason_of
from sdlab.dataset.files import sha256_of as sha256_of
from sdlab.dataset.tree import SUFFIXES as SUFFIXES

MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)

# Pillow's classes, not Image.open: that warns or raises above a limit that is global state of the process.
_FACTORIES: dict[str, Callable[[IO[bytes], str], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
# What decoders were seen to raise at broken files.
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AssertionError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """A picture that cannot be used; the text is the reason."""


def read_size(path: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) as seen, that is after EXIF orientation, from the header alone.

    Raises Unusable where the file is no picture or has more than `max_pixels`.
    """
    with _opened(path, max_pixels) as image:
        return _seen_size(image.size, _orientation(image))


def looks_whole(path: str) -> bool:
    """Whether the file has the end its format wants. One that has not may be cut off: only decoding tells.

    Raises Unusable where it cannot be read at all.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
            length = file.seek(0, io.SEEK_END)
            file.seek(max(0, length - 64))
            tail = file.read().rstrip(b"\0\r\n")
    except OSError as reason:
        raise Unusable(reason_of(reason)) from reason
    kind = _kind(head)
    if kind in _ENDS:
        return tail.endswith(_ENDS[kind])
    stated = {"WEBP": int.from_bytes(head[4:8], "little") + 8, "BMP": int.from_bytes(head[2:6], "little")}
    return kind in stated and stated[kind] <= length


def open_picture(
    path: str,
    *,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    at_least_px: tuple[int, int] | None = None,
    margin: float = 2.0,
) -> Image.Image:
    """The first frame in mode RGB: EXIF orientation applied, ICC to sRGB, on `background` where transparent.

    16-bit and float pictures are scaled to 8 bits, CMYK is converted. With `at_least_px` a JPEG may come out
    smaller by 2, 4 or 8, yet at least `margin` times that (height, width): decoding a 12-megapixel photo for
    512 px then takes 71 in place of 207 ms. Raises Unusable with the reason, before decoding if over `max_pixels`.
    """
    with _opened(path, max_pixels) as image:
        orientation = _orientation(image)
        if at_least_px is not None:
            height, width = _seen_size((at_least_px[1], at_least_px[0]), orientation)
            image.draft(None, (math.ceil(margin * width), math.ceil(margin * height)))
        image.load()
        picture = to_rgb(image, background)
        return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def cover(
    image: Image.Image, size_px: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """The part of the picture in `cover_box`, resized to (height, width); the centre if `place` is left out."""
    height, width = size_px
    if image.size == (width, height):
        return image.copy()
    box = cover_box((image.height, image.width), size_px, place)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def cover_box(
    picture_px: tuple[int, int], size_px: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part of the picture with the shape of `size_px`.

    `place` says where, down and across: 0 is as far up or left as the picture goes, 1 as far down or right.
    """
    height, width = picture_px
    scale = max(size_px[0] / height, size_px[1] / width)
    room_y, room_x = height - size_px[0] / scale, width - size_px[1] / scale
    return (
        max(room_x * place[1], 0),
        max(room_y * place[0], 0),
        min(width - room_x * (1 - place[1]), width),
        min(height - room_y * (1 - place[0]), height),
    )


@contextmanager
def _opened(path: str, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """The header read; what goes wrong in the block, or here, comes out as Unusable."""
    try:
        file = open_regular(path)
    except OSError as reason:
        raise Unusable(reason_of(reason)) from reason
    with file, _quiet():
        head = file.read(64)
        kind = _kind(head)
        factory = _FACTORIES.get(kind) or _heif_factory(kind)
        file.seek(0)
        try:
            image = factory(file, path)
            width, height = image.size
            if width * height > max_pixels:
                raise Unusable(
                    f"{width} x {height} is {width * height / 1e6:.0f} megapixels, "
                    f"over the {max_pixels / 1e6:g} of --max-pixels"
                )
            yield image
        except _FAULTS as reason:
            raise Unusable(f"a damaged {kind} file ({_in_words(reason)})") from reason


def _kind(head: bytes) -> str:
    """The format by a file's first bytes. Raises Unusable with a guess at what it is instead."""
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(brand in brands for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")):
            return "HEIF"
        raise Unusable("not a picture but a video or an unknown format")
    if not head:
        raise Unusable("an empty file (0 bytes)")
    if not head.strip(b"\0"):
        raise Unusable("not a picture: it starts with zero bytes")
    for start, what in _OTHERS:
        if head.lower().lstrip().startswith(start):
            raise Unusable(f"not a picture but {what}")
    raise Unusable("not a picture but text" if _is_text(head) else "not a picture of a known format")


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\r\n" for c in text)


_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_OTHERS = (  # in lower case
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (b"<!doctype html", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML (SVG?)"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a zip archive"),
    (b"8bps", "a Photoshop file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL file"),
    (b"\0\0\0\x0cjp  ", "a JPEG 2000 file"),
    (b"\0\0\x01\0", "an icon"),
    (b"\x1a\x45\xdf\xa3", "a video"),
)


def _heif_factory(kind: str) -> Callable[[IO[bytes], str], ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as reason:
        raise Unusable(f'a {kind} file, which needs: pip install "sdlab[heic]"') from reason
    factory: Callable[[IO[bytes], str], ImageFile.ImageFile] = HeifImageFile
    return factory


def _in_words(reason: BaseException) -> str:
    """The decoder's words, without the addresses and paths some of them hold."""
    words = re.sub(r"<[^>]*>|'[^']*[/\\][^']*'", "", str(reason)).strip(" .:")
    return words if words else type(reason).__name__


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings off in the block. Counted over threads: first in sets, the last restores."""
    global _quiet_depth, _quiet_filters
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_filters is not None:
                _quiet_filters.__exit__(None, None, None)
                _quiet_filters = None


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 to 8, without decoding; 1 where EXIF is missing or broken."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns TIFF itself, its size included
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
        late = _late_exif(
            image
        )  # getexif() of a PNG without it would decode the whole picture to look for it
        if late:
            image.info["exif"] = late
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _FAULTS:
        return 1  # the picture is good, the camera's notes are not
    return value if value in _TURNS else 1


def _late_exif(image: PngImagePlugin.PngImageFile) -> bytes | None:
    """The eXIf chunk of a PNG that stands after the pixels, found by skipping from chunk to chunk."""
    file = image.fp
    assert file is not None
    start = file.tell()
    file.seek(8)
    found = None
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"eXIf":
            found = b"Exif\0\0" + file.read(min(length, 1 << 20))
        if kind in (b"eXIf", b"IEND"):
            break
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(start)
    return found


def _seen_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) of the file to (height, width) as seen."""
    return size if orientation >= 5 else (size[1], size[0])
