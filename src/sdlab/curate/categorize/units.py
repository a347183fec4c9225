"""What travels together: a picture with its captions and references, pictures of one name that share them."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sdlab.dataset.tree import CAPTION_SUFFIXES, Sample, Scan, refusal
from sdlab.dataset.walk import Refused


@dataclass(frozen=True)
class Unit:
    """Pictures of one folder that stay together, and the files that go with them."""

    samples: tuple[Sample, ...]  # one, or all of a stem that share captions or references
    companions: tuple[str, ...]  # ids of captions and references
    stem: str  # what the names have in common, in NFC

    @property
    def id(self) -> str:
        """The id of the first picture, which stands for the unit."""
        return self.samples[0].id

    @property
    def files(self) -> tuple[str, ...]:
        """The ids of all its files."""
        return (*(sample.id for sample in self.samples), *self.companions)

    @property
    def folder(self) -> str:
        """The folder's id, "" for the root."""
        return self.id.rpartition("/")[0]

    @property
    def cap(self) -> str | None:
        """The id of the .cap file, where there is one."""
        return next((id for id in self.companions if id.lower().endswith(".cap")), None)

    @property
    def own(self) -> str:
        """The caption it came with, "" where it has none."""
        return "" if self.samples[0].source == "folder" else self.samples[0].prompt

    def tail(self, id: str) -> str:
        """What one of its files has behind the stem: ``.jpg``, ``.ref2.png``."""
        return unicodedata.normalize("NFC", id.rpartition("/")[2])[len(self.stem) :]


def units(scan: Scan) -> list[Unit]:
    """The units of a folder, in the order of their first pictures. `scan` was made without a prefix."""
    captions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for id in scan.companions:
        if id.lower().endswith(CAPTION_SUFFIXES):
            captions[_place(id)].append(id)
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in scan.samples:
        groups[_place(sample.id)].append(sample)
    found = []
    for place, samples in groups.items():
        head = samples[0].id[: samples[0].id.rfind("/") + 1]
        references = [head + os.path.basename(path) for path in samples[0].references]
        companions = (*captions.get(place, ()), *references)
        if companions:
            # é.jpg in two Unicode forms is one name where they would go: the later goes alone
            first = {unicodedata.normalize("NFC", s.id): s for s in reversed(samples)}
            found.append(Unit(tuple(s for s in samples if s in first.values()), companions, place[1]))
            found += [Unit((s,), (), place[1]) for s in samples if s not in first.values()]
        else:
            found += [Unit((sample,), (), place[1]) for sample in samples]
    return found


def path_of(scan: Scan, id: str) -> str:
    """The path that opens the file of an id."""
    return os.path.join(scan.root, *id.split("/"))


def without_faults(unit: Unit, faults: Mapping[str, str], scan: Scan) -> tuple[Unit | None, list[Refused]]:
    """The unit's good pictures, or None, and why the others are refused. `faults` are reasons by path.

    A picture goes with all its captions and references or not at all: where one cannot be read, all stay.
    """
    unreadable = next((id for id in unit.companions if path_of(scan, id) in faults), None)
    refused, good = [], []
    for sample in unit.samples:
        why = refusal(sample, faults)
        if not why and unreadable is not None:
            why = f"its caption {unreadable.rpartition('/')[2]}: {faults[path_of(scan, unreadable)]}"
        if why:
            refused.append(Refused(sample.id, why))
        else:
            good.append(sample)
    return (Unit(tuple(good), unit.companions, unit.stem) if good else None), refused


def _place(id: str) -> tuple[str, str]:
    """The folder's id, and the name without its suffix in NFC."""
    folder, _, name = id.rpartition("/")
    return folder, unicodedata.normalize("NFC", name[: name.rfind(".")])
