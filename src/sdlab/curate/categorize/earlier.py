"""What earlier runs into the same folder did: which pictures they placed, and with which settings."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlab.curate.categorize import sheets
from sdlab.curate.journal.run import JOURNAL, Operation, Run
from sdlab.dataset.tree import SUFFIXES, reference_of
from sdlab.errors import SdlabError
from sdlab.options import normalise

ORGANIZE, CAPTION = "organize", "caption"  # kinds of runs
_BROUGHT = ("copy", "link", "move")


@dataclass(frozen=True)
class Earlier:
    """What the finished runs of a journal did."""

    placed: Mapping[tuple[str, str], str] = field(
        default_factory=dict
    )  # (source, sha256) -> path in the folder
    num_pictures: int = 0  # of `placed`, the pictures that are no references
    keywords: tuple[
        tuple[tuple[str, ...], int], ...
    ] = ()  # of pictures that are not among IMAGES any more: times
    undrawn: frozenset[str] = frozenset()  # pictures on no contact sheet yet, by their paths in the folder
    has_sheets: bool = False  # whether a run has made some, of pictures or of captions


def of(runs: Sequence[Run], images: Path) -> Earlier:
    """What the runs placed. Those of other pictures than `images`, or that moved them, count by their keywords."""
    placed: dict[tuple[str, str], str] = {}
    num_pictures = 0
    keywords: list[tuple[tuple[str, ...], int]] = []
    undrawn: set[str] = set()
    has_sheets = False
    for run in runs:
        if run.undone:
            continue
        has_drawn = any(_is_sheet(o) for o in run.operations)
        has_sheets = has_sheets or has_drawn
        if run.settings.get("kind") != ORGANIZE:
            continue
        undrawn = set() if has_drawn else undrawn | {o.path for o in run.operations if _is_picture(o)}
        placed |= {(o.source, o.sha256): o.path for o in run.operations if o.kind in _BROUGHT}
        num_pictures += sum(_is_picture(o) for o in run.operations)
        if run.settings.get("mode") == "move" or run.settings.get("images") != os.path.abspath(images):
            keywords += _keywords(run)
    return Earlier(placed, num_pictures, tuple(keywords), frozenset(undrawn), has_sheets)


def _keywords(run: Run) -> list[tuple[tuple[str, ...], int]]:
    """The keywords of the run's pictures; they count no more pictures than it brought, whatever is written there."""
    left = len(run.operations)
    found = []
    try:
        for words, count in run.settings.get("keywords", []):
            if not all(isinstance(word, str) for word in words):
                raise TypeError(f"{words!r} are no keywords")
            num = max(0, min(int(count), left))
            left -= num
            found.append((tuple(words), num))
    except (TypeError, ValueError, OverflowError) as reason:
        raise SdlabError(
            f"the keywords of a run are not what sdlab wrote ({reason})", where=JOURNAL
        ) from reason
    return found


def _is_picture(operation: Operation) -> bool:
    """Whether it brings a picture: no picture is ever given the name of a reference, nor a place among sheets."""
    path = operation.path.lower()
    return (
        operation.kind in _BROUGHT
        and path.endswith(tuple(SUFFIXES))
        and reference_of(path[: path.rfind(".")]) is None
        and not _is_sheet(operation)
    )


def _is_sheet(operation: Operation) -> bool:
    return operation.path.startswith(f"{sheets.FOLDER}/")


def check_same(runs: Sequence[Run], settings: Mapping[str, Any], folder: Path) -> None:
    """Raises SdlabError where the last run that sorted into the folder had other settings."""
    last = next(
        (run for run in reversed(runs) if run.settings.get("kind") == ORGANIZE and not run.undone), None
    )
    if last is None:
        return
    others = {name: value for name, value in settings.items() if last.settings.get(name) != value}
    if not others:
        return
    said = [
        f"--{normalise(name)} {_said(last.settings.get(name))}, now {_said(value)}"
        for name, value in others.items()
    ]
    here = shlex.quote(str(folder))
    captions = f"For captions of what is there: sdlab categorize {here} --caption. "
    raise SdlabError(
        f"holds what a run with other settings made ({'; '.join(said)})",
        where=str(folder),
        next_step=f"{captions if others == {'caption': True} else ''}"
        f"Take that back with sdlab categorize --undo {here}, or give another --output-dir",
    )


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
