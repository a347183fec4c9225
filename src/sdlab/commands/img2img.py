"""`sdlab img2img`: new pictures out of a picture, or out of each picture of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import show
from sdlab.commands import generate
from sdlab.errors import SdlabError
from sdlab.inference.config import Img2ImgConfig

if TYPE_CHECKING:
    from sdlab.inference.jobs.editing import Subject
    from sdlab.inference.prompts.lines import Line
    from sdlab.inference.record.schema import Recipe


def img2img(config: Img2ImgConfig) -> None:
    """Change a picture, or every picture in a folder, by a prompt.

    FLUX.2 looks at the picture (and at those of --ref) and makes a new one; with --strength, and always with Stable
    Diffusion, the picture itself is noised and made anew; with --mask only the white parts of the mask.

    A folder is mirrored into --output: the same subfolders and names, as --format. A result that is there already is
    left as it is, so the same command goes on where it was stopped. A picture keeps its own size, cut to a
    multiple of 8 (FLUX.2: 16), or is scaled to the model's area where it is far smaller or larger, undistorted.
    Pictures that cannot be read are reported, the others are made, and the exit code is 3.
    """
    if config.from_picture is not None:
        generate.remake(config, config.from_picture)
        return
    from sdlab.inference.jobs import session as sessions
    from sdlab.inference.prompts import lines

    sessions.check(config)
    source = _source(config)
    typed = lines.gather(config.prompt, config.prompt_file, config_type=type(config))
    if config.explain:
        generate.explain(config, typed)
        return
    from sdlab.inference.jobs import drawing, editing, output, plan
    from sdlab.inference.jobs.report import Report

    editing.check_strength(config.strength, config.steps)
    count = plan.num_of(config, typed)
    failed: list[str] = []
    alone = None  # the one picture, opened; those of a folder are opened when their turn comes
    if source.is_dir():
        subjects, failed, num_pictures = editing.below(config, source, count)
    else:
        subjects, num_pictures = [editing.Subject(0, source, config.mask)], 1
        alone = editing.opened(subjects[0], config)
    num = len(subjects) * count
    plan.check_seeds(config, num_pictures * count)
    output.make_folder(config.output)
    report = Report()
    for why in failed:
        report.fail("", why)
    there = editing.existing(subjects, count)
    if there:
        _tell_existing(config, subjects, there, typed, num)
    if len(there) == num:
        report.close()
        return
    session = sessions.open_session(config, tuned=generate.TUNED, hasher=generate.hasher())
    editing.check_strength(editing.strength_of(session, config), config.steps or session.advice.steps)
    begun = drawing.begin(session, num, config.output, pictures=alone.inits if alone else ())
    spec_for = editing.specs(session, subjects[0], alone) if alone else None
    asked = plan.planned(session, typed, seed=begun.seed, spec_for=spec_for, times=num_pictures)
    asked = editing.only(asked, subjects, there, count)
    _tell(session.advice.steps, editing.strength_of(session, config), config, begun.seed)
    names = drawing.numbered(begun.stamp, sessions.format_of(config).suffix)
    report.already.update(there)
    edits = editing.Edits(session, config, subjects, count, names, report)
    drawing.draw(session, asked, begun, report, edits.batches, by_name=alone is None)
    drawing.finish(session, begun, report, config.output, by_name=alone is None)


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


def _tell(steps: int, strength: float | None, config: Img2ImgConfig, seed: int) -> None:
    how = "looking at the picture" if strength is None else f"strength {strength:g}"
    show.note(f"seed {seed}, {config.steps or steps} steps, {how}")


def _tell_existing(
    config: Img2ImgConfig,
    subjects: Sequence[Subject],
    there: Mapping[int, Path],
    typed: Sequence[Line],
    num: int,
) -> None:
    """Say how many results are there already, and warn of those that were made of something else or otherwise."""
    from sdlab.inference.record import metadata

    show.note(f"{len(there)} of {num} results are there already and are left as they are")
    names = {result: subject.path.name for subject in subjects for result in subject.results}
    templates = {line.prompt for line in typed}
    is_alike = not any(line.settings for line in typed)  # else each line has settings of its own
    others = []
    for index, result in there.items():
        recipe = metadata.peek(result)
        made = recipe is not None and _is_of(recipe, names[result], templates)
        if recipe is None or not made or (is_alike and not _is_made_so(recipe, index, config)):
            others.append(result)
    if others:
        show.warn(
            f"{len(others)} of them are not of this prompt, picture and settings, as {others[0]}; "
            "give another --output to make them anew"
        )


def _is_of(recipe: Recipe, name: str, templates: set[str]) -> bool:
    """Whether the recipe names this picture and one of the prompts."""
    subject = recipe["init"] or next(iter(recipe["references"]), None)
    is_drawn = bool({recipe["prompt"], recipe["template"]} & templates)
    return is_drawn and subject is not None and bool(subject["name"] == name)


def _is_made_so(recipe: Recipe, index: int, config: Img2ImgConfig) -> bool:
    """Whether nothing that was asked for with an option is otherwise in the recipe."""
    from sdlab.inference.engines.schedulers import canonical

    asked = {
        "seed": None if config.seed is None else config.seed + index,
        "steps": config.steps,
        "guidance": config.guidance,
        "strength": config.strength,
        "clip_skip": config.clip_skip,
        "emphasis": config.emphasis,
    }
    scheduler, own = recipe["scheduler"]["name"], [one for one in recipe["loras"] if not one["tag"]]
    same = all(value is None or recipe[name] == value for name, value in asked.items())
    return (
        same
        and (not config.scheduler or canonical(config.scheduler) == scheduler)
        and (recipe["mask"] is None) == (config.mask is None)
        and len(own) == len(config.lora)
        and ("{" in config.negative or recipe["negative"] == config.negative)
        and recipe["model"]["name"] in (config.load_model or recipe["model"]["name"])
    )
