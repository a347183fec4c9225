"""Texts in the bytes of a PNG, JPEG or WebP, found without decoding a pixel.

Files come from anywhere: nothing here trusts a length, unpacks more than MAX_BYTES or raises anything but Broken.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

MAX_BYTES = 16 << 20  # of one text, unpacked; the longest of ours, 1,024 long prompts, is far below
USER_COMMENT, MAKER_NOTE = 0x9286, 0x927C
_EXIF_IFD = 0x8769
PNG, JPEG, RIFF, WEBP, EXIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"WEBP", b"Exif\0\0"


class Broken(ValueError):
    """The bytes are not what their headers say."""


def png_texts(file: BinaryIO) -> dict[str, str]:
    """Every text of a PNG by its keyword, the first of each, from behind the signature on.

    Raises Broken where all of them are more than MAX_BYTES, unpacked: many small packed ones would fill the memory.
    """
    found: dict[str, str] = {}
    total = 0
    while True:
        length, kind = _png_head(file, found)
        if kind in (b"IEND", b""):
            return found
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            data = _exactly(file, length)
            if zlib.crc32(kind + data) != int.from_bytes(_exactly(file, 4), "big"):
                raise Broken("a text in it is damaged")
            key, text = _png_text(kind, data)
            total += len(text)
            if total > MAX_BYTES:
                raise Broken("the texts in it are too large")
            found.setdefault(key, text)
        else:
            file.seek(length + 4, 1)


def _png_head(file: BinaryIO, found: dict[str, str]) -> tuple[int, bytes]:
    """(bytes that follow, kind) of the next chunk; kind b"" at the end of a file that is cut off behind its texts."""
    head = file.read(8)
    if len(head) < 8 and not found:
        raise Broken("it is cut off")
    return (int.from_bytes(head[:4], "big"), head[4:]) if len(head) == 8 else (0, b"")


def _png_text(kind: bytes, data: bytes) -> tuple[str, str]:
    key, _, rest = data.partition(b"\0")
    if kind == b"tEXt":
        return key.decode("latin-1"), rest.decode("latin-1")
    if kind == b"zTXt":
        return key.decode("latin-1"), unpacked(rest[1:]).decode("latin-1")
    packed, rest = rest[:1] == b"\1", rest[2:]
    text = rest.split(b"\0", 2)[-1]  # behind the language and the keyword in it
    return key.decode("latin-1"), _utf8(unpacked(text) if packed else text)


def jpeg_exif(file: BinaryIO) -> bytes:
    """The EXIF block of a JPEG, b"" where it has none; the file stands behind the signature's first two bytes."""
    while True:
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            raise Broken("it is cut off or damaged")
        if marker[1] in (0xDA, 0xD9):  # pixels follow, or the end
            return b""
        length = int.from_bytes(_exactly(file, 2), "big")
        data = _exactly(file, max(0, length - 2))
        if marker[1] == 0xE1 and data.startswith(EXIF):
            return data[len(EXIF) :]


def webp_exif(file: BinaryIO) -> bytes:
    """The EXIF block of a WebP, b"" where it has none; the file stands behind ``WEBP``."""
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"EXIF":
            return _exactly(file, length).removeprefix(EXIF)
        file.seek(length + length % 2, 1)
    return b""


def exif_values(block: bytes) -> dict[int, bytes]:
    """The bytes of USER_COMMENT and MAKER_NOTE in an EXIF block, those that are there."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return {}
    try:
        (first,) = struct.unpack_from(f"{order}I", block, 4)
        place = _directory(block, first, order).get(_EXIF_IFD)
        if place is None:
            return {}
        entries = _directory(block, place[1], order)
    except struct.error as reason:
        raise Broken("its EXIF block is damaged") from reason
    wanted = {tag: entries[tag] for tag in (USER_COMMENT, MAKER_NOTE) if tag in entries}
    found = {tag: block[start : start + size] for tag, (size, start) in wanted.items()}
    if any(len(found[tag]) != size for tag, (size, _) in wanted.items()):
        raise Broken("its EXIF block is damaged")
    return found


def _directory(block: bytes, start: int, order: str) -> dict[int, tuple[int, int]]:
    """(count, value or place of the value) by tag."""
    (num,) = struct.unpack_from(f"{order}H", block, start)
    entries = (struct.unpack_from(f"{order}HHII", block, start + 2 + 12 * i) for i in range(num))
    return {tag: (count, value) for tag, _, count, value in entries}


def exif_block(values: dict[int, bytes]) -> bytes:
    """An EXIF block (big-endian, no "Exif" in front) that holds the bytes, each longer than 4, as undefined."""
    num, start = len(values) + 1, 26
    place = start + 2 + 12 * num + 4
    entries, data = struct.pack(">HHI4s", 0x9000, 7, 4, b"0232"), b""  # the version of EXIF
    for tag, value in sorted(values.items()):
        entries += struct.pack(">HHII", tag, 7, len(value), place + len(data))
        data += value + b"\0" * (len(value) % 2)
    head = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, _EXIF_IFD, 4, 1, start, 0)
    return head + struct.pack(">H", num) + entries + struct.pack(">I", 0) + data


def unpacked(data: bytes) -> bytes:
    """What zlib packed. Raises Broken where it is damaged or more than MAX_BYTES."""
    machine = zlib.decompressobj()
    try:
        text = machine.decompress(data, MAX_BYTES)
    except zlib.error as reason:
        raise Broken("a text in it is damaged") from reason
    if not machine.eof:
        raise Broken("a text in it is damaged or too large")
    return text


def _exactly(file: BinaryIO, length: int) -> bytes:
    if length > MAX_BYTES:
        raise Broken("a text in it is too large")
    data = file.read(length)
    if len(data) < length:
        raise Broken("it is cut off")
    return data


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise Broken("a text in it is damaged") from reason
