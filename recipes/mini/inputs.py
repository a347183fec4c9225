"""Is what a command has made still made of what is there now?

The journal holds a mark of every input as it was when the command first started. A folder that was made by hand has no
marks; the times at which it and its inputs were made are compared instead.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

from recipes.mini.data.folders import RECORD, part_folders
from recipes.mini.disk import digests
from recipes.mini.journal import Journal
from recipes.mini.recipe import Command

from sdlab.errors import SdlabError
from sdlab.models.runs import about


def marks(command: Command, work: Path) -> dict[str, str]:
    """Of every folder in `work` that the command reads: what changes when the folder is made anew, as another one."""
    return {name: mark(work / name) for name in command.inputs if (work / name).is_dir()}


def mark(folder: Path) -> str:
    """A drawn dataset's record (its pictures are a function of it), when a run ended, or a digest of all files."""
    if (folder / RECORD).is_file():
        return (folder / RECORD).read_text(encoding="utf-8").strip()
    if (folder / "run.json").is_file():
        return str(about(folder).get("ended"))
    return hashlib.sha256(json.dumps(digests(folder)).encode()).hexdigest()


def refuse_stale(command: Command, work: Path, journal: Journal) -> None:
    """Raises SdlabError where what a command has made, or begun, is made of something else than what is there now."""
    entry = journal.of(command.name)
    recorded = entry.inputs if entry else {}
    folder = command.folder(work)
    own = made_at(command.name, folder, journal)
    for name, now in marks(command, work).items():
        if name in recorded:
            what = f"was made of another {name} than there is now" if recorded[name] != now else ""
        else:
            theirs = made_at(Path(name).name, work / name, journal)
            what = f"is older than {name}, which it is made of" if own and theirs and own < theirs else ""
        if what:
            raise SdlabError(what, where=str(folder), next_step="Remove it to make it anew")


def made_at(name: str, folder: Path, journal: Journal) -> datetime | None:
    """When a folder came to be as it is: a run says so itself, others by the journal and their files. None for a run
    that has not ended."""
    if (folder / "run.json").is_file():
        ended = about(folder).get("ended")
        return datetime.fromisoformat(ended.replace("Z", "+00:00")) if isinstance(ended, str) else None
    # A dataset's thousands of files never change in their parts.
    paths = part_folders(folder) if (folder / RECORD).is_file() else folder.rglob("*")
    known = journal.ended(name)
    times = [datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) for path in paths]
    return max([*times, *([known] if known else [])], default=None)
