"""What a user sees: notes, warnings and errors on stderr, results as JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Report = TypeVar("_Report")


def note(text: str) -> None:
    """One line on stderr; nothing where that is closed."""
    if sys.stderr is None:
        return
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """One line on stderr that stands out."""
    note(f"warning: {text}")


def error(text: str) -> None:
    """The one line that says why the command failed."""
    note(f"sdlab: error: {text}")


def out(text: str) -> None:
    """One line of a result on stdout, for people and pipes; nothing where that is closed."""
    if sys.stdout is None:
        return
    sys.stdout.write(f"{printable(text)}\n")


def out_json(value: Any) -> None:
    """A result on stdout as one JSON document, valid UTF-8 whatever the file names were."""
    text = json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    if sys.stdout is not None:
        sys.stdout.write(f"{text}\n")


def report(
    value: _Report,
    *,
    as_json: Callable[[_Report], Any],
    as_lines: Callable[[_Report], Iterable[str]],
    in_json: bool,
) -> None:
    """A report on stdout, for programs or for people."""
    if in_json:
        out_json(as_json(value))
        return
    for line in as_lines(value):
        out(line)


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes made visible, so that no file name moves the cursor."""
    safe = "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)
