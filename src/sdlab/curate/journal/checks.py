"""What is looked at before a journal's plan is written or obeyed, and how a fault is told."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdlab.curate.journal import deeds
from sdlab.curate.journal.deeds import Fault, Tree
from sdlab.curate.journal.lines import JOURNAL, KINDS, Entry, Operation, Pages, Section, part_name, safe
from sdlab.curate.journal.seal import Seal
from sdlab.curate.places import NO_SPACE
from sdlab.dataset.files import reason_of
from sdlab.dataset.tree import Refused
from sdlab.errors import OutOfResources, SdlabError


def survey(
    tree: Tree, operations: Sequence[Operation], token: str
) -> tuple[list[Entry], tuple[Refused, ...]]:
    """What can be done, as far as can be seen, and what cannot."""
    entries: list[Entry] = []
    faults = []
    taken: set[str] = set()
    for operation in operations:
        _check(operation)
        entry = Entry(operation, part=part_name(token, len(entries)))
        try:
            target = tree.target(entry)
            if operation.kind != "rewrite" and (target in taken or os.path.lexists(target)):
                raise Fault(deeds.OCCUPIED)
            entries.append(deeds.survey(tree, entry))
        except (Fault, OSError) as reason:
            faults.append(Refused(operation.path, in_words(reason, Path(tree.root))))
            continue
        taken.add(target)
    return entries, tuple(faults)


def _check(operation: Operation) -> None:
    safe(operation.path)
    assert operation.kind in KINDS, operation
    if operation.kind in ("copy", "link", "move"):
        assert os.path.isabs(operation.source) and operation.sha256, operation
    if operation.kind == "rewrite":
        assert operation.data != operation.old, operation


def missing_folders(tree: Tree, entries: Sequence[Entry]) -> list[str]:
    """The folders that the plan will make, relative, those above before those below."""
    parents = {entry.operation.path.rpartition("/")[0] for entry in entries} - {""}
    wanted = {path.rsplit("/", n)[0] for path in parents for n in range(path.count("/") + 1)}
    return sorted(path for path in wanted if not os.path.lexists(tree.at(path)))


def on_one_disk(source: str, folder: Path) -> bool:
    """True if hard links and quick moves from `source` into `folder` (which need not be there yet) can work."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return os.stat(source).st_dev == above.stat().st_dev


def refuse_half_undone(pages: Pages, folder: Path) -> None:
    """Raises SdlabError where an undo of the last run was begun and not finished."""
    if pages.sections and pages.sections[-1].state == "undoing":
        raise SdlabError(
            "an undo was stopped in the middle here",
            where=str(folder),
            next_step=f"Finish it first: sdlab categorize --undo {folder}",
        )


def refuse_foreign(
    folder: Path, section: Section, kinds: Sequence[str], seal: Seal, within: Sequence[str]
) -> None:
    """Raises SdlabError where a run that this user did not seal is about files that are not `within`."""
    sources = (entry.operation.source for entry in section.entries if entry.operation.kind in kinds)
    elsewhere = next((source for source in sources if not _is_within(source, within)), None)
    if elsewhere is None or seal.fits(section.digest, section.seal):
        return
    here = shlex.quote(str(folder))
    raise SdlabError(
        f"was not written by you on this machine, and names {elsewhere}; nothing was touched",
        where=str(folder / JOURNAL),
        next_step=f"If the run was yours, name the folder of its pictures: sdlab categorize IMAGES --undo {here}. "
        "If it came with the folder, remove this file",
    )


def _is_within(source: str, folders: Sequence[str]) -> bool:
    """True if the file that the path leads to lies in one of the folders."""
    real = os.path.realpath(source)
    return any(real.startswith(os.path.join(folder, "")) for folder in folders)


def refuse_small_disk(tree: Tree, entries: Sequence[Entry]) -> None:
    """Raises OutOfResources where what is to be copied does not fit on the disk."""
    device = os.stat(tree.root).st_dev
    needed = sum(
        entry.size_bytes
        for entry in entries
        if entry.operation.kind == "copy"
        or (entry.operation.kind == "move" and os.lstat(entry.operation.source).st_dev != device)
    )
    free = shutil.disk_usage(tree.root).free
    if needed > free:
        raise OutOfResources(
            f"{needed / 1e6:.1f} MB to write and {free / 1e6:.1f} MB free",
            where=tree.root,
            next_step="Free some space, or use --mode hardlink or another --output-dir",
        )


def in_words(reason: Exception, folder: Path) -> str:
    """Why, in words. Raises OutOfResources where it is that the disk is full: the next ones would fail too."""
    if not isinstance(reason, OSError):
        return str(reason)
    if reason.errno in NO_SPACE:
        raise OutOfResources(
            f"no space left ({reason_of(reason)}); nothing is lost",
            where=str(folder),
            next_step=f"Free some and run the same again, or take all back: sdlab categorize --undo {folder}",
        ) from reason
    return reason_of(reason)
