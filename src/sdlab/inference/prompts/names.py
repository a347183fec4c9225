"""Finding names of textual inversions in prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

_WITH_WORD = r"(?:embedding:)"
_SUFFIX = r"(?:\.(?:pt|bin|safetensors))?"  # ComfyUI's users write the file's name


@dataclass(frozen=True)
class Found:
    """A name in a text, from `begin` up to `end`."""

    name: str  # as it was given, whatever its case in the text
    begin: int
    end: int


class Names:
    """Finds names as whole words in any case, ``embedding:NAME`` too, the longest where several fit.

    A name within a longer one with a hyphen is not that name: ``bad`` is not in ``bad-hands``.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names), key=lambda name: (-len(name), name))

    def find(self, text: str) -> Iterator[Found]:
        """In the order of the text, none within another."""
        for found in self._pattern.finditer(text) if self.names else ():
            yield Found(self._name(found["asked"] or found["plain"]), found.start(), found.end())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        either, end = "|".join(re.escape(name) for name in self.names), r"(?![\w-])"
        asked = rf"{_WITH_WORD}(?P<asked>{either}){_SUFFIX}{end}"
        return re.compile(rf"(?<![\w-])(?:{asked}|(?P<plain>{either}){end})", re.IGNORECASE)

    def _name(self, written: str) -> str:
        """By the pattern's own rule of what is one letter in two cases, which is not quite casefold's."""
        return next(name for name in self.names if re.fullmatch(re.escape(name), written, re.IGNORECASE))
