"""What is odd about a prompt, each thing once with its places; and what means something in other programs only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sdlab.inference.spec import Emphasis

NUM_PLACES_NAMED, EXCERPT = 3, 16  # places in one warning, characters of each
_COMPEL = re.compile(
    r"(?<=[\w)])(?:\+{2,}|-{2,})(?=[\s,.;)\]]|$)|(?<=\))(?:[+-]|[0-9]*\.[0-9]+)(?=[\s,;)\]]|$)"
)
_CHANGING = re.compile(r"\[[^\[\]()|:]*(?::[^\[\]():|]*:\s*[0-9.]+\s*|(?:\|[^\[\]()|]*)+)\]")
_AND = re.compile(r"\bAND\b")


@dataclass
class Notes:
    """Places in a text that are worth a warning, by what is to be said of them."""

    text: str
    places: dict[str, list[int]] = field(default_factory=dict)

    def add(self, message: str, at: int) -> None:
        """Say `message` of the character at `at`."""
        self.places.setdefault(message, []).append(at)

    def lines(self) -> list[str]:
        """One line for each message, sorted by its first place; the first few places are named."""
        order = sorted(self.places.items(), key=lambda item: item[1][0])
        return [f"{self._where(sorted(places))}: {message}" for message, places in order]

    def _where(self, places: Sequence[int]) -> str:
        named = [self._place(at) for at in places[:NUM_PLACES_NAMED]]
        if rest := len(places) - len(named):
            named.append(f"{rest} more")
        return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)

    def _place(self, at: int) -> str:
        begins = " ".join(self.text[at : at + EXCERPT].split())
        return f"'{begins}{'..' * (at + EXCERPT < len(self.text))}' (character {at + 1})"


def foreign(text: str, emphasis: Emphasis) -> list[str]:
    """Warnings of what means something in other programs, and is plain text here."""
    notes = Notes(text)
    for found in _COMPEL.finditer(text):
        if text[max(0, found.start() - 1) : found.end()].lower() != "c++":
            notes.add(
                "signs and numbers behind a word or bracket are no weights here; write (x:1.2)",
                found.start(),
            )
    if emphasis == "a1111":
        for found in _CHANGING.finditer(text):
            notes.add(
                "changes the prompt on the way in A1111; here the brackets only weaken what is in them",
                found.start(),
            )
        for found in _AND.finditer(text):
            notes.add("a word like others here; in A1111 it mixes two prompts", found.start())
    return notes.lines()
