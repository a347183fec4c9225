"""`sdlab img2img`: new pictures out of a picture, or out of each picture of a folder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.commands import generate
from sdlab.commands.generate import FILES, HOW, WHAT, GenerateConfig
from sdlab.errors import SdlabError
from sdlab.options import opt

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.jobs.job import Batch, Report
    from sdlab.inference.spec import Init, Reference, Shot, Spec


@dataclass(frozen=True)
class Img2ImgConfig(GenerateConfig):
    """Options of `sdlab img2img`: those of generate, and what to start from."""

    guidance: Annotated[
        float | None,
        opt(
            "How closely to follow the prompt. Default: what suits the model (5; FLUX.2 4).",
            min=0,
            max=100,
            group=HOW,
        ),
    ] = None
    width: Annotated[
        int | None,
        opt(
            "Pixels, a multiple of 8 (FLUX.2: 16). Default: the picture's, see below.",
            min=32,
            max=4096,
            group=HOW,
        ),
    ] = None
    image_size: Annotated[
        int | None,
        opt("Keep the picture's shape, with the area of a square of this side.", min=32, max=4096, group=HOW),
    ] = None
    init_image: Annotated[
        Path | None, opt("Picture to change, or a folder of them.", old=("--input",), group=WHAT)
    ] = None
    strength: Annotated[
        float | None,
        opt(
            "Start from the noised picture; near 0 little changes, at 1 everything. Default 0.8; "
            "FLUX.2 looks at the picture instead.",
            min=0,
            max=1,
            group=HOW,
        ),
    ] = None
    background: Annotated[str, opt("Colour put behind transparent pictures.", group=HOW)] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures.", min=1, group=HOW)] = 64_000_000
    start: Annotated[int, opt("Begin at this picture of the folder, from 0.", min=0, group=FILES)] = 0
    limit: Annotated[int | None, opt("Take this many pictures of the folder.", min=1, group=FILES)] = None


def img2img(config: Img2ImgConfig) -> None:
    """Change a picture, or every picture in a folder, by a prompt.

    FLUX.2 looks at the picture (and at those of --ref) and makes a new one; with --strength, and always with Stable
    Diffusion, the picture itself is noised and made anew.

    A folder is mirrored into --output: the same subfolders and names, as PNG. A result that is there already is
    left as it is, so the same command goes on where it was stopped. A picture keeps its own size, cut to a
    multiple of 8 (FLUX.2: 16), or is scaled to the model's area where it is far smaller or larger, undistorted.
    Pictures that cannot be read are reported, the others are made, and the exit code is 3.
    """
    if config.from_picture is not None:
        generate.remake(config, config.from_picture)
        return
    from sdlab.inference.jobs import output
    from sdlab.inference.prompts import lines

    generate.check(config)
    source = _source(config)
    _check_strength(config.strength, config.steps)
    typed = lines.gather(config.prompt, config.prompt_file)
    count = len(typed) * config.num
    failed: list[str] = []
    if source.is_dir():
        jobs, failed, num_pictures = _listed(source, config, count)
        _tell_existing(jobs, typed, config.num)
    else:
        _open(source, config)  # a bad single picture is refused before the model is loaded
        jobs, num_pictures = [_Job(0, source, (), frozenset(range(count)))], 1
    seed = generate.seed_for(config, num_pictures * count)
    output.make_folder(config.output)

    from sdlab.inference.jobs import job

    report = job.Report(failed=failed)
    todo = [one for one in jobs if one.missing]
    if todo:
        _make(config, typed, todo, seed, report)
    report.close()


@dataclass(frozen=True)
class _Job:
    """One picture to change."""

    place: int  # in the whole folder, from 0
    path: Path
    results: tuple[Path, ...]  # one for each shot; none where they take the next free numbers
    missing: frozenset[int]  # the shots to make


@dataclass(frozen=True)
class _Plan:
    """What is the same for every picture."""

    config: Img2ImgConfig
    typed: list[str]
    prefix: str
    seed: int
    steps: int
    guidance: float
    strength: float | None  # None: the picture is looked at
    model_size: int
    grid: int
    stamp: str
    references: list[tuple[Reference, Image.Image]]

    @property
    def count(self) -> int:
        """Shots of each picture."""
        return len(self.typed) * self.config.num

    def shots(self, job: _Job) -> list[Shot]:
        """All of the picture's shots; what exists already or cannot be read changes no index or seed."""
        from sdlab.inference.spec import shots

        return shots(
            self.typed,
            num=self.config.num,
            prefix=self.prefix,
            negative=self.config.negative,
            seed=self.seed,
            first=job.place * self.count,
        )


