"""File operations that can be completed or taken back, whatever happens in between.

The whole plan is on disk before the first file is touched; each operation either has happened or has not, and
what is on disk tells which. So `resume` completes and `undo` takes back from any point, however often they are
killed themselves. No file is replaced but a caption that is rewritten, whose bytes before are in the journal, and
nothing is removed that is not known to stand elsewhere.

    with locked(folder):
        resume(folder, seal=...) or act(folder, operations, settings=..., seal=...)

A journal names files anywhere, so one that came with a folder from somewhere else must not be obeyed: where the plan
has no seal of this user, only files in the folders `within` (real paths) that the user has named are touched.

A file gets its name only when its bytes are on disk; a run ends when its folders are, so a power cut leaves what
a kill would (on file systems that keep a journal themselves).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlab.curate.journal import deeds
from sdlab.curate.journal.checks import (
    in_words,
    missing_folders,
    on_one_disk,
    refuse_foreign,
    refuse_half_undone,
    refuse_small_disk,
    survey,
)
from sdlab.curate.journal.deeds import Fault, Left, Tree
from sdlab.curate.journal.lines import (
    JOURNAL,
    Entry,
    Operation,
    Pages,
    Section,
    cut,
    load,
    new_token,
    write_mark,
    write_plan,
)
from sdlab.curate.journal.lock import locked
from sdlab.curate.journal.seal import NO_SEAL, Seal
from sdlab.curate.places import unwritable
from sdlab.dataset.disk import sync_folder
from sdlab.dataset.tree import Refused
from sdlab.errors import OutOfResources

__all__ = [
    "JOURNAL",
    "Acted",
    "Operation",
    "Run",
    "Seal",
    "Undone",
    "act",
    "locked",
    "on_one_disk",
    "read",
    "resume",
    "undo",
]

BATCH = (
    16  # operations that are staged at once: what a stop waits for, and what a kill leaves as temporary files
)

Advance = Callable[[float], None]
Stop = Callable[[], bool]
_Step = Callable[[Tree, Entry], bool | None]  # True: nothing is left to do


@dataclass(frozen=True)
class Run:
    """A run in the journal: `operations` are what it made (or, not finished, is to make) and has not taken back."""

    settings: dict[str, Any]  # as JSON gives them back: lists, no tuples
    operations: tuple[Operation, ...]
    finished: bool
    undone: bool = False  # `operations` are what could not be taken back
    undoing: bool = False  # an undo was stopped in the middle: `resume` and `act` refuse, `undo` goes on


@dataclass(frozen=True)
class Acted:
    """What was done. If `stopped`, the run is not finished: `resume` goes on."""

    num_done: int
    faults: tuple[Refused, ...] = ()  # destinations that were not made, and why
    stopped: bool = False


@dataclass(frozen=True)
class Undone:
    """What was taken back. If `stopped`, `undo` goes on."""

    num_undone: int
    left: tuple[Refused, ...] = ()  # what was left as it is, and why
    noted: tuple[Refused, ...] = ()  # taken back, though not as it was
    stopped: bool = False


def read(folder: Path) -> tuple[Run, ...]:
    """The runs in the folder's journal, oldest first; () where there is none. Raises SdlabError if damaged."""
    return tuple(
        Run(
            section.settings,
            tuple(entry.operation for entry in section.entries),
            finished=section.state in ("finished", "undone"),
            undone=section.state == "undone",
            undoing=section.state == "undoing",
        )
        for section in load(folder).sections
    )


