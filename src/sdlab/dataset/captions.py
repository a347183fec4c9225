"""Caption files: the first line that says something, whatever encoding it was saved in."""

from __future__ import annotations

import codecs
import re
import unicodedata

from sdlab.dataset.files import read_start, reason_of

MAX_BYTES = 256 * 1024  # a caption is a line or a page; something larger is another file with a wrong name

_ODD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
# Control characters become spaces; marks that are invisible or turn the reading direction go away.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029], " ")
_INVISIBLE = dict.fromkeys([0x200B, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "")
_CLEANING = {**_CONTROLS, **_INVISIBLE}
_NOT_CP932 = re.compile("[\x80\xa0\uf8f0-\uf8f3]")  # Python's stand-ins for bytes that cp932 does not have
_MAX_CONTROL_SHARE = 0.05  # text has a stray control character or two, other data has them everywhere


class CaptionError(Exception):
    """A caption file that cannot be used; the text is the reason."""


def read_caption(path: str) -> str | None:
    """The first line neither empty nor starting with ``#``, cleaned; None where there is no such line.

    Raises CaptionError with the reason where the file cannot be read or is not text.
    """
    lines = (clean(line) for line in _LINE_ENDS.split(decode(read_data(path))))
    return next((line for line in lines if line and not line.startswith("#")), None)


def read_data(path: str) -> bytes:
    """A caption file's bytes. Raises CaptionError where it cannot be one."""
    try:
        data = read_start(path, MAX_BYTES + 1)
    except OSError as reason:
        raise CaptionError(reason_of(reason)) from reason
    if len(data) > MAX_BYTES:
        raise CaptionError(f"larger than {MAX_BYTES // 1024} KiB, not a caption")
    return data


def decode(data: bytes) -> str:
    """Text from UTF-8 with or without BOM, UTF-16 with BOM, else cp932. Raises CaptionError if it is none."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif data.startswith(codecs.BOM_UTF8):
        encodings = ["utf-8-sig"]
    else:
        encodings = ["utf-8", "cp932"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "cp932" and _NOT_CP932.search(text):
            continue
        if len(_ODD.findall(text)) > max(2, len(text) * _MAX_CONTROL_SHARE):
            raise CaptionError("not text (or UTF-16 without its byte order mark); save it as UTF-8")
        return text
    raise CaptionError(f"not text in {' or '.join(encodings)}; save it as UTF-8")


def clean(text: str) -> str:
    """One line in NFC: control characters become spaces, invisible marks go, white space becomes a space."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFC", text.translate(_CLEANING)).split())