def _source(config: Img2ImgConfig) -> Path:
    if config.init_image is None:
        raise SdlabError("no picture to start from", next_step="Give --init-image picture.png, or a folder")
    if not config.init_image.exists():
        raise SdlabError("there is no such picture or folder", where=f"--init-image {config.init_image}")
    if not config.init_image.is_dir() and (config.start or config.limit is not None):
        raise SdlabError(
            "is one picture; --start and --limit take some of a folder", where=str(config.init_image)
        )
    return config.init_image


def _listed(source: Path, config: Img2ImgConfig, count: int) -> tuple[list[_Job], list[str], int]:
    """The pictures from --start to --limit, what could not be listed, and the number of pictures in all.

    Names of results are planned for the whole folder, so that neither those two nor what is there changes them.
    """
    from sdlab.inference import edit
    from sdlab.inference.jobs import output

    edit.refuse_overlap(source, config.output)
    pictures, failed = edit.pictures_below(source)
    if config.start >= max(1, len(pictures)):
        raise SdlabError(
            f"there are {len(pictures)} pictures, counted from 0", where=f"--start {config.start}"
        )
    end = len(pictures) if config.limit is None else config.start + config.limit
    names = output.planned([path.relative_to(source) for path in pictures], count)
    jobs = []
    for place in range(config.start, min(end, len(pictures))):
        results = tuple(config.output / name for name in names[place])
        missing = frozenset(i for i, result in enumerate(results) if not output.is_there(result))
        jobs.append(_Job(place, pictures[place], results, missing))
    return jobs, failed, len(pictures)