def act(
    folder: Path, operations: Sequence[Operation], *, settings: Mapping[str, Any],
    seal: Seal = NO_SEAL, advance: Advance = lambda done: None, stop: Stop = lambda: False, num_workers: int = 4,
) -> Acted:  # fmt: skip
    """Write the whole plan, then do it; call with the folder locked and no run unfinished.

    `advance` hears how many operations are behind us, `stop` is asked before each. An operation that cannot be
    done (its place is taken, its source has changed, …) is a fault, and the others go on. Where none can be done,
    nothing is written. Raises OutOfResources where the disk is too small or full, SdlabError if an undo was
    stopped in the middle.
    """
    pages = load(folder)
    refuse_half_undone(pages, folder)
    assert not pages.sections or pages.sections[-1].state != "planned", "resume first"
    tree, token = Tree(folder), new_token()
    entries, faults = survey(tree, operations, token)
    if not entries:
        return Acted(0, faults)
    refuse_small_disk(tree, entries)
    made = missing_folders(tree, entries)
    pages = write_plan(folder, pages, entries, token=token, settings=settings, made=made, seal=seal.of)
    acted = _do(folder, pages, deeds.stage, advance, stop, num_workers)
    return Acted(acted.num_done, (*faults, *acted.faults), acted.stopped)


def resume(
    folder: Path, *, seal: Seal = NO_SEAL, within: Sequence[str] = (),
    advance: Advance = lambda done: None, stop: Stop = lambda: False,
) -> Acted | None:  # fmt: skip
    """Complete the last run, as `act`; None if it is finished. Those done before count among `num_done`.

    Raises SdlabError if an undo was stopped in the middle, and, before a file is touched, if the run is not sealed by
    this user and brings a file that is not `within`.
    """
    pages = load(folder)
    refuse_half_undone(pages, folder)
    if not pages.sections or pages.sections[-1].state != "planned":
        return None
    refuse_foreign(folder, pages.sections[-1], ("copy", "link", "move"), seal, within)
    # in order and one at a time: what stands in a place tells how far we are only when all before it are done
    return _do(folder, pages, _settle_or_stage, advance, stop, 0)


def undo(
    folder: Path, *, seal: Seal = NO_SEAL, within: Sequence[str] = (),
    advance: Advance = lambda done: None, stop: Stop = lambda: False,
) -> Undone:  # fmt: skip
    """Take the last run back, last operation first; call with the folder locked. Nothing to do without a run.

    What the user has changed since, or what is the only one of its content left, stays as it is and is named;
    pictures that were moved go back even if they were changed. What cannot go back because its old place is taken
    (and the like) stays in the journal, so that a later `undo` tries again. Raises OutOfResources on a full disk, and
    SdlabError, before a file is touched, if the run is not sealed by this user and moved a file from elsewhere than
    `within`.
    """
    pages = load(folder)
    if not pages.sections:
        return Undone(0)
    section, tree = pages.sections[-1], Tree(folder)
    refuse_foreign(folder, section, ("move",), seal, within)  # nothing else writes outside of the folder
    pages = _mark_undoing(folder, pages)
    num_undone = 0
    left: list[Refused] = []
    kept: list[int] = []
    noted: list[Refused] = []
    for done, (number, entry) in enumerate(
        reversed(list(zip(section.numbers, section.entries, strict=True))), start=1
    ):
        if stop():
            return Undone(num_undone, tuple(left), tuple(noted), stopped=True)
        try:
            remark = deeds.take_back(tree, entry)
        except (Left, Fault, OSError) as reason:
            _sweep(tree, [entry])
            left.append(Refused(entry.operation.path, in_words(reason, folder)))
            if not isinstance(reason, Left) or reason.kept:
                kept.append(number)
        else:
            num_undone += remark is not None
            noted += [Refused(entry.operation.path, remark)] if remark else []
        advance(done)
    _remove_made(tree, section)
    _sync(tree, section.entries)
    if kept:
        write_mark(folder, pages, {"is": "undone", "left": sorted(kept)})
    else:
        cut(folder, section.start)
    return Undone(num_undone, tuple(left), tuple(noted))


def _settle_or_stage(tree: Tree, entry: Entry) -> bool | None:
    """True if there is nothing left to do."""
    if deeds.settle(tree, entry):
        return True
    deeds.stage(tree, entry)
    return None


