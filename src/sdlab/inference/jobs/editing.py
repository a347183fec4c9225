"""Jobs that start from pictures: one picture, or a folder that is mirrored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.inference import edit
from sdlab.inference.batch import Batch
from sdlab.inference.config import GenerateConfig, Img2ImgConfig
from sdlab.inference.jobs import output
from sdlab.inference.jobs.batches import grouped
from sdlab.inference.jobs.plan import Item, Plan, alike, batch_of, looked_at, num_together
from sdlab.inference.jobs.session import Session, format_of, spec_of
from sdlab.inference.spec import Mask, Reference, Shot

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.jobs.report import Report
    from sdlab.inference.spec import Init, Spec

MASK_STRENGTH = 0.8  # where none is given, of a model that otherwise looks at the picture


@dataclass(frozen=True)
class Subject:
    """A picture to change."""

    place: int  # in the whole folder, from 0
    path: Path
    mask: Path | None = None
    results: tuple[Path, ...] = ()  # one for each shot; none where they take the next free numbers


def specs(session: Session, subject: Subject, there: Opened) -> Callable[[GenerateConfig], Spec]:
    """What says how this one picture is changed."""

    def spec(config: GenerateConfig) -> Spec:
        return spec_for(session, _edit(config), there.picture, subject.path)

    return spec


def below(config: Img2ImgConfig, folder: Path, count: int) -> tuple[list[Subject], list[str], int]:
    """The pictures from --start to --limit, what could not be listed, and the number of pictures in all.

    Names of results, `count` for each, are planned for the whole folder, so that neither those two nor what is
    there changes them.
    """
    edit.refuse_overlap(folder, config.output)
    pictures, failed = edit.pictures_below(folder)
    if config.start >= max(1, len(pictures)):
        raise SdlabError(
            f"there are {len(pictures)} pictures, counted from 0", where=f"--start {config.start}"
        )
    end = len(pictures) if config.limit is None else config.start + config.limit
    inside = [path.relative_to(folder) for path in pictures]
    names = output.planned(inside, count, suffix=format_of(config).suffix)
    subjects = [
        Subject(
            place,
            pictures[place],
            _mask_of(config, inside[place]),
            tuple(config.output / name for name in names[place]),
        )
        for place in range(config.start, min(end, len(pictures)))
    ]
    return subjects, failed, len(pictures)


def _mask_of(config: Img2ImgConfig, inside: Path) -> Path | None:
    """The mask of a picture: the one that serves all, or that of the same name in the folder of masks."""
    if config.mask is None or not config.mask.is_dir():
        return config.mask
    same = config.mask / inside
    return same if same.exists() else same.with_suffix(".png")


def existing(subjects: Sequence[Subject], count: int) -> dict[int, Path]:
    """The results that are there already, by the index of their shot."""
    return {
        subject.place * count + place: result
        for subject in subjects
        for place, result in enumerate(subject.results)
        if output.is_there(result)
    }


def check_strength(strength: float | None, steps: int | None) -> None:
    """Raises SdlabError for a strength that changes nothing or leaves no step to do."""
    if strength is None:
        return
    if not strength > 0:
        raise SdlabError(f"{strength:g} would change nothing", where="--strength", next_step="Give 0.1 to 1")
    if steps is not None and int(steps * strength) < 1:
        least = next(n for n in itertools.count(math.floor(1 / strength)) if int(n * strength) >= 1)
        raise SdlabError(
            f"{steps} steps at strength {strength:g} leave no step to do",
            where="--strength",
            next_step=f"Give --steps {least} or more, or a higher --strength",
        )


@dataclass(frozen=True)
class Opened:
    """A picture to change and its mask, in their own sizes."""

    init: Init
    picture: Image.Image
    mask: Mask | None = None
    mask_picture: Image.Image | None = None

    @property
    def inits(self) -> tuple[Init, ...]:
        """The files."""
        return (self.init, self.mask.source) if self.mask else (self.init,)


def opened(subject: Subject, config: Img2ImgConfig) -> Opened:
    """Raises SdlabError for a picture that cannot be used, or a mask of another shape."""
    init, picture = edit.pictured(subject.path, background=config.background, max_pixels=config.max_pixels)
    if subject.mask is None:
        return Opened(init, picture)
    try:
        source, mask = edit.mask_for(picture, subject.mask, max_pixels=config.max_pixels)
    except SdlabError as reason:
        why = str(reason) if "--mask" in reason.where else f"--mask {reason}"
        raise SdlabError(why, where=str(subject.path)) from reason
    return Opened(init, picture, Mask(source, config.mask_blur), mask)


def strength_of(session: Session, config: Img2ImgConfig) -> float | None:
    """How much of a picture changes; None where the model looks at it instead."""
    if config.strength is not None:
        return config.strength
    advised = session.opened.engine.edit_strength
    return MASK_STRENGTH if advised is None and config.mask is not None else advised


def spec_for(session: Session, config: Img2ImgConfig, picture: Image.Image, path: Path) -> Spec:
    """How the picture is changed. Raises SdlabError, naming it, for one of a size that cannot be made."""
    wanted = edit.Wanted(config.width, config.height, config.image_size)
    strength = strength_of(session, config)
    check_strength(strength, config.steps or session.advice.steps)
    try:
        size = edit.size_for(*picture.size, wanted, model_size=session.advice.image_size, grid=session.grid)
        if strength is None:
            edit.lookable(*size)
        guidance = session.opened.engine.edit_guidance
        return spec_of(session, config, size=size, strength=strength, guidance=guidance)
    except SdlabError as reason:
        raise SdlabError(reason.what, where=str(path), next_step=reason.next_step) from reason


def only(plan: Plan, subjects: Sequence[Subject], there: Mapping[int, Path], count: int) -> Plan:
    """The part of the plan that is of these pictures, without faults of results that are there."""
    places = {subject.place for subject in subjects}
    return replace(
        plan,
        items=tuple(item for item in plan.items if item.shot.index // count in places),
        faults=tuple(
            fault for fault in plan.faults if fault.index // count in places and fault.index not in there
        ),
    )


@dataclass(frozen=True)
class Edits:
    """The batches of a job that starts from pictures; each is opened when its turn comes."""

    session: Session
    config: Img2ImgConfig
    subjects: Sequence[Subject]
    count: int  # shots of each picture
    names: Callable[[Shot], Iterator[str]]  # where a picture has no results of its own
    report: Report

    def batches(self, plan: Plan) -> Iterator[Batch]:
        """Those that have a shot to make, each whole, so that who shares it is as in a single run."""
        items = {item.shot.index: item for item in plan.items}
        for subject in self.subjects:
            first = subject.place * self.count
            mine = [items[index] for index in range(first, first + self.count) if index in items]
            if any(item.shot.index not in self.report.already for item in mine):
                try:
                    yield from self._of_one(subject, mine)
                except SdlabError as reason:
                    if not subject.results:
                        raise
                    self.report.fail("", str(reason), index=first)

    def _of_one(self, subject: Subject, items: Sequence[Item]) -> Iterator[Batch]:
        there = opened(subject, self.config)
        folder, names = self.config.output, self.names
        if subject.results:
            folder = subject.results[0].parent
            output.make_folder(folder)
            first = subject.place * self.count
            names = lambda shot: iter([subject.results[shot.index - first].name])  # noqa: E731
        for group in grouped(self._sized(subject, items, there), num_together(self.config), key=alike):
            already = self.report.already
            keep = frozenset(i for i, item in enumerate(group) if item.shot.index not in already)
            if keep and group[0].spec is not None:
                seen = self._pictures(there, group[0].spec)
                yield batch_of(group, folder, names, keep=keep, format=format_of(self.config), **seen)

    def _sized(self, subject: Subject, items: Sequence[Item], there: Opened) -> list[Item]:
        """The items with their spec; those that cannot be made of this picture are reported."""
        sized = []
        for item in items:
            shot = item.shot
            try:
                spec = spec_for(self.session, _edit(item.config), there.picture, subject.path)
                sized.append(replace(item, spec=spec))
            except SdlabError as reason:
                why, prompt = str(reason), shot.template or shot.typed
                self.report.fail(item.where, why, index=shot.index, prompt=prompt, seed=shot.seed)
        return sized

    def _pictures(self, there: Opened, spec: Spec) -> dict[str, Any]:
        """What the engine sees, in the sizes in which it sees it."""
        size = {"width": spec.width, "height": spec.height, "grid": self.session.grid}
        fitting = edit.prepared(there.picture, **size)
        seen = list(self.session.seen)
        given: dict[str, Any] = {"init": there.init, "picture": fitting}
        if spec.strength is None:
            given, seen = {}, [(Reference(there.init, spec.width, spec.height), fitting), *seen]
        if there.mask_picture is not None:
            given |= {"mask": there.mask, "mask_picture": edit.prepared(there.mask_picture, **size)}
        return {**given, **looked_at(seen)}


def _edit(config: GenerateConfig) -> Img2ImgConfig:
    assert isinstance(config, Img2ImgConfig)
    return config
