"""Text files of ours: UTF-8, a line an entry, ``#`` starts a comment line. No heavy imports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sdlab.errors import SdlabError

MOST_BYTES = 256 << 20  # a million prompts; what has more is a device, or no file of prompts


def read_text(path: Path) -> str:
    """The whole file, without a byte order mark. Raises SdlabError if it cannot be read, is endless or not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise SdlabError(f"has more than {MOST_BYTES >> 20} MB", where=str(path), next_step="Split it")
        return data.decode("utf-8-sig")
    except OSError as reason:
        raise SdlabError(f"cannot read it ({reason.strerror})", where=str(path)) from reason
    except UnicodeDecodeError as reason:
        line = reason.object[: reason.start].count(b"\n") + 1
        raise SdlabError(
            f"line {line} is not UTF-8", where=str(path), next_step="Save the file as UTF-8"
        ) from reason


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither empty nor a comment, without the spaces at its ends.

    Not by splitlines(): that also cuts at characters which may stand inside a prompt, as U+2028.
    """
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped
