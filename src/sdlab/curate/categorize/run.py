"""From a heap of pictures to folders that are prompts: look, caption, find keywords, plan, and only then act."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlab import show
from sdlab.curate import places
from sdlab.curate.categorize import earlier, plan, sheets
from sdlab.curate.categorize.arrange import REVIEW, arrange
from sdlab.curate.categorize.earlier import Earlier
from sdlab.curate.categorize.job import Job, scan, settings_of
from sdlab.curate.categorize.look import Looked, Stop, bar, look, with_keywords
from sdlab.curate.categorize.options import CategorizeConfig
from sdlab.curate.categorize.plan import Plan, Told
from sdlab.curate.journal import run as journal
from sdlab.curate.journal.seal import NO_SEAL, Seal
from sdlab.curate.keywords.tagger import Tagger, open_tagger
from sdlab.curate.names import Names
from sdlab.dataset import tree
from sdlab.errors import SdlabError

Tiles = defaultdict[tuple[str, ...], list[sheets.Tile]]
DRAWN = "sheets"  # in the cache, until they are moved to their place


@dataclass(frozen=True)
class Report:
    """What was seen and done."""

    job: Job
    looked: Looked
    earlier: Earlier
    pipeline: str = ""  # name and version; "" where none was needed
    places: Mapping[str, str] = field(default_factory=dict)  # path in the output of each new picture, by id
    before: Mapping[str, str] = field(default_factory=dict)  # of each that an earlier run placed
    plan: Plan = field(default_factory=Plan)
    acted: journal.Acted | None = None  # None where nothing was to be done
    resumed: journal.Acted | None = None
    seconds: float = 0.0
    stopped: bool = False


def categorize(job: Job, *, stop: Stop, seal: Seal = NO_SEAL) -> Report:
    """Do it. A report that says `stopped` tells how far it came. The journal gets the user's seal."""
    started = time.monotonic()
    places.check_writable(job.cache)
    lock = nullcontext() if job.acts_in is None else journal.locked(job.acts_in)
    with ThreadPoolExecutor(1) as pool, lock:
        # a second of imports, while files are compared
        tagger = pool.submit(open_tagger, job.config.spacy_model, job.filler) if job.sorts else None
        before, resumed = _before(job, stop, seal)
        if resumed is not None:
            job = replace(job, found=scan(job.config))  # pictures may have been moved, captions written
        report = _look_and_act(job, before, tagger, stop, seal)
    stopped = report.stopped or (resumed is not None and resumed.stopped)
    return replace(report, resumed=resumed, stopped=stopped, seconds=time.monotonic() - started)


def _before(job: Job, stop: Stop, seal: Seal) -> tuple[Earlier, journal.Acted | None]:
    """What earlier runs did, the last of them completed. Raises SdlabError where their settings are others."""
    folder = job.output if job.config.organize else job.acts_in
    if folder is None:
        return Earlier(), None
    runs = journal.read(folder)
    if job.config.organize:
        earlier.check_same(runs, settings_of(job), folder)
    unfinished = bool(runs) and not runs[-1].finished
    if not unfinished:
        return earlier.of(runs, job.config.images), None
    if job.acts_in is None:
        show.note(f"{folder}: a run was stopped here; the same command without --dry-run completes it first")
        return earlier.of(runs, job.config.images), None
    show.note(f"{folder}: completing the run that was stopped")
    num = len(runs[-1].operations)
    with bar(num, "completing:") as advance:
        resumed = journal.resume(
            folder, seal=seal, within=within(job.config, job.cache), advance=advance, stop=stop
        )
    return earlier.of(journal.read(folder), job.config.images), resumed


def within(config: CategorizeConfig, cache: Path) -> list[str]:
    """The folders whose files a run brings: of the pictures, if it sorts them, and of sheets. Real paths."""
    drawn = os.path.join(os.path.realpath(cache.parent), cache.name, DRAWN)
    return [drawn] if config.caption and not config.organize else [os.path.realpath(config.images), drawn]


