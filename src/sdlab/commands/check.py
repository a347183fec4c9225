"""`sdlab check`: what a dataset holds and what is wrong with it, before any costly second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.options import opt

if TYPE_CHECKING:
    from sdlab.dataset.inspect import Report

SD15_SIZE, GRID = 512, 8  # of Stable Diffusion 1.5
MAX_UNASKED = 20_000  # pictures whose headers are read without --sizes: some seconds


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
    image_size, grid = _size_and_grid(config)
    looked = inspect.inspect(
        found,
        headers=bool(config.sizes) or len(found.samples) <= MAX_UNASKED,
        deep=bool(config.deep),
        image_size=image_size,
        grid=grid,
        max_pixels=config.max_pixels,
        num_workers=config.num_workers,
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
    looked = _with_long_prompts(looked, config)
    if config.json:
        show.out_json(report.as_json(looked))
    else:
        for line in report.as_lines(looked):
            show.out(line)
    if not looked.used:
        raise report.nothing_usable(looked)


def _with_bar(what: str, done: Iterator[tuple[str, str]], total: int) -> Iterator[tuple[str, str]]:
    """The same, with a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(done, what, total, console=console, transient=True, disable=not console.is_terminal))


def _model_name(config: CheckConfig) -> str:
    """The model that training would start from, as far as can be told without loading torch; else empty."""
    return config.load_model or ("" if _has_cuda_driver() else "mini-sd")


def _size_and_grid(config: CheckConfig) -> tuple[int, int]:
    from sdlab.models.resolve import recommended, resolve

    if config.image_size:
        return config.image_size, GRID
    if not (name := _model_name(config)):
        return SD15_SIZE, GRID
    try:
        return recommended(resolve(name, training=True)).image_size, GRID
    except SdlabError as reason:
        if config.load_model:
            raise
        show.warn(f"buckets are those of {SD15_SIZE} pixels, as no model was found: {reason}")
        return SD15_SIZE, GRID


def _with_long_prompts(looked: Report, config: CheckConfig) -> Report:
    """Tokens counted with the model's own tokenizer where a prompt is long enough to matter."""
    from sdlab.dataset.inspect import may_be_too_long, too_long

    doubtful = [prompt for prompt in sorted(looked.prompts) if may_be_too_long(prompt)]
    if not doubtful:
        return replace(looked, too_long=())
    try:
        tokenizer = _tokenizer(_model_name(config))
    except SdlabError as reason:
        if config.load_model:
            raise
        show.warn(f"{len(doubtful)} prompts may be too long for the text encoder, not counted: {reason}")
        return looked
    return replace(looked, too_long=too_long(doubtful, tokenizer))


def _tokenizer(name: str) -> Any:
    from sdlab.models.resolve import open_family, resolve
    from sdlab.models.sd import StableDiffusion, load_tokenizer

    family = open_family(resolve(name, training=True))
    assert isinstance(family, StableDiffusion)
    return load_tokenizer(family.parts)


def _has_cuda_driver() -> bool:
    import ctypes

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
