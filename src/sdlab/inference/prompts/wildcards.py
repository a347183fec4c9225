"""A folder of text files whose lines stand for ``__name__`` in a prompt. No heavy imports.

``name.txt``: UTF-8, a line an entry, ``#`` starts a comment line, ``0.5::entry`` weighs half as much as the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.inference.below import files_below
from sdlab.inference.prompts.text_file import numbered, read_text
from sdlab.options import did_you_mean

MAX_DEPTH = 32  # of choices and wildcards within each other
UNIT = 1_000_000  # what an entry without a weight weighs: weights are counted in millionths
WILD = r"__(?!_)[\w./-]+?__"

_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,6})?|\.\d{1,6})\s*::")


@dataclass(frozen=True)
class Entry:
    """What one line may put in the place of a wildcard, and how much it weighs, in millionths."""

    text: str
    weight: int


@dataclass(frozen=True)
class Wildcards:
    """The files of a wildcard folder by name ("dir/name"); each is read when it is first needed."""

    folder: Path
    files: Mapping[str, Path]
    _read: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    _sound: set[str] = field(default_factory=set)  # those known to lead to no fault

    def entries(self, name: str) -> tuple[Entry, ...]:
        """The entries of a wildcard. Raises SdlabError where it is missing, empty or not UTF-8."""
        known = self._known(name)
        if known not in self._read:
            self._read[known] = _entries(self.files[known])
        return self._read[known]

    def check(self, names: Iterable[str], chain: tuple[str, ...] = ()) -> None:
        """Raises SdlabError where one of these, or what its entries name, is missing or leads back to itself."""
        for name in map(self._known, names):
            if name in chain:
                loop = " > ".join((*chain[chain.index(name) :], name))
                raise SdlabError(f"wildcards that lead back to themselves: {loop}", where=str(self.folder))
            if len(chain) == MAX_DEPTH:
                raise SdlabError(
                    f"wildcards more than {MAX_DEPTH} deep: {chain[0]} > ... > {name}", where=str(self.folder)
                )
            if name not in self._sound:
                inside = dict.fromkeys(n for entry in self.entries(name) for n in wildcards_in(entry.text))
                self.check(inside, (*chain, name))
                self._sound.add(name)

    def _known(self, name: str) -> str:
        """The name as the folder spells it: upper and lower case count only where both are there."""
        if name in self.files:
            return name
        same = [known for known in self.files if known.casefold() == name.casefold()]
        if len(same) == 1:
            return same[0]
        what = f"there is no {name}.txt for __{name}__{did_you_mean(name, list(self.files))}"
        raise SdlabError(
            what, where=str(self.folder), next_step="Write that file, or give another --wildcards"
        )


def read_wildcards(folder: Path) -> Wildcards:
    """The wildcards of a folder and of the folders in it. Raises SdlabError where the folder is not there."""
    return Wildcards(folder, files_below(folder, ".txt", option="--wildcards", inside=True))


def wildcards_in(template: str) -> list[str]:
    """The names of its wildcards, in order, each once."""
    return list(dict.fromkeys(token[2:-2] for token in re.findall(WILD, template)))


def weighed(text: str) -> tuple[int, str]:
    """(weight in millionths, text behind it) of ``0.5::text``; `UNIT` and the text where no weight is given."""
    match = _WEIGHT.match(text)
    if not match:
        return UNIT, text
    whole, _, part = match[1].partition(".")
    return int(whole or "0") * UNIT + int(part.ljust(6, "0")), text[match.end() :]


def _entries(path: Path) -> tuple[Entry, ...]:
    found = [weighed(line) for _, line in numbered(read_text(path))]
    if not any(weight for weight, _ in found):
        what = "every entry has the weight 0" if found else "the file holds no entry"
        raise SdlabError(what, where=str(path), next_step="Write one entry a line")
    return tuple(Entry(text, weight) for weight, text in found)
