"""The words that are never keywords: a list that the user can edit (filler.txt has the default and its rules)."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from sdlab.dataset.captions import MAX_BYTES, CaptionError, decode
from sdlab.dataset.files import read_start, reason_of
from sdlab.errors import SdlabError, gathered

NEXT_STEP = "`sdlab categorize --print-filler` prints the default list to start from"


@dataclass(frozen=True)
class Filler:
    """A list of filler, all in lower case."""

    words: frozenset[str] = frozenset()
    phrases: frozenset[tuple[str, ...]] = frozenset()  # of two words and more
    prefixes: tuple[str, ...] = ()  # sorted

    @property
    def fingerprint(self) -> str:
        """16 hex digits; the same for lists that say the same."""
        phrases = sorted(" ".join(phrase) for phrase in self.phrases)
        lines = [*sorted(self.words), *phrases, *(f"{prefix}*" for prefix in self.prefixes)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def has(self, word: str) -> bool:
        """Whether the list has the word, which is in lower case."""
        return word in self.words or self.has_prefix(word)

    def has_prefix(self, word: str) -> bool:
        """Whether the word begins as a line that ends in * says."""
        return word.startswith(self.prefixes)

    def phrase_at(self, words: Sequence[frozenset[str]], start: int) -> int:
        """Length of the longest phrase that stands at `start`, 0 for none; each word has several forms."""
        phrases = (phrase for form in words[start] for phrase in self._by_first_word.get(form, ()))
        return max((len(phrase) for phrase in phrases if _stands_at(phrase, words, start)), default=0)

    @cached_property
    def _by_first_word(self) -> dict[str, list[tuple[str, ...]]]:
        found: dict[str, list[tuple[str, ...]]] = {}
        for phrase in self.phrases:
            found.setdefault(phrase[0], []).append(phrase)
        return found


def _stands_at(phrase: Sequence[str], words: Sequence[frozenset[str]], start: int) -> bool:
    there = words[start : start + len(phrase)]
    return len(there) == len(phrase) and all(part in forms for part, forms in zip(phrase, there, strict=True))


def default_filler() -> str:
    """The default list as text, with its comments."""
    return files("sdlab.curate.keywords").joinpath("filler.txt").read_text(encoding="utf-8")


def read_filler(path: Path | None) -> Filler:
    """The list in the file; None: the default. Raises SdlabError naming the file, and every line that is wrong."""
    return _parsed(default_filler() if path is None else _text_of(path), str(path))


def _text_of(path: Path) -> str:
    try:
        data = read_start(os.fspath(path), MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CaptionError(f"larger than {MAX_BYTES // 1024} KiB")
        return decode(data)
    except OSError as reason:
        raise SdlabError(
            f"the list of filler cannot be read ({reason_of(reason)})", where=str(path), next_step=NEXT_STEP
        ) from reason
    except CaptionError as reason:
        raise SdlabError(
            f"is no list of words, one on each line ({reason})", where=str(path), next_step=NEXT_STEP
        ) from reason


def _parsed(text: str, where: str) -> Filler:
    entries = {
        number: " ".join(unicodedata.normalize("NFC", line).lower().split())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    faults = [
        f"line {number}: '{entry}': a * only stands at the end of one word of two letters or more"
        for number, entry in entries.items()
        if "*" in entry and not _is_prefix(entry)
    ]
    if faults:
        raise gathered(faults, where=where, next_step=NEXT_STEP)
    return _filler(entries.values())


def _is_prefix(entry: str) -> bool:
    return entry.endswith("*") and "*" not in entry[:-1] and " " not in entry and len(entry) > 2


def _filler(entries: Iterable[str]) -> Filler:
    lines = sorted(set(entries))
    plain = [line for line in lines if not line.endswith("*")]
    return Filler(
        words=frozenset(line for line in plain if " " not in line),
        phrases=frozenset(tuple(line.split()) for line in plain if " " in line),
        prefixes=tuple(line[:-1] for line in lines if line.endswith("*")),
    )
