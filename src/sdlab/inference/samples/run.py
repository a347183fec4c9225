"""Making the pictures of the sheets: every model is opened first, then each is loaded once, used and left."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlab import show
from sdlab.errors import ItemsFailed, OutOfResources, SdlabError, Stopped
from sdlab.inference.batch import Batch
from sdlab.inference.config import GenerateConfig, SamplesConfig
from sdlab.inference.identity import Hasher
from sdlab.inference.jobs import drawing, output
from sdlab.inference.jobs.drawing import Begun
from sdlab.inference.jobs.journal import Journal
from sdlab.inference.jobs.plan import Fault, Item, Plan, batches, planned
from sdlab.inference.jobs.report import Report
from sdlab.inference.jobs.session import Session, format_of, open_session, size_of, spec_of
from sdlab.inference.prompts.lines import Line
from sdlab.inference.samples import about, contents
from sdlab.inference.samples.about import About
from sdlab.inference.samples.axes import Axis
from sdlab.inference.samples.contents import CELLS, Group
from sdlab.inference.samples.plan import (
    Place,
    arranged,
    as_generate,
    default_prompts,
)
from sdlab.inference.samples.sheet import write
from sdlab.inference.spec import Shot, Spec
from sdlab.options import as_json

NOT_THE_JOB = (*drawing.NOT_THE_JOB, "cell", "redraw", "axes")

_Key = tuple[tuple[str, Any], ...]  # options that need a model opened anew, by field


def make(
    config: SamplesConfig,
    axes: Sequence[Axis],
    lines: Sequence[Line],
    *,
    num_seeds: int,
    tuned: Path,
    hasher: Hasher,
) -> None:
    """Make the pictures that are missing, and draw the sheets. Without `lines`, prompts are taken that suit the model.

    All models are opened and all pictures planned before the first is made. Raises ItemsFailed where pictures
    failed: their places on the sheets say why.
    """
    sessions = _opened(config, axes, tuned, hasher)
    lines = lines or default_prompts(next(iter(sessions.values())).opened.chosen.model.base)
    output.make_folder(config.output)
    total = arranged(axes, lines, num_seeds=num_seeds, first_seed=0).num_pictures
    with _begin(config, axes, sessions.values(), total=total) as journal:
        try:
            arrangement = arranged(axes, lines, num_seeds=num_seeds, first_seed=journal.seed)
            groups = _groups(sessions, arrangement.places(seed=journal.seed))
            told = contents.told(config, arrangement, groups, seed=journal.seed)
        except SdlabError:
            if not journal.resumed:
                journal.close(complete=True)  # nothing has begun
            raise
        folder = config.output / f"samples_{journal.stamp}"
        output.make_folder(folder / CELLS)
        about.save(told, folder)
        try:
            _draw(told, groups, journal, folder)
        except ItemsFailed:
            raise
        except (SdlabError, KeyboardInterrupt):
            if not any((folder / CELLS).iterdir()) and not journal.resumed:
                _undo(folder, journal)
            else:
                show.note(f"sdlab samples --redraw {folder} draws the sheets of what is made")
            raise


def _undo(folder: Path, journal: Journal) -> None:
    """Leave nothing of a job that made no picture."""
    (folder / about.NAME).unlink(missing_ok=True)
    (folder / CELLS).rmdir()
    folder.rmdir()
    journal.close(complete=True)


def _opened(config: SamplesConfig, axes: Sequence[Axis], tuned: Path, hasher: Hasher) -> dict[_Key, Session]:
    """Every model that is needed, its headers read. Raises SdlabError for the first that cannot be used."""
    arrangement = arranged(axes, [Line("")], num_seeds=1, first_seed=0)
    wanted = dict.fromkeys(_key(place.of_model) for place in arrangement.places(seed=0))
    return {key: open_session(as_generate(config, **dict(key)), tuned=tuned, hasher=hasher) for key in wanted}


def _key(of_model: Mapping[str, Any]) -> _Key:
    return tuple(sorted(of_model.items()))


def _begin(
    config: SamplesConfig, axes: Sequence[Axis], sessions: Iterable[Session], *, total: int
) -> Journal:
    """A new job, or the one that the same command left unfinished in the folder."""
    command = {
        **{name: value for name, value in as_json(config).items() if name not in NOT_THE_JOB},
        "kind": "samples",
        "axes": [[axis.place, axis.field, [str(one.value) for one in axis.values]] for axis in axes],
        "files": [drawing.hashes_of(session) for session in sessions],
    }
    return Journal.begin(
        config.output, command=command, seed=config.seed, restart=config.restart, total=total
    )


def _groups(sessions: Mapping[_Key, Session], places: Sequence[Place]) -> list[Group]:
    """The pictures by model, in the order of each model's first. Raises SdlabError where a model has none to make."""
    by_model: dict[_Key, list[Place]] = {}
    for place in places:
        by_model.setdefault(_key(place.of_model), []).append(place)
    return [Group(sessions[key], _plan(sessions[key], some)) for key, some in by_model.items()]


def _plan(session: Session, places: Sequence[Place]) -> Plan:
    def spec_for(config: GenerateConfig) -> Spec:
        return spec_of(session, config, size=size_of(session, config))

    plan = planned(session, [place.line for place in places], seed=0, spec_for=spec_for)
    numbers = [place.index for place in places]

    def item(one: Item) -> Item:
        return dataclasses.replace(one, shot=dataclasses.replace(one.shot, index=numbers[one.shot.index]))

    def fault(one: Fault) -> Fault:
        return dataclasses.replace(one, index=numbers[one.index])

    return dataclasses.replace(
        plan, items=tuple(map(item, plan.items)), faults=tuple(map(fault, plan.faults))
    )


def _draw(told: About, groups: Sequence[Group], journal: Journal, folder: Path) -> None:
    """Make the pictures, group after group, then the sheets. Raises ItemsFailed if any picture failed."""
    report = Report()
    begun = Begun(journal.seed, journal.stamp, journal)
    for group in groups:
        try:
            drawing.draw(group.session, group.plan, begun, report, _batches(group, folder))
        except (OutOfResources, Stopped):
            raise
        except SdlabError as reason:  # the other models' pictures are still made
            if not report.pictures and group is groups[0]:
                raise
            for item in group.plan.items:
                report.fail(item.where, str(reason), index=item.shot.index, prompt=item.shot.typed)
        _freed()
    paths = report.already | {one.index: one.path for one in report.pictures}
    files = {index: path.relative_to(folder).as_posix() for index, path in paths.items()}
    faults = {one.index: one.why for one in report.failed if one.index is not None and not one.file}
    told = told.told(files, faults)
    about.save(told, folder)
    for sheet in told.sheets:
        show.out(str(write(sheet, told.look, folder)))
    report.write(folder)
    show.note(report.summary())
    journal.close(complete=report.is_whole)
    report.close()


def _batches(group: Group, folder: Path) -> Callable[[Plan], Iterator[Batch]]:
    suffix = format_of(group.session.config).suffix

    def names(shot: Shot) -> Iterator[str]:
        return output.mirrored(f"{shot.index:04d}", suffix)

    return lambda plan: batches(group.session, plan, folder=folder / CELLS, names=names)


def _freed() -> None:
    """Give back what the model before has held, so that two never lie in memory together."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
