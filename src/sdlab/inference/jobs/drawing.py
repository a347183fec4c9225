"""A job from its plan to its report: begun or gone on with, what is missing drawn, what failed told."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import show
from sdlab.inference.jobs import job, output
from sdlab.inference.jobs.journal import Journal
from sdlab.inference.jobs.missing import missing
from sdlab.inference.jobs.plan import Plan, loaded_for, rehearse
from sdlab.options import as_json

if TYPE_CHECKING:
    from sdlab.inference.batch import Batch
    from sdlab.inference.jobs.report import Report
    from sdlab.inference.jobs.session import Session
    from sdlab.inference.spec import Init, Shot

NOT_THE_JOB = (
    "output",
    "restart",
    "explain",
    "batch",
    "grid",
)  # options that change nothing of what is drawn


@dataclass(frozen=True)
class Begun:
    """A job with its seed and the time that its files are named by."""

    seed: int
    stamp: str
    journal: Journal | None  # None for a single picture, of which nothing can be half done


def begin(session: Session, num: int, folder: Path, *, pictures: Sequence[Init] = ()) -> Begun:
    """A new job of `num` pictures, or the one that the same command left unfinished in the folder.

    `pictures` are those that it starts from, beside the ones of --ref.
    """
    config = session.config
    if num == 1:
        return Begun(secrets.randbelow(2**32) if config.seed is None else config.seed, stamp_now(), None)
    command = {
        **{name: value for name, value in as_json(config).items() if name not in NOT_THE_JOB},
        "kind": type(config).__name__,
        "files": hashes_of(session),
        "pictures": [one.sha256 for one in pictures],
    }
    journal = Journal.begin(folder, command=command, seed=config.seed, restart=config.restart, total=num)
    return Begun(journal.seed, journal.stamp, journal)


def hashes_of(session: Session) -> list[str]:
    """sha256 of everything that all the session's pictures are made from."""
    chosen = session.opened.chosen
    parts = [chosen.source, chosen.unet, chosen.vae, chosen.own_lora, chosen.rest]
    parts += [source for source, _ in chosen.loras]
    files = [part.record()["sha256"] for part in parts if part is not None]
    return files + [reference.source.sha256 for reference, _ in session.seen]


def draw(
    session: Session,
    plan: Plan,
    begun: Begun,
    report: Report,
    batches: Callable[[Plan], Iterable[Batch]],
    *,
    by_name: bool = False,
) -> None:
    """Make the plan's pictures, in the groups that `batches` gives, but for those that the journal knows.

    `by_name`: the results' own names tell what is missing, and the journal is not asked.
    """
    for fault in plan.faults:
        report.fail(fault.where, fault.why, index=fault.index, prompt=fault.prompt, seed=fault.seed)
    journal, shots = None if by_name else begun.journal, [item.shot for item in plan.items]
    if journal is not None and journal.resumed:  # only what is missing is read by a large text encoder
        shots = [shot for batch in missing(batches(plan), report, journal) for shot in batch.shots]
    if not shots:
        return
    loaded = loaded_for(session, shots)
    whole, plan = plan, rehearse(session, loaded, plan)
    for fault in plan.faults[len(whole.faults) :]:
        report.fail(fault.where, fault.why, index=fault.index, prompt=fault.prompt, seed=fault.seed)
    exact, total = session.config.exact, len(plan.items)
    job.make(loaded, batches(plan), total=total, exact=exact, report=report, journal=journal)


def finish(session: Session, begun: Begun, report: Report, folder: Path, *, by_name: bool = False) -> None:
    """Write what came of the job, and say it. Raises ItemsFailed if anything failed.

    `by_name`: the results' own names tell what is missing, so no journal has to stay for that.
    """
    if session.config.grid:
        job.write_grid(report, folder=folder, stamp=begun.stamp)
    report.write(folder)
    show.note(report.summary())
    if begun.journal is not None:
        begun.journal.close(complete=report.is_whole or by_name or not report.paths)
    if begun.journal is not None and not report.is_whole and not by_name and session.config.seed is None:
        show.note(f"the same command with --seed {begun.seed} makes only what is missing")
    report.close()


def numbered(stamp: str, suffix: str) -> Callable[[Shot], Iterator[str]]:
    """``sd_{stamp}_{index}`` for each shot, and the numbers after it where that is taken."""
    return lambda shot: output.numbered(stamp, shot.index, suffix)


def stamp_now() -> str:
    """The time as it stands in file names."""
    return time.strftime("%Y%m%d-%H%M%S")
