"""What is to be done to the files, as operations of the journal: nothing here touches a disk but to read captions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sdlab.curate.categorize import captionfiles
from sdlab.curate.categorize.captionfiles import Change, How
from sdlab.curate.categorize.units import Unit, path_of
from sdlab.curate.journal.run import Operation
from sdlab.curate.names import Names
from sdlab.dataset.captions import CaptionError, read_data
from sdlab.dataset.tree import CAPTION_SUFFIXES, Scan
from sdlab.dataset.walk import Refused

Mode = Literal["copy", "hardlink", "move"]

_KINDS = {"copy": "copy", "hardlink": "link", "move": "move"}


@dataclass(frozen=True)
class Told:
    """A unit and what is known of it."""

    unit: Unit
    own: str  # the caption it came with, or ""
    made: str  # the model's, or ""
    text: str  # the caption that counts
    confidence: float | None  # of the model's; None where it was not asked
    doubtful: bool
    keywords: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a unit goes: folders from the top, and the stem that all its files get."""

    folder: tuple[str, ...]
    stem: str


@dataclass
class Plan:
    """Operations in order, and what there is to say of them."""

    operations: list[Operation] = field(default_factory=list)
    num_captions: int = 0  # .cap files written or changed
    num_sheets: int = 0
    num_copied_links: int = 0  # pictures copied because they are links, where they were to be moved or linked
    notes: list[Refused] = field(default_factory=list)  # captions that could not be written, with the reason


@dataclass(frozen=True)
class Source:
    """The pictures' folder as it was found."""

    scan: Scan
    hashes: Mapping[str, str]  # sha256 by path
    real_root: str

    def path(self, id: str) -> str:
        """The absolute path, links on the way left as they are."""
        return os.path.abspath(path_of(self.scan, id))

    def sha256(self, id: str) -> str:
        """Of the file's content."""
        return self.hashes[path_of(self.scan, id)]

    def is_linked(self, id: str) -> bool:
        """Whether the file is a link, or lies in a linked folder: it may be anybody's."""
        return os.path.realpath(path_of(self.scan, id)) != self._real(id)

    def is_in_linked_folder(self, id: str) -> bool:
        """Whether a file beside it would lie outside of the pictures' folder."""
        folder = id.rpartition("/")[0]
        return bool(folder) and os.path.realpath(path_of(self.scan, folder)) != self._real(folder)

    def _real(self, id: str) -> str:
        return os.path.join(self.real_root, *id.split("/"))


def places(told: Iterable[Told], folders: Mapping[str, tuple[str, ...]], names: Names) -> list[Place]:
    """The place of each unit; `folders` by id of its first picture. `names` holds what is there already."""
    return [
        Place(folders[one.unit.id], names.stem("/".join(folders[one.unit.id]), one.unit.stem)) for one in told
    ]


def names_in(root: str | os.PathLike[str], folder: str = "") -> Names:
    """The names of all files below the folder of a root; neither need exist."""
    names = Names()
    for path, _, files in os.walk(os.path.join(root, folder)):
        inner = os.path.relpath(path, root).replace(os.sep, "/")
        for name in files:
            names.take("" if inner == "." else inner, name)
    return names


def organize(
    told: Iterable[tuple[Told, Place]], source: Source, *, mode: Mode, how: How, write_captions: bool
) -> Plan:
    """Bring each unit to its place, and its caption up to date there. The plan of a run in the output folder."""
    plan = Plan()
    for one, place in told:
        change = _change(one, source, how, plan) if write_captions else Change("none")
        head = "/".join((*place.folder, place.stem))
        for sample in one.unit.samples:
            kind = _kind(sample.id, mode, source)
            plan.num_copied_links += mode != "copy" and kind == "copy"
            plan.operations.append(_brought(sample.id, head + one.unit.tail(sample.id), kind, source))
        for id in one.unit.companions:
            _bring_companion(plan, one.unit, id, head, change, mode, source)
        if change.kind == "new":
            plan.operations.append(Operation("write", f"{head}.cap", data=change.data))
        plan.num_captions += change.kind != "none"
    # copies first: one of a link must be made before what it leads to is moved away, and undone after that is back
    plan.operations.sort(key=lambda operation: operation.kind == "move")
    return plan


def caption(told: Iterable[Told], source: Source, *, how: How) -> Plan:
    """Write each caption beside its picture. The plan of a run in the pictures' own folder."""
    plan = Plan()
    first: dict[str, Told] = {}  # by the .cap they would write: a.jpg and a.png have one between them
    for one in told:
        sharer = first.setdefault(f"{one.unit.folder}/{one.unit.stem}", one)
        if sharer is not one:
            if sharer.text != one.text:
                why = f"shares its .cap with {sharer.unit.id}, which says: {sharer.text}"
                plan.notes.append(Refused(one.unit.id, why))
            continue
        if source.is_in_linked_folder(one.unit.id):
            why = "in a linked folder outside of the pictures' own: its caption is not written there"
            plan.notes.append(Refused(one.unit.id, why))
            continue
        change = _change(one, source, how, plan)
        cap, stem = one.unit.cap, one.unit.id[: one.unit.id.rfind(".")]
        if change.kind == "new":
            plan.operations.append(Operation("write", f"{stem}.cap", data=change.data))
        elif change.kind != "none":
            assert cap is not None
            old = read_data(source.path(cap))
            if change.kind == "backup":
                backup = f"{cap}{_free_backup(source.path(cap))}"
                plan.operations.append(Operation("write", backup, data=old))
            plan.operations.append(Operation("rewrite", cap, data=change.data, old=old))
        plan.num_captions += change.kind != "none"
    return plan


def _change(one: Told, source: Source, how: How, plan: Plan) -> Change:
    """What becomes of the unit's .cap; none, with a note, where it cannot be read as text."""
    cap = one.unit.cap
    try:
        old = None if cap is None else read_data(source.path(cap))
        return captionfiles.change(old, own=one.own, made=one.made, how=how)
    except CaptionError as reason:
        assert cap is not None
        plan.notes.append(Refused(cap, f"{reason}; left as it is, so {one.unit.id} gets no new caption"))
        return Change("none")


def _bring_companion(
    plan: Plan, unit: Unit, id: str, head: str, change: Change, mode: Mode, source: Source
) -> None:
    kind = _kind(id, mode, source)
    if kind == "link" and id.lower().endswith(CAPTION_SUFFIXES):
        kind = "copy"  # captions are edited in place: the one in IMAGES must not change with it
    path = head + unit.tail(id)
    if id != unit.cap or change.kind == "none":
        plan.operations.append(_brought(id, path, kind, source))
        return
    if change.kind == "backup" or kind == "move":
        plan.operations.append(_brought(id, f"{path}.bak", kind, source))
    plan.operations.append(Operation("write", path, data=change.data))


def _kind(id: str, mode: Mode, source: Source) -> str:
    """How a file is brought; a link, or a file in a linked folder, is copied: it may be anybody's."""
    return "copy" if mode != "copy" and source.is_linked(id) else _KINDS[mode]


def _brought(id: str, path: str, kind: str, source: Source) -> Operation:
    return Operation(kind, path, source.path(id), source.sha256(id))


def _free_backup(path: str) -> str:
    """``.bak``, or ``.bak2``, ``.bak3`` … where files of that name are there."""
    number = 1
    while os.path.lexists(path + (suffix := f".bak{number if number > 1 else ''}")):
        number += 1
    return suffix
