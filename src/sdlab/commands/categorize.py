"""`sdlab categorize`: say what is in each picture, and sort the pictures into folders that are prompts."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import progress, show
from sdlab.curate.categorize.options import CategorizeConfig
from sdlab.errors import ItemsFailed, SdlabError, Stopped

if TYPE_CHECKING:
    from sdlab.curate.categorize.run import Report
    from sdlab.curate.journal.seal import Seal

__all__ = ["CategorizeConfig", "categorize"]

WITH_UNDO = frozenset({"undo", "json", "images", "cache_dir"})


def categorize(config: CategorizeConfig, given: frozenset[str] = frozenset()) -> None:
    """Say what is in each picture, write it down, and sort the pictures into folders that are prompts.

    With --organize, each picture goes to a folder named by the most frequent of its keywords, in it to the next.
    With --caption, each gets a .cap file. With neither, nothing is written: what --organize would do is printed.

    The pictures in IMAGES are left as they are (but for --mode move), and nothing is ever overwritten. A journal
    in the output folder is written before any file: the same command goes on where it was stopped, and
    --undo DIR takes everything back. A picture that cannot be used is named, with the reason, and stays.
    """
    if config.print_filler:
        from sdlab.curate.keywords.filler import default_filler

        show.out(default_filler().rstrip("\n"))
    elif config.undo is not None:
        _undo(config.undo, config, given)
    else:
        _categorize(config)


def _categorize(config: CategorizeConfig) -> None:
    from sdlab.curate.categorize import summary
    from sdlab.curate.categorize.job import prepare
    from sdlab.curate.categorize.run import categorize
    from sdlab.dataset.report import num_of
    from sdlab.signals import stop_on_signals

    job = prepare(config)
    show.note(job.captioner.why)
    with stop_on_signals() as request:
        report = categorize(job, stop=lambda: bool(request), seal=_seal())
    show.report(report, as_json=summary.as_json, as_lines=summary.as_lines, in_json=config.json)
    if report.stopped:
        raise Stopped(request.signum, "stopped", next_step=_ways_on(report))
    if summary.is_useless(report):
        raise summary.nothing_usable(report)
    if failed := summary.faults(report):
        raise ItemsFailed(f"not written: {num_of(len(failed), 'file')}, for the reasons above")


def _ways_on(report: Report) -> str:
    acted = report.acted or report.resumed
    if acted is None:
        return "Nothing but the cache was written; the same command goes on"
    folder = shlex.quote(str(report.job.acts_in))
    return f"The same command goes on; sdlab categorize --undo {folder} takes back what was done"


def _undo(folder: Path, config: CategorizeConfig, given: frozenset[str]) -> None:
    if others := given - WITH_UNDO:
        wrong = ", ".join(sorted(others))
        raise SdlabError(f"takes nothing beside it ({wrong})", where="--undo", next_step="Leave that out")
    from sdlab.curate.journal import run as journal
    from sdlab.dataset.report import num_of
    from sdlab.signals import stop_on_signals

    runs = journal.read(folder)
    _point_to_output(folder)
    total = len(runs[-1].operations) if runs else 0
    with stop_on_signals() as request, journal.locked(folder, make=False):
        with progress.pictures(total, doing="taking back:") as advance:
            undone = journal.undo(
                folder, seal=_seal(), within=_within(folder, config, given), advance=advance,
                stop=lambda: bool(request),
            )  # fmt: skip
    if config.json:
        show.out_json(
            {
                "folder": str(folder),
                "undone": undone.num_undone,
                "left": [{"path": path, "reason": reason} for path, reason in undone.left],
                "notes": [{"path": path, "text": text} for path, text in undone.noted],
                "stopped": undone.stopped,
            }
        )
    else:
        for path, reason in (*undone.noted, *undone.left):
            show.out(f"{path}: {reason}")
        show.out(f"{num_of(undone.num_undone, 'file')} taken back")
        if len(runs) > 1 and not undone.stopped:
            show.out(
                f"still there: {num_of(len(runs) - 1, 'earlier run')}; once more takes back the last of them"
            )
    if undone.stopped:
        raise Stopped(request.signum, "stopped", next_step="The same command goes on")
    if undone.left:
        raise ItemsFailed(
            f"not taken back: {num_of(len(undone.left), 'file')}, for the reasons above", where=str(folder)
        )


def _within(folder: Path, config: CategorizeConfig, given: frozenset[str]) -> list[str]:
    """The folders to which the user lets files go back, whoever wrote the journal: none without IMAGES."""
    from sdlab.curate.categorize.run import within
    from sdlab.curate.places import cache_for

    if "images" not in given:
        return []
    captions = folder.resolve() == config.images.resolve()
    return within(config, cache_for(config.images, None if captions else folder, config.cache_dir))


def _seal() -> Seal:
    """The seal of the user who runs this; one that fits nothing where a user has no folder for what is kept."""
    from sdlab.curate.journal.seal import Seal

    home = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    if home:
        folder = Path(home)
    elif os.environ.get("HOME"):
        folder = Path("~/.local/state").expanduser()
    else:
        return Seal()
    return Seal(folder / "sdlab" / "journal.key")


def _point_to_output(folder: Path) -> None:
    """Raises SdlabError where someone names the pictures rather than the folder they were sorted into."""
    from sdlab.curate.journal.run import JOURNAL
    from sdlab.curate.places import output_for

    beside = output_for(folder, None) if folder.is_dir() else folder
    if not (folder / JOURNAL).exists() and (beside / JOURNAL).exists():
        raise SdlabError(
            "nothing was done in this folder",
            where=str(folder),
            next_step=f"The journal is beside it: sdlab categorize --undo {shlex.quote(str(beside))}",
        )
