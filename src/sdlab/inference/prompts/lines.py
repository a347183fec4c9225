"""From what was typed to what is sent to the model: prompts and prompt files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdlab.errors import SdlabError


def gather(prompts: Sequence[str], prompt_file: Path | None) -> list[str]:
    """The prompts given one by one, then those of the file.

    Raises SdlabError where there is none, where the file cannot be read, or where a prompt is not text.
    """
    found = [*prompts, *(read_file(prompt_file) if prompt_file is not None else [])]
    if not found:
        where = str(prompt_file) if prompt_file is not None else ""
        raise SdlabError(
            "the file holds no prompt" if prompt_file is not None else "no prompt",
            where=where,
            next_step='Say what to draw: --prompt "red star, blue background", or --prompt-file prompts.txt',
        )
    for prompt in found:
        check_text(prompt, where="--prompt")
    return found


def check_text(text: str, *, where: str) -> None:
    """Raises SdlabError for bytes that are not UTF-8 (they reach us as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        raise SdlabError(
            f"not UTF-8 text: {text!r}", where=where, next_step="Save or type it as UTF-8"
        ) from reason


def read_file(path: Path) -> list[str]:
    """One prompt a line, spaces at the ends taken off; without empty lines and those starting with ``#``.

    UTF-8, with or without a byte order mark. Raises SdlabError if it cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as reason:
        raise SdlabError(f"cannot read it ({reason.strerror})", where=str(path)) from reason
    except UnicodeDecodeError as reason:
        line = reason.object[: reason.start].count(b"\n") + 1
        raise SdlabError(
            f"line {line} is not UTF-8", where=str(path), next_step="Save the file as UTF-8"
        ) from reason
    # not splitlines(): that also cuts at characters which may stand inside a prompt, as U+2028
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]
