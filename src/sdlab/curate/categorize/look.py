"""Looking at pictures: what each says, what can be known of it, and which cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from sdlab import progress
from sdlab.curate.categorize import captionfiles, captioning
from sdlab.curate.categorize.job import Job
from sdlab.curate.categorize.plan import Source, Told
from sdlab.curate.categorize.units import Unit, path_of, units, without_faults
from sdlab.curate.keywords.tagger import Tagger
from sdlab.dataset.cache import content_hashes
from sdlab.dataset.walk import Refused, sort_key
from sdlab.models.captioner import Caption

Stop = Callable[[], bool]
COMPARED_AT_ONCE = 4096  # files between two looks at whether to stop


@dataclass(frozen=True)
class Looked:
    """The pictures as they were found and what is known of them."""

    source: Source
    told: tuple[Told, ...]  # all good units, those placed earlier among them
    refused: tuple[Refused, ...]
    num_asked: int  # pictures that the model looked at


def look(job: Job, tagger: Future[Tagger] | None, stop: Stop) -> Looked:
    """Compare the files, caption what has no caption that counts, decode what the model does not look at.

    Raises what `tagger` raised before the model is asked. Where it was stopped, less is known.
    """
    config, found, whole = job.config, job.found, units(job.found)
    hashes, faults = _compared(job, whole, stop)
    source = Source(found, hashes, os.path.realpath(found.root))
    if stop():
        return Looked(source, (), found.refused, 0)
    if tagger is not None:
        tagger.result()  # that there is no pipeline is said before the costly part
    by_model = [s.path for unit in whole for s in unit.samples if _is_for_model(unit, config.captions)]
    with bar(len(by_model), "looking:") as advance:
        made = captioning.caption_pictures(
            by_model,
            captioner=job.captioner,
            folder=job.cache,
            batch=config.batch,
            num_workers=config.num_workers,
            device=config.device,
            dtype=None if config.dtype == "auto" else config.dtype,
            background=job.look.background,
            max_pixels=config.max_pixels,
            advance=advance,
            stop=stop,
        )
    everything = {path for unit in whole for s in unit.samples for path in (s.path, *s.references)}
    others = everything - set(by_model)
    with bar(len(others), "opening the others:") as advance:
        unusable = captioning.faults_of(
            sorted(others),
            hashes=hashes,
            folder=job.cache,
            num_workers=config.num_workers,
            max_pixels=config.max_pixels,
            advance=advance,
            stop=stop,
        )
    faults |= made.faults | unusable
    told, refused = [], list(found.refused)
    for unit in whole:
        good, bad = without_faults(unit, faults, found)
        refused += bad
        if good is not None:
            told.append(_told(good, made.captions.get(good.samples[0].path), job))
    refused.sort(key=lambda one: sort_key(one.id))
    return Looked(source, tuple(told), tuple(refused), made.num_asked)


def _compared(job: Job, whole: Sequence[Unit], stop: Stop) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of all files of the units by path, and why some cannot be read; fewer where it was stopped."""
    paths = sorted({path_of(job.found, id) for unit in whole for id in unit.files})
    hashes: dict[str, str] = {}
    faults: dict[str, str] = {}
    num = len(job.found.samples)
    with bar(num, "comparing files:") as advance:
        for start in range(0, 0 if stop() else len(paths), COMPARED_AT_ONCE):
            behind = partial(_behind, advance, start, num / len(paths))
            some = paths[start : start + COMPARED_AT_ONCE]
            good, bad = content_hashes(job.cache, some, job.config.num_workers, behind)
            hashes |= good
            faults |= bad
            if stop():
                break
    return hashes, faults


def _behind(advance: progress.Advance, start: int, scale: float, what: str, done: int, total: int) -> None:
    advance((start + done) * scale)


@contextmanager
def bar(num: int, doing: str) -> Iterator[progress.Advance]:
    """A progress bar over so many pictures; none where there are none."""
    if not num:
        yield lambda done: None
        return
    with progress.pictures(num, doing=doing) as advance:
        yield advance


def _is_for_model(unit: Unit, how: captionfiles.How) -> bool:
    return how != "keep" or not unit.own


def _told(unit: Unit, caption: Caption | None, job: Job) -> Told:
    made = captionfiles.speak(caption.text) if caption else ""
    return Told(
        unit,
        unit.own,
        made,
        captionfiles.told(unit.own, made, job.config.captions),
        caption.confidence if caption else None,
        caption is not None and (not made or caption.confidence < job.review_below),
    )


def with_keywords(looked: Looked, tagger: Tagger) -> Looked:
    """The same, with the keywords of each caption."""
    words = tagger.keywords([one.text for one in looked.told])
    told = tuple(replace(one, keywords=found) for one, found in zip(looked.told, words, strict=True))
    return replace(looked, told=told)