def _do(
    folder: Path, pages: Pages, prepare: _Step, advance: Advance, stop: Stop, num_workers: int
) -> Acted:  # fmt: skip
    """Prepare (on `num_workers` threads, or in line) and place the last plan's operations, then say so on disk."""
    section, tree = pages.sections[-1], Tree(folder)
    faults: dict[int, Refused] = {}
    standing: set[str] = set()  # of the faults, those whose file is there all the same, by the entry's part
    num_behind = 0
    try:
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            for entry, result in _prepared(
                section.entries, lambda e: _attempt(prepare, tree, e, standing), pool, num_workers
            ):
                if stop():
                    return Acted(num_behind - len(faults), tuple(faults.values()), stopped=True)
                result = _attempt(deeds.place, tree, entry, standing) if result is None else result
                if isinstance(result, Refused):
                    faults[section.numbers[num_behind]] = result
                    _sweep(tree, [entry])
                num_behind += 1
                advance(num_behind)
    finally:  # the threads have ended
        _sweep(tree, section.entries[num_behind : num_behind + BATCH])
    _sync(tree, section.entries)
    parts = dict(zip(section.numbers, (entry.part for entry in section.entries), strict=True))
    reasons = {str(number): fault.reason for number, fault in faults.items() if parts[number] not in standing}
    write_mark(folder, pages, {"is": "finished", "faults": reasons})
    return Acted(num_behind - len(faults), tuple(faults.values()))


def _prepared(
    entries: Sequence[Entry], prepare: Callable[[Entry], bool | Refused | None], pool: ThreadPoolExecutor,
    num_workers: int,
) -> Iterator[tuple[Entry, bool | Refused | None]]:  # fmt: skip
    """Each entry with what its preparation said: a batch at a time on threads, or each when its turn comes."""
    for start in range(0, len(entries), BATCH):
        batch = entries[start : start + BATCH]
        if num_workers:  # all, before the first is moved from where another is copied from
            yield from zip(batch, list(pool.map(prepare, batch)), strict=True)
        else:
            yield from zip(batch, map(prepare, batch), strict=True)


def _attempt(
    step: _Step, tree: Tree, entry: Entry, standing: set[str]
) -> bool | Refused | None:  # fmt: skip
    """What the step says, or why it failed; the entry's part is added to `standing` if its file is there then."""
    try:
        return step(tree, entry)
    except (Fault, OSError) as reason:
        if isinstance(reason, OSError) and _stands(tree, entry):
            standing.add(entry.part)
        return Refused(entry.operation.path, in_words(reason, Path(tree.root)))


def _stands(tree: Tree, entry: Entry) -> bool:
    try:
        return deeds.stands(tree, entry)
    except (Fault, OSError):  # it cannot be seen now; undo looks again
        return True


def _sweep(tree: Tree, entries: Sequence[Entry]) -> None:
    for entry in entries:
        try:
            deeds.sweep(tree, entry)
        except (Fault, OSError):  # its folder cannot be reached, which has been or will be reported
            continue


def _sync(tree: Tree, entries: Sequence[Entry]) -> None:
    """Bring the names that were given and taken to disk."""
    folders = {tree.root}
    for entry in entries:
        folders.add(os.path.dirname(os.path.join(tree.root, *entry.operation.path.split("/"))))
        if entry.operation.kind == "move":
            folders.add(os.path.dirname(entry.operation.source))
    for folder in sorted(folders):
        try:
            sync_folder(folder)
        except OSError as reason:
            raise unwritable(reason, Path(folder)) from reason


def _remove_made(tree: Tree, section: Section) -> None:
    """Remove the folders that the run made, where nothing is in them."""
    for path in sorted(section.made, reverse=True):
        try:
            os.rmdir(tree.at(path))
        except (Fault, OSError):  # something is in it, or it is gone or no folder any more: the user's
            continue


def _mark_undoing(folder: Path, pages: Pages) -> Pages:
    if pages.sections[-1].state == "undoing":
        return pages
    try:
        end = write_mark(folder, pages, {"is": "undoing"})
    except OutOfResources:
        return pages  # without this line a killed undo can be resumed as a run too; and undoing may make room
    return replace(pages, end=end)  # its sections are not asked again
