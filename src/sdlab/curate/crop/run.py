"""A folder of pictures, cut to size into another folder; the first is only read, of the second nothing is lost.

    OUTPUT/girl/a.jpg, a.cap, a.ref.jpg     the results, under the names of IMAGES
    OUTPUT/.sdlab-crop.jsonl                what was made of what: a line for each picture, see results.py
    OUTPUT/.sdlab-crop.parts/               results while they are written; emptied by the next run

A result is written aside and gets its name when it is complete; the name is taken only if it is free or its file
is known to be ours and unchanged. A kill at any moment leaves complete results, and the same command goes on.
A power cut may empty a file that was just written: an empty file counts as none.
"""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from sdlab.curate.crop import focus
from sdlab.curate.crop.results import (
    OTHER_OUTPUT,
    Entry,
    Mark,
    Results,
    Taken,
    digest_of,
    mark_of,
    same_content,
)
from sdlab.curate.crop.sizes import Cut, Size, Wanted, plan
from sdlab.curate.names import Names
from sdlab.curate.places import unwritable
from sdlab.dataset.cache import ahead
from sdlab.dataset.files import open_regular, reason_of
from sdlab.dataset.picture import Unusable, cover, open_picture, read_size
from sdlab.dataset.tree import CAPTION_SUFFIXES, Sample, Scan, reference_of, refusal
from sdlab.progress import Advance

JPEG_MARGIN = 1.25  # JPEGs are decoded to at least this many times the result: benchmarks/crop.md
SAME_ASPECT = 0.01  # references whose shape differs less from their picture's are cut where it is
SUFFIX_OF = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
JPEG_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Settings:
    """Everything that the results depend on, besides the pictures."""

    wanted: Wanted
    focus: str = "saliency"  # saliency, face or center
    format: str = "auto"  # auto, jpeg, png or webp
    quality: int = 95
    background: tuple[int, int, int] = (255, 255, 255)

    def as_json(self) -> dict[str, object]:
        """As plain values, the same for equal settings."""
        wanted = self.wanted
        return {
            "side_px": wanted.side_px if wanted.max_side_px is None else None,
            "grid": wanted.grid,
            "aspect": None if wanted.aspect is None else str(wanted.aspect),
            "buckets": wanted.buckets,
            "max_side_px": wanted.max_side_px,
            "upscale": wanted.upscale,
            "focus": self.focus,
            "format": self.format,
            "quality": None if self.format == "png" else self.quality,
            "background": list(self.background),
        }

    @functools.cached_property
    def digest(self) -> str:
        """A short name for the settings."""
        return digest_of(self.as_json())


class Task(NamedTuple):
    """A picture, what goes along with it, and the name of the results."""

    sample: Sample
    captions: tuple[str, ...]  # ids below the images
    stem: str  # id of the results without suffixes

    def inputs(self, root: str) -> dict[str, str]:
        """The path of every file that is read, by its id."""
        folder = self.sample.id[: self.sample.id.rfind("/") + 1]
        references = {folder + os.path.basename(path): path for path in self.sample.references}
        captions = {id: os.path.join(root, *id.split("/")) for id in self.captions}
        return {self.sample.id: self.sample.path, **captions, **references}


class Outcome(NamedTuple):
    """What became of one picture."""

    task: Task
    cut: Cut | None = None  # None: refused
    reason: str = ""
    was_done: bool = False
    edited: tuple[str, ...] = ()  # ids of results that the user changed: left as they are
    result: str = ""  # id of the cut picture below the output


class _Made(NamedTuple):
    """Results that are not written yet."""

    entry: Entry
    contents: dict[str, bytes]


def tasks_of(found: Scan, stems: dict[str, str]) -> list[Task]:
    """A task for each picture of a scan. `stems` are those of earlier runs, by the pictures' ids: they stay.

    No two results share a stem, as a caption belongs to one: a.png beside a.jpg becomes a_2.
    """
    captions: dict[tuple[str, str], list[str]] = {}
    for id in found.companions:
        if id.lower().endswith(CAPTION_SUFFIXES):
            captions.setdefault(_stem_key(id), []).append(id)
    names = Names()
    for stem in stems.values():
        names.take(*_split(f"{stem}.x"))
    chosen = dict(stems)
    firsts = {_stem_key(sample.id): sample.id for sample in reversed(found.samples)}
    new = [sample.id for sample in found.samples if sample.id not in stems]
    for id in sorted(
        new, key=lambda id: firsts[_stem_key(id)] != id
    ):  # the first of a stem has the right to it
        folder, name = _split(id)
        chosen[id] = f"{folder}/{names.stem(folder, _stem(name))}".removeprefix("/")
    return [Task(one, tuple(captions.get(_stem_key(one.id), ())), chosen[one.id]) for one in found.samples]


