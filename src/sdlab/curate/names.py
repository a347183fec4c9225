"""Names of folders and files that Linux, macOS and Windows all take, and that mean nothing else to the dataset.

A folder made of a keyword reads back as that keyword; a picture keeps its name where it can.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from sdlab.dataset.tree import readable, reference_of
from sdlab.dataset.walk import JUNK

MAX_BYTES = 200  # of 255: leaves room for _999, .ref10.webp, .cap.bak and what temporary names add

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029]')
_INVISIBLE = re.compile("[\u200b\u200e\u200f\ufeff\u202a-\u202e\u2066-\u2069]")
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"}
)
_KEPT = re.compile(r"(?P<owner>.+)\.(cap|txt)", re.IGNORECASE | re.DOTALL)  # a.cap.bak


def folder_name(keyword: str) -> str:
    """A folder's name that the dataset reads as `keyword`: lower case, spaces as underscores, none in front.

    At most MAX_BYTES bytes in UTF-8. Empty where nothing is left that a folder could be called.
    """
    name = _FORBIDDEN.sub(" ", _as_text(keyword).lower())
    name = "_".join(name.replace("_", " ").split()).lstrip("_.").rstrip("_. ")
    return _shortened(f"{name}_" if name in JUNK else _no_device(name))


def safe_stem(wanted: str) -> str:
    """`wanted` as the stem of a picture's file: never empty, hidden, a reference's (``x.ref2``) or a device's.

    At most MAX_BYTES bytes in UTF-8; the same for the same `wanted`. What is safe already stays as it is, in NFC.
    """
    stem = _no_device(_FORBIDDEN.sub("_", _as_text(wanted)).strip(". ") or "picture")
    return _shortened(f"{stem}_" if reference_of(stem) else stem)


class Names:
    """The names taken in a tree of folders, alike in any case: ``Girl/A.jpg`` takes ``girl/a``."""

    def __init__(self) -> None:
        self._taken: set[tuple[str, str]] = set()
        self._next: dict[tuple[str, str], int] = {}  # where to go on counting: a thousand may share one name

    def take(self, folder: str, name: str) -> None:
        """A file that is there already: no stem is given out that would make it belong to a new picture."""
        stem = name[: name.rfind(".")] if "." in name[1:] else name
        of, kept = reference_of(stem), _KEPT.fullmatch(stem)
        owner = of[0] if of else kept["owner"] if kept else stem
        self._taken |= {(_key(folder), _key(stem)), (_key(folder), _key(owner))}

    def stem(self, folder: str, wanted: str) -> str:
        """A free stem in `folder` ("" for the top), now taken: the safe form of `wanted`, or that with _2, _3 ….

        Two pictures never share a stem, whatever their suffixes, as a caption belongs to a stem.
        """
        stem = safe_stem(wanted)
        first = (_key(folder), _key(stem))
        key, number = first, self._next.get(first, 1)
        found = stem
        while key in self._taken:
            number += 1
            tail = f"_{number}"
            found = _shortened(stem, MAX_BYTES - len(tail)) + tail
            key = (first[0], _key(found))
        self._taken.add(key)
        self._next[first] = number
        return found


def _as_text(name: str) -> str:
    """In NFC, bytes that are not UTF-8 made readable; nothing that turns the reading direction."""
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", readable(name)))


def _no_device(name: str) -> str:
    """The name, changed if Windows would open a device under it, as for con, NUL.txt and ``aux .jpg``."""
    head, dot, tail = name.partition(".")
    return f"{head.rstrip()}_{dot}{tail}" if head.rstrip().lower() in _DEVICES else name


def _key(name: str) -> str:
    """What names have in common that are one name on some system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shortened(name: str, max_bytes: int = MAX_BYTES) -> str:
    """`name`, or its start and a hash of the whole, in at most `max_bytes` bytes of UTF-8."""
    data = name.encode()
    if len(data) <= max_bytes:
        return name
    tail = f"-{hashlib.sha256(data).hexdigest()[:8]}"
    head = data[: max_bytes - len(tail)].decode("utf-8", "ignore")
    return head.rstrip("_. ") + tail
