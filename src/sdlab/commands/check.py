"""`sdlab check`: what a dataset holds and what is wrong with it, before any costly second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.options import opt

if TYPE_CHECKING:
    from sdlab.dataset.inspect import Report
    from sdlab.models.resolve import Model

MAX_UNASKED = 20_000  # pictures whose headers are read without --sizes: some seconds


class Start(NamedTuple):
    """What training starts from where no model is named, told without loading torch."""

    family: str
    references: bool  # whether they are used
    mini: str  # the model where there is no CUDA card
    image_size: int  # of the model where there is one
    grid: int
    room: int  # tokens of a prompt that surely fit


PICTURES = Start("sd", False, "mini-sd", 512, 8, 75)
EDITS = Start("flux2", True, "mini-flux2", 1024, 16, 32)  # for a dataset that is mostly edits


@dataclass(frozen=True)
class CheckConfig:
    """Options of `sdlab check`; those that training has too mean the same there."""

    images: Annotated[Path, opt("Folder of pictures; the folders' names are the prompts.", argument=True)] = (
        Path("images")
    )
    prompt_prefix: Annotated[str, opt("Text before every prompt.", group="Data")] = ""
    txt: Annotated[bool, opt("Also read captions from .txt files.", group="Data")] = True
    image_size: Annotated[
        int | None,
        opt(
            "Side of the square the buckets are made for (default: the model's).",
            min=16,
            max=4096,
            group="Data",
        ),
    ] = None
    background: Annotated[str, opt("Colour behind transparent pictures, on the sheet.", group="Data")] = (
        "white"
    )
    max_pixels: Annotated[int, opt("Refuse larger pictures unread.", min=1, group="Data")] = 64_000_000
    load_model: Annotated[
        str, opt("Model whose text encoder and size count (default: as in training).", group="Data")
    ] = ""
    vae: Annotated[str, opt("VAE for a model without one: a single file or a folder.", group="Data")] = ""
    deep: Annotated[bool | None, opt("Decode every picture, to find damaged ones.", flag="--deep")] = None
    sizes: Annotated[
        bool | None, opt(f"Read the sizes of more than {MAX_UNASKED:,} pictures too.", flag="--sizes")
    ] = None
    json: Annotated[bool | None, opt("The report as one JSON document on stdout.", flag="--json")] = None
    sheet: Annotated[Path | None, opt("Write a contact sheet: pictures with their prompts (.png).")] = None
    num_workers: Annotated[int, opt("Threads that read pictures.", min=0, max=64, group="Machine")] = 2


def check(config: CheckConfig) -> None:
    """Report what a dataset holds: prompts, sizes, captions, and every file that is refused, with the reason.

    Nothing is changed. Ends with 2 only where nothing is usable.
    """
    from sdlab.dataset import inspect, report, sheet, tree
    from sdlab.dataset.colour import colour_of

    background = colour_of(config.background)
    found = tree.scan(config.images, prompt_prefix=config.prompt_prefix, use_txt=config.txt)
    if config.sheet:
        sheet.check_target(config.sheet, found.root)
    num_references = sum(len(sample.references) for sample in found.samples)
    model = _model(config)
    num_edits = sum(bool(sample.references) for sample in found.samples)
    start = _start(model, mostly_edits=2 * num_edits >= max(1, len(found.samples)))
    image_size, grid = _size_and_grid(config, model, start)
    looked = inspect.inspect(
        found,
        headers=bool(config.sizes) or len(found.samples) + num_references <= MAX_UNASKED,
        deep=bool(config.deep),
        image_size=image_size,
        grid=grid,
        max_pixels=config.max_pixels,
        num_workers=config.num_workers,
        references=start.references,
        track=lambda what, done: _with_bar(what, done, len(found.samples)),
    )
    if config.sheet and looked.used:
        drawn = sheet.write_sheet(
            looked.used,
            config.sheet,
            background=background,
            max_pixels=config.max_pixels,
            num_workers=config.num_workers,
        )
        show.note(f"{config.sheet}: {drawn.num_pictures} of {len(looked.used)} pictures with their prompts")
        if drawn.missing:
            show.warn(f"no font here can draw {drawn.missing[:20]}: boxes stand for them on the sheet")
        looked = looked.without(drawn.refused)
    looked = _with_long_prompts(looked, model, start)
    show.report(looked, as_json=report.as_json, as_lines=report.as_lines, in_json=bool(config.json))
    if not looked.used:
        raise report.nothing_usable(looked)


def _with_bar(what: str, done: Iterator[tuple[str, str]], total: int) -> Iterator[tuple[str, str]]:
    """The same, with a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(done, what, total, console=console, transient=True, disable=not console.is_terminal))


def _model(config: CheckConfig) -> Model | None:
    from sdlab.models.resolve import resolve

    return resolve(config.load_model, training=True) if config.load_model else None


def _start(model: Model | None, *, mostly_edits: bool) -> Start:
    """What is known of the training: that of the model's kind, or the kind that suits the dataset."""
    if model:
        return next(start for start in (PICTURES, EDITS) if start.family == model.family)
    return EDITS if mostly_edits else PICTURES


def _size_and_grid(config: CheckConfig, model: Model | None, start: Start) -> tuple[int, int]:
    from sdlab.models.opening import open_family, recommended
    from sdlab.models.resolve import resolve

    if model:
        return config.image_size or recommended(model).image_size, open_family(model, vae=config.vae).grid
    if config.image_size:
        return config.image_size, start.grid
    if _has_cuda_driver():
        return start.image_size, start.grid
    try:
        return recommended(resolve(start.mini, training=True)).image_size, start.grid
    except SdlabError as reason:
        show.warn(f"buckets are those of {start.image_size} pixels, as no model was found: {reason}")
        return start.image_size, start.grid


def _with_long_prompts(looked: Report, model: Model | None, start: Start) -> Report:
    """Tokens counted with the model's own tokenizer where a prompt is long enough to matter."""
    from sdlab.dataset.inspect import may_be_too_long, too_long

    doubtful = [prompt for prompt in sorted(looked.prompts) if may_be_too_long(prompt, start.room)]
    if not doubtful:
        return replace(looked, too_long=())
    from sdlab.models.opening import prompt_window
    from sdlab.models.resolve import resolve

    try:
        name = "" if _has_cuda_driver() else start.mini
        window = prompt_window(model or resolve(name, training=True, family=start.family))
    except SdlabError as reason:
        if model:
            raise
        show.warn(f"{len(doubtful)} prompts may be too long for the text encoder, not counted: {reason}")
        return looked
    room = window.window - window.lost("")[0]
    return replace(looked, too_long=too_long([p for p in doubtful if may_be_too_long(p, room)], window))


def _has_cuda_driver() -> bool:
    import ctypes

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