def _look_and_act(job: Job, before: Earlier, tagger: Future[Tagger] | None, stop: Stop, seal: Seal) -> Report:
    with places.room_in(job.cache):
        looked = look(job, tagger, stop)
    report = Report(job, looked, before)
    if stop():
        return replace(report, stopped=True)
    if tagger is None:
        return _caption(report, stop, seal)
    opened = tagger.result()
    report = replace(report, looked=with_keywords(looked, opened), pipeline=f"{opened.name} {opened.version}")
    return _organize(report, stop, seal)


def _organize(report: Report, stop: Stop, seal: Seal) -> Report:
    """Plan where the new pictures go, and bring them there unless that is only asked."""
    job, source = report.job, report.looked.source
    placed = report.earlier.placed
    before = {
        sample.id: placed[at]
        for one in report.looked.told
        for sample in one.unit.samples
        if (at := (source.path(sample.id), source.hashes[sample.path])) in placed
    }
    new = _without(report.looked.told, before.keys())
    names = plan.names_in(job.output)
    spots = plan.places(new, _folders(report), names)
    _check_folders({spot.folder for spot in spots}, job.output)
    config = job.config
    planned = plan.organize(
        list(zip(new, spots, strict=True)),
        source,
        mode=config.mode,
        how=config.captions,
        write_captions=config.caption,
    )
    went = {
        sample.id: "/".join((*spot.folder, spot.stem)) + one.unit.tail(sample.id)
        for one, spot in zip(new, spots, strict=True)
        for sample in one.unit.samples
    }
    report = replace(report, plan=planned, places=went, before=before)
    if job.acts_in is None:
        return report
    if config.mode == "hardlink":
        _check_disk(planned.operations, job.output)
    if config.sheet:
        tiles = _undrawn(report)
        for one, spot in zip(new, spots, strict=True):
            tiles[spot.folder] += _tiles(one)
        _add_sheets(report, tiles, names, stop)
    counted = Counter(one.keywords for one in new for _ in one.unit.samples if not _is_out(one, config))
    words = [[list(words), count] for words, count in sorted(counted.items())]
    settings = {**settings_of(job), "kind": earlier.ORGANIZE, "images": os.path.abspath(config.images)}
    return _act(report, {**settings, "keywords": words}, stop, seal)


def _without(told: Iterable[Told], ids: Iterable[str]) -> list[Told]:
    """The units without the pictures of these ids; those of which none is left are left out."""
    gone = set(ids)
    rest = []
    for one in told:
        samples = tuple(sample for sample in one.unit.samples if sample.id not in gone)
        if samples:
            rest.append(replace(one, unit=replace(one.unit, samples=samples)))
    return rest


def _folders(report: Report) -> dict[str, tuple[str, ...]]:
    """The folders of each picture by id, from the keywords of all there are and of those moved away earlier."""
    config = report.job.config
    words: dict[str, Sequence[str]] = {
        sample.id: one.keywords
        for one in report.looked.told
        for sample in one.unit.samples
        if not _is_out(one, config)
    }
    for number, (found, count) in enumerate(report.earlier.keywords):
        words |= {f"\0{number}/{copy}": found for copy in range(count)}  # no id has a NUL
    folders = arrange(words, min_count=config.min_count, depth=config.depth)
    doubtful = (s.id for one in report.looked.told for s in one.unit.samples if _is_out(one, config))
    return {**folders, **dict.fromkeys(doubtful, (REVIEW,))}


def _is_out(one: Told, config: CategorizeConfig) -> bool:
    """Whether it goes to _review/: what a doubtful caption says then makes no folders."""
    return config.review and one.doubtful


