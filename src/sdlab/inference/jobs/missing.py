"""What of a job is not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sdlab.inference.batch import Batch
from sdlab.inference.jobs import output
from sdlab.inference.jobs.journal import Journal, key_of
from sdlab.inference.jobs.report import Report
from sdlab.inference.record import metadata
from sdlab.inference.record.recipe import spec_of
from sdlab.inference.spec import Shot


def kept(batch: Batch) -> list[int]:
    """Places of the pictures that are to be written."""
    return [i for i in range(len(batch.shots)) if batch.keep is None or i in batch.keep]


def missing(batches: Iterable[Batch], report: Report, journal: Journal | None) -> Iterator[Batch]:
    """The batches that have a picture to make, to keep only that; what is there already goes to the report."""
    if journal is None:
        yield from batches
        return
    for batch in batches:
        found = {i: path for i in kept(batch) if (path := _made_before(batch, i, journal)) is not None}
        report.already.update({batch.shots[i].index: path for i, path in found.items()})
        if len(found) < len(kept(batch)):
            yield replace(batch, keep=frozenset(kept(batch)) - found.keys()) if found else batch


def _made_before(batch: Batch, position: int, journal: Journal) -> Path | None:
    shot = batch.shots[position]
    own = key(batch, shot)
    path = journal.made(shot.index, own)
    if path is not None or not journal.resumed or journal.is_noted(shot.index):
        return path
    path = batch.folder / next(batch.names(shot))  # written, and then the power went before it was noted
    if not _is_of(path, batch, shot):
        return None
    journal.note_made(shot.index, own, path)
    return path


def _is_of(path: Path, batch: Batch, shot: Shot) -> bool:
    """Whether the file is this very picture; that it is of this job, its name says."""
    if not output.is_there(path) or (recipe := metadata.peek(path)) is None:
        return False
    wanted = {
        "index": shot.index,
        "seed": shot.seed,
        "prompt": shot.typed,
        "prefix": shot.prefix,
        "negative": shot.negative,
    }
    loras = sorted(source.name for source, _ in batch.loras)
    same = all(recipe[name] == value for name, value in wanted.items()) and spec_of(recipe) == batch.spec
    return same and sorted(one["name"] for one in recipe["loras"] if one["tag"]) == loras


def key(batch: Batch, shot: Shot) -> str:
    named = batch.embeddings
    if named:
        from sdlab.inference.prompts.embeddings import named_in

        own = named_in((shot.prompt, shot.negative), [source.name for source in named])
        named = tuple(source for source in named if source.name in own)  # not those of who shares the batch
    return key_of(shot, batch.spec, batch.loras, named, batch.format)