def _tell_existing(jobs: list[_Job], typed: list[str], num: int) -> None:
    """Say how many results are there already, and warn of those that another prompt or picture made."""
    there = [(job, i) for job in jobs for i in range(len(job.results)) if i not in job.missing]
    if not there:
        return
    total = sum(len(job.results) for job in jobs)
    show.note(f"{len(there)} of {total} results are there already and are left as they are")
    others = [
        job.results[i] for job, i in there if not _is_of(job.results[i], job.path.name, typed[i // num])
    ]
    if others:
        show.warn(
            f"{len(others)} of them are not of this prompt and picture, as {others[0]}; "
            "give another --output to make them anew"
        )


def _is_of(result: Path, name: str, prompt: str) -> bool:
    """Whether the recipe in a result names this picture and prompt."""
    from sdlab.inference.record import metadata

    recipe = metadata.peek(result)
    if recipe is None or recipe["prompt"] != prompt:
        return False
    subject = recipe["init"] or next(iter(recipe["references"]), None)
    return subject is not None and bool(subject["name"] == name)


def _make(config: Img2ImgConfig, typed: list[str], todo: list[_Job], seed: int, report: Report) -> None:
    """Make what is missing."""
    from sdlab.inference.engines import kinds
    from sdlab.inference.jobs import job

    opened, advice = generate.open_model(config)
    engine, grid = opened.engine, opened.family.grid
    guidance = advice.guidance if engine.edit_guidance is None else engine.edit_guidance
    plan = _Plan(
        config=config,
        typed=typed,
        prefix=generate.prefix_for(config, advice.prefix),
        seed=seed,
        steps=config.steps or advice.steps,
        guidance=guidance if config.guidance is None else config.guidance,
        strength=engine.edit_strength if config.strength is None else config.strength,
        model_size=advice.image_size,
        grid=grid,
        stamp=generate.stamp_now(),
        references=generate.references(config, model_size=advice.image_size, grid=grid),
    )
    _check_strength(plan.strength, plan.steps)
    sent = kinds.texts(engine, plan.shots(todo[0]))
    job.warn_of_lost_words(opened.chosen.model, sent)
    loaded = generate.load(opened, config, prompts=sent)
    generate.rehearse(loaded, opened, generate.scheduler_for(config), plan.steps)
    how = "looking at the picture" if plan.strength is None else f"strength {plan.strength:g}"
    show.note(f"seed {seed}, {plan.steps} steps, {how}, guidance {plan.guidance:g}")
    total = sum(len(one.missing) for one in todo)
    job.make(loaded, _batches(todo, plan, report), total=total, exact=config.exact, report=report)
    if config.grid:
        job.write_grid(report, folder=config.output, stamp=plan.stamp)


def _check_strength(strength: float | None, steps: int | None) -> None:
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


def _open(path: Path, config: Img2ImgConfig) -> tuple[Init, Image.Image]:
    """The picture and what the recipe says of it. Raises SdlabError for a picture that cannot be used."""
    from sdlab.inference import edit

    return edit.pictured(path, background=config.background, max_pixels=config.max_pixels)


def _batches(todo: list[_Job], plan: _Plan, report: Report) -> Iterator[Batch]:
    """One picture after the other, opened when its turn comes."""
    for one in todo:
        try:
            yield from _of_one(one, plan)
        except SdlabError as reason:
            if not one.results:
                raise
            report.failed.append(str(reason))


def _of_one(one: _Job, plan: _Plan) -> Iterator[Batch]:
    """The batches that have a shot to make. Each is made whole, so that who shares it is as in a single run."""
    from sdlab.inference import edit
    from sdlab.inference.jobs import job, output
    from sdlab.inference.spec import Reference, in_batches

    config = plan.config
    init, picture = _open(one.path, config)
    spec = _spec(picture, one.path, plan)
    fitting = edit.prepared(picture, width=spec.width, height=spec.height, grid=plan.grid)
    given: dict[str, Any] = {"init": init, "picture": fitting}
    seen = plan.references
    if plan.strength is None:
        given, seen = {}, [(Reference(init, spec.width, spec.height), fitting), *seen]
    first = one.place * plan.count
    folder, names = config.output, _numbered(plan.stamp)
    if one.results:
        folder = one.results[0].parent
        output.make_folder(folder)
        names = lambda shot: iter([one.results[shot.index - first].name])  # noqa: E731
    for group in in_batches(plan.shots(one), 1 if config.exact else config.batch):
        keep = frozenset(i for i, shot in enumerate(group) if shot.index - first in one.missing)
        if keep:
            yield job.Batch(
                group,
                spec,
                folder,
                names,
                references=tuple(reference for reference, _ in seen),
                looked_at=tuple(picture for _, picture in seen),
                keep=keep,
                **given,
            )


def _numbered(stamp: str) -> Callable[[Shot], Iterator[str]]:
    from sdlab.inference.jobs import output

    return lambda shot: output.numbered(stamp, shot.index)


def _spec(picture: Image.Image, path: Path, plan: _Plan) -> Spec:
    from sdlab.inference import edit
    from sdlab.inference.spec import Spec

    config = plan.config
    wanted = edit.Wanted(config.width, config.height, config.image_size)
    try:
        width, height = edit.size_for(*picture.size, wanted, model_size=plan.model_size, grid=plan.grid)
        if plan.strength is None:
            edit.lookable(width, height)
    except SdlabError as reason:
        raise SdlabError(reason.what, where=str(path), next_step=reason.next_step) from reason
    return Spec(
        steps=plan.steps,
        guidance=plan.guidance,
        width=width,
        height=height,
        scheduler=generate.scheduler_for(config),
        strength=plan.strength,
    )
