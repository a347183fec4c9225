"""What becomes of a picture's caption: kept, added to, or replaced, with nothing lost that someone wrote."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from sdlab.dataset.captions import clean, decode

How = Literal["keep", "append", "replace"]

_LINE_ENDS = re.compile(r"(\r\n|\r|\n)")


class Change(NamedTuple):
    """What is done to a .cap file: nothing, a new file, other lines in it, or a new file beside a backup."""

    kind: Literal["none", "new", "edit", "backup"]
    data: bytes = b""  # the new content


def speak(text: str) -> str:
    """A model's text as a caption: one line that no reader takes for a comment; "" where it says nothing."""
    return clean(text).lstrip("# ")


def told(own: str, made: str, how: How) -> str:
    """The caption of a picture, out of the one it came with and the model's; either may be ""."""
    if how == "keep":
        return own or made
    if how == "append":
        return joined(own, made)
    return made


def joined(own: str, made: str) -> str:
    """Both with a comma between them, or the first alone where it says the second already."""
    if not own or not made:
        return own or made
    if re.search(rf"(?<!\w){re.escape(made)}(?!\w)", own, re.IGNORECASE):
        return own
    return f"{own.rstrip(' ,')}, {made}"


def change(old: bytes | None, *, own: str, made: str, how: How) -> Change:
    """What to do so that the .cap says what `told` says.

    `old` is the content of the .cap, None where there is none; `own` the picture's caption, be it from a .txt.
    A .cap of comments and empty lines only gets the caption below them. Raises CaptionError where `old` is not
    text and would have to be read: for keep and append.
    """
    text = told(own, made, how)
    if not text:
        return Change("none")
    if old is None:
        return Change("none") if how == "keep" and own else Change("new", line(text))
    if how == "replace":
        return Change("none") if own == text else Change("backup", line(text))
    new = edited(old, made, append=how == "append")
    return Change("none") if new is None else Change("edit", new)


def line(text: str) -> bytes:
    """A caption as the content of a file."""
    return f"{text}\n".encode()


def edited(old: bytes, made: str, *, append: bool) -> bytes | None:
    """The content with `made` added to the first line that says something, or None if nothing is to change.

    Where no line says something it becomes the last one. All other lines stay; the result is UTF-8. Raises
    CaptionError where `old` is not text.
    """
    parts = _LINE_ENDS.split(decode(old))  # line, end, line, end, … line
    for index in range(0, len(parts), 2):
        own = clean(parts[index])
        if not own or own.startswith("#"):
            continue
        both = joined(own, made)
        if not append or both == own:
            return None
        parts[index] = f"{parts[index].rstrip().rstrip(' ,')}{both[len(own.rstrip(' ,')) :]}"
        return "".join(parts).encode()
    end = next((part for part in parts[1::2]), "\n")
    head = "".join(parts)
    gap = end if head and not head.endswith(("\r", "\n")) else ""
    return f"{head}{gap}{made}{end}".encode() if made else None