def _caption(report: Report, stop: Stop, seal: Seal) -> Report:
    """Plan the .cap files beside the pictures, and write them unless that is only asked."""
    job, looked = report.job, report.looked
    wanted = [one for one in looked.told if not _is_out(one, job.config)]
    planned = plan.caption(wanted, looked.source, how=job.config.captions)
    report = replace(report, plan=planned)
    if job.acts_in is None:
        return report
    if job.config.sheet:
        changed = {operation.path.rpartition("/")[0] for operation in planned.operations}
        tiles: Tiles = defaultdict(list)
        for one in looked.told:
            if one.unit.folder in changed or not report.earlier.has_sheets:
                tiles[_segments(one.unit.folder)] += _tiles(one)
        _add_sheets(report, tiles, plan.names_in(job.acts_in, sheets.FOLDER), stop)
    settings = {"kind": earlier.CAPTION, "captions": job.config.captions, "load_model": job.captioner.name}
    return _act(report, settings, stop, seal)


def _tiles(one: Told) -> list[sheets.Tile]:
    return [sheets.Tile(sample.path, _below(one)) for sample in one.unit.samples]


def _below(one: Told) -> str:
    sure = "" if one.confidence is None else f"{one.confidence:.2f} "
    return f"{sure}{one.text}"


def _undrawn(report: Report) -> Tiles:
    """Pictures of earlier runs, made without --sheet, by folder; those that still lie where they were brought."""
    tiles: Tiles = defaultdict(list)
    if not report.earlier.undrawn:
        return tiles
    told = {
        report.before[sample.id]: _below(one)
        for one in report.looked.told
        for sample in one.unit.samples
        if sample.id in report.before
    }
    for sample in tree.scan(report.job.output, use_txt=report.job.config.txt).samples:
        if sample.id in report.earlier.undrawn:
            text = told.get(sample.id, sample.prompt)  # of one that was moved, what training would read
            tiles[_segments(sample.id.rpartition("/")[0])].append(sheets.Tile(sample.path, text))
    return tiles


def _segments(folder: str) -> tuple[str, ...]:
    return tuple(filter(None, folder.split("/")))


def _add_sheets(report: Report, tiles: Tiles, names: Names, stop: Stop) -> None:
    """Draw the sheets into the cache, and plan that they are moved to their place."""
    job = report.job
    with bar(sum(map(len, tiles.values())), "drawing sheets:") as advance, places.room_in(job.cache):
        drawn = sheets.write_sheets(
            tiles, names=names, drawn_in=job.cache / DRAWN, look=job.look, advance=advance, stop=stop
        )
    report.plan.operations += drawn
    report.plan.num_sheets = len(drawn)


def _check_folders(folders: Iterable[tuple[str, ...]], output: Path) -> None:
    """Raises SdlabError where a file has the name of a folder that is to be made."""
    for folder in sorted(folders):
        for depth in range(1, len(folder) + 1):
            path = output.joinpath(*folder[:depth])
            if os.path.lexists(path) and not path.is_dir():
                raise SdlabError(
                    "is a file, and pictures are to go to a folder of that name",
                    where=str(path),
                    next_step="Move it away, or give another --output-dir",
                )


def _check_disk(operations: Iterable[journal.Operation], output: Path) -> None:
    sources = (operation.source for operation in operations if operation.kind == "link")
    elsewhere = next((source for source in sources if not journal.on_one_disk(source, output)), None)
    if elsewhere is not None:
        raise SdlabError(
            f"is on another disk than {output}, where a hard link cannot reach",
            where=elsewhere,
            next_step="Use --mode copy, or give an --output-dir on the same disk",
        )


def _act(report: Report, settings: Mapping[str, Any], stop: Stop, seal: Seal) -> Report:
    assert report.job.acts_in is not None
    if stop():
        return replace(report, stopped=True)
    operations = report.plan.operations
    if not operations:
        return report
    num = len(report.places) or report.plan.num_captions
    with bar(num, "writing:") as advance:
        acted = journal.act(
            report.job.acts_in,
            operations,
            settings=settings,
            seal=seal,
            advance=lambda done: advance(num * done / len(operations)),
            stop=stop,
        )
    return replace(report, acted=acted, stopped=acted.stopped)
