"""`sdlab img2img`: new pictures that start from a picture, or from each picture of a folder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.commands import generate
from sdlab.commands.generate import HOW, WHAT, GenerateConfig
from sdlab.errors import SdlabError
from sdlab.options import opt

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.job import Batch, Report
    from sdlab.inference.spec import Init, Spec


@dataclass(frozen=True)
class Img2ImgConfig(GenerateConfig):
    """Options of `sdlab img2img`: those of generate, and what to start from."""

    guidance: Annotated[float | None, opt("How closely to follow the prompt.", min=0, max=100, group=HOW)] = (
        5.0
    )
    width: Annotated[
        int | None,
        opt("Pixels, a multiple of 8. Default: the picture's, see below.", min=32, max=4096, group=HOW),
    ] = None
    image_size: Annotated[
        int | None,
        opt("Keep the picture's shape, with the area of a square of this side.", min=32, max=4096, group=HOW),
    ] = None
    init_image: Annotated[Path | None, opt("Picture to start from, or a folder of them.", group=WHAT)] = None
    strength: Annotated[
        float, opt("How much to change: near 0 little, 1 everything.", min=0, max=1, group=HOW)
    ] = 0.8
    background: Annotated[str, opt("Colour put behind transparent pictures.", group=HOW)] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures.", min=1, group=HOW)] = 64_000_000


def img2img(config: Img2ImgConfig) -> None:
    """Change a picture, or every picture in a folder, by a prompt.

    A folder is mirrored into --output: the same subfolders and names, as PNG. A picture keeps its own size,
    cut to a multiple of 8, or is scaled to the model's area where it is far smaller or larger, undistorted.
    Pictures that cannot be read are reported, the others are made, and the exit code is 3.
    """
    if config.from_picture is not None:
        generate.remake(config, config.from_picture)
        return
    from sdlab.inference import edit, output, prompts

    generate.check(config)
    source = _source(config)
    _check_strength(config.strength, config.steps)
    typed = prompts.gather(config.prompt, config.prompt_file)
    pictures: list[Path] = [source]
    failed: list[str] = []
    if source.is_dir():
        edit.refuse_overlap(source, config.output)
        pictures, failed = edit.pictures_below(source)
    else:
        _open(source, config)  # a bad single picture is refused before the model is loaded
    total = len(pictures) * len(typed) * config.num
    seed = generate.seed_for(config, total)
    output.make_folder(config.output)

    from sdlab.inference import job

    loaded, advice = generate.load(config)
    plan = _Plan(
        config=config,
        typed=typed,
        prefix=generate.prefix_for(config, advice.prefix),
        seed=seed,
        steps=config.steps or advice.steps,
        guidance=advice.guidance if config.guidance is None else config.guidance,
        model_size=advice.image_size,
        grid=loaded.sampler.grid,
        stamp=generate.stamp_now(),
    )
    _check_strength(config.strength, plan.steps)
    generate.rehearse(loaded, generate.scheduler_for(config), plan.steps)
    job.warn_of_lost_words(loaded.sampler, [config.negative, *(plan.prefix + text for text in typed)])
    show.note(f"seed {seed}, {plan.steps} steps, strength {config.strength:g}, guidance {plan.guidance:g}")
    report = job.Report(failed=failed)
    job.make(loaded, _batches(pictures, plan, report), total=total, exact=config.exact, report=report)
    if config.grid:
        job.write_grid(report, folder=config.output, stamp=plan.stamp)
    report.close()


@dataclass(frozen=True)
class _Plan:
    """What is the same for every picture of the job."""

    config: Img2ImgConfig
    typed: list[str]
    prefix: str
    seed: int
    steps: int
    guidance: float
    model_size: int
    grid: int
    stamp: str


def _source(config: Img2ImgConfig) -> Path:
    if config.init_image is None:
        raise SdlabError("no picture to start from", next_step="Give --init-image picture.png, or a folder")
    if not config.init_image.exists():
        raise SdlabError("there is no such picture or folder", where=f"--init-image {config.init_image}")
    return config.init_image


def _check_strength(strength: float, steps: int | None) -> None:
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
    import hashlib

    from sdlab.inference import edit
    from sdlab.inference.spec import Init

    picture = edit.opened(path, background=config.background, max_pixels=config.max_pixels)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Init(path, digest, config.background, config.max_pixels), picture


def _batches(pictures: list[Path], plan: _Plan, report: Report) -> Iterator[Batch]:
    """One picture after the other, opened when its turn comes; which can be read changes no index or seed."""
    for place, path in enumerate(pictures):
        try:
            yield from _of_one(place, path, plan)
        except SdlabError as reason:
            if path == plan.config.init_image:
                raise
            report.failed.append(str(reason))


def _of_one(place: int, path: Path, plan: _Plan) -> Iterator[Batch]:
    from sdlab.inference import edit, job
    from sdlab.inference.spec import in_batches, shots

    config = plan.config
    init, picture = _open(path, config)
    spec = _spec(picture, path, plan)
    fitting = edit.prepared(picture, width=spec.width, height=spec.height, grid=plan.grid)
    wanted = shots(
        plan.typed,
        num=config.num,
        prefix=plan.prefix,
        negative=config.negative,
        seed=plan.seed,
        first=place * len(plan.typed) * config.num,
    )
    folder, names = _place(path, plan)
    for group in in_batches(wanted, 1 if config.exact else config.batch):
        yield job.Batch(group, spec, folder, names, init=init, picture=fitting)


def _spec(picture: Image.Image, path: Path, plan: _Plan) -> Spec:
    from sdlab.inference import edit
    from sdlab.inference.spec import Spec

    config = plan.config
    wanted = edit.Wanted(config.width, config.height, config.image_size)
    try:
        width, height = edit.size_for(*picture.size, wanted, model_size=plan.model_size, grid=plan.grid)
    except SdlabError as reason:
        raise SdlabError(reason.what, where=str(path), next_step=reason.next_step) from reason
    return Spec(
        steps=plan.steps,
        guidance=plan.guidance,
        width=width,
        height=height,
        scheduler=generate.scheduler_for(config),
        strength=config.strength,
    )


def _place(path: Path, plan: _Plan) -> tuple[Path, Any]:
    """The folder the results of a picture go to, and the names they may take there."""
    from sdlab.inference import output

    source = plan.config.init_image
    assert source is not None
    if not source.is_dir():
        return plan.config.output, lambda shot: output.numbered(plan.stamp, shot.index)
    folder = plan.config.output / path.parent.relative_to(source)
    output.make_folder(folder)
    return folder, lambda shot: output.mirrored(path.stem)