def crop_pictures(
    found: Scan,
    results: Results,
    settings: Settings,
    *,
    max_pixels: int,
    num_workers: int,
    look: focus.Look | None = None,
    write: bool = True,
    advance: Advance = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Cut every picture of a scan that is not done already, and write the results; not with `write` False.

    `look` is that of the settings, where it was made before. What comes out is in the order of the scan; fewer
    than its pictures if `stop` said so. Raises SdlabError where nothing can be written any more.
    """
    stems = {id: entry.stem for id, entry in results.entries.items()}
    maker = _Maker(found.root, results, settings, max_pixels, look or focus.looker(settings.focus))
    outcomes = []
    tasks = tasks_of(found, stems)
    for task, made in ahead(maker.outcome, tasks, num_workers):
        outcomes.append(
            _written(task, made, results) if isinstance(made, _Made) and write else _told(task, made)
        )
        advance(len(outcomes))
        if stop():
            break
    return outcomes


def _told(task: Task, made: _Made | Outcome) -> Outcome:
    if isinstance(made, Outcome):
        return made
    return Outcome(task, made.entry.cut, result=next(iter(made.contents)))


def _written(task: Task, made: _Made, results: Results) -> Outcome:
    try:
        edited = results.put(made.entry, made.contents)
    except Taken as reason:
        return Outcome(task, reason=str(reason))
    except OSError as reason:
        if reason.errno in _GENERAL:
            raise unwritable(reason, results.folder, or_else=OTHER_OUTPUT) from reason
        return Outcome(task, reason=f"cannot be written ({reason_of(reason)})")
    return Outcome(task, made.entry.cut, edited=tuple(edited), result=next(iter(made.contents)))


_GENERAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT)  # they meet every picture


@dataclass(frozen=True)
class _Maker:
    """Makes the results of one picture, in any thread."""

    root: str
    results: Results
    settings: Settings
    max_pixels: int
    look: focus.Look

    def outcome(self, task: Task) -> _Made | Outcome:
        """The results as bytes, or why there are none to write."""
        before = self.results.entries.get(task.sample.id)
        paths = task.inputs(self.root)
        try:
            if not before:
                read_size(task.sample.path, max_pixels=self.max_pixels)  # before a film called .jpg is hashed
            inputs = {
                id: mark_of(path, before.inputs.get(id) if before else None) for id, path in paths.items()
            }
            if before and before.settings == self.settings.digest and same_content(before.inputs, inputs):
                states = {id: self.results.state(id) for id in before.outputs}
                if not {"absent", "stranger"} & set(states.values()):
                    edited = tuple(id for id, state in states.items() if state == "edited")
                    return Outcome(task, before.cut, was_done=True, edited=edited, result=next(iter(states)))
            return self._make(task, inputs, paths)
        except OSError as reason:
            return Outcome(task, reason=reason_of(reason))
        except Unusable as reason:
            return Outcome(task, reason=str(reason))

    def _make(self, task: Task, inputs: dict[str, Mark], paths: dict[str, str]) -> _Made:
        settings, sample = self.settings, task.sample
        image, cut = self._cut(sample.path)
        contents = {task.stem + _suffix(sample.id, settings.format): self._encoded(image, sample.id)}
        for id in task.captions:
            contents[task.stem + id[id.rindex(".") :]] = _read(paths[id])
        for number, path in zip(_numbers(sample), sample.references, strict=True):
            try:
                image, _ = self._cut(path, like=cut)
            except Unusable as reason:
                raise Unusable(refusal(sample, {path: str(reason)})) from reason
            name = os.path.basename(path)
            contents[f"{task.stem}.ref{number}{_suffix(name, settings.format)}"] = self._encoded(image, name)
        return _Made(Entry(sample.id, settings.digest, task.stem, inputs, {}, cut), contents)

    def _cut(self, path: str, *, like: Cut | None = None) -> tuple[Image.Image, Cut]:
        """The kept part of a picture, and what it is; of a reference with the shape of `like`, the same part."""
        settings = self.settings
        from_px = read_size(path, max_pixels=self.max_pixels)
        like = like if like and _same_shape(like.from_px, from_px) else None
        planned = plan(from_px, settings.wanted, shape_of=like.from_px if like else from_px)
        image = open_picture(
            path,
            background=settings.background,
            max_pixels=self.max_pixels,
            at_least_px=planned.size_px,
            margin=JPEG_MARGIN,
        )
        place, by = (like.place, like.by) if like else focus.place(image, from_px, planned.size_px, self.look)
        return cover(image, planned.size_px, place), Cut(from_px, planned, place, by)

    def _encoded(self, image: Image.Image, name: str) -> bytes:
        """The bytes of a file. Colours of a JPEG are kept in full size: the source's halved ones just were not."""
        file, suffix = io.BytesIO(), _suffix(name, self.settings.format)
        image.info.clear()  # PNG and WebP would be given the source's colour profile, which holds no more
        if suffix == ".png":
            image.save(file, "PNG")
        elif suffix == ".webp":
            image.save(file, "WEBP", quality=self.settings.quality)
        else:
            image.save(file, "JPEG", quality=self.settings.quality, subsampling=0)
        return file.getvalue()


def _same_shape(some: Size, other: Size) -> bool:
    return abs(math.log(some[1] / some[0] / (other[1] / other[0]))) < SAME_ASPECT


def _numbers(sample: Sample) -> list[str]:
    """What stands behind .ref in the results: as in the names of the references, counted anew if two are alike."""
    found = [reference_of(path[: path.rfind(".")]) for path in sample.references]
    texts = [of[1] if of else "" for of in found]
    alike = len({int(text or 1) for text in texts}) < len(texts)
    return [str(n) if n > 1 else "" for n in range(1, len(texts) + 1)] if alike else texts


def _suffix(name: str, format: str) -> str:
    if format != "auto":
        return SUFFIX_OF[format]
    own = name[name.rindex(".") :]
    return own if own.lower() in JPEG_SUFFIXES else ".png"


def _read(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _split(id: str) -> tuple[str, str]:
    folder, _, name = id.rpartition("/")
    return folder, name


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _stem_key(id: str) -> tuple[str, str]:
    """What a picture and its captions have in common."""
    folder, name = _split(id)
    return folder, unicodedata.normalize("NFC", _stem(name))
