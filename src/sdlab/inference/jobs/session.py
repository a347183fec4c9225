"""What a command works with: the model, its headers read, what was asked for and whether the model can do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import show
from sdlab.errors import SdlabError, gathered
from sdlab.inference.spec import Format, Hires, Spec
from sdlab.options import normalise

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.config import GenerateConfig
    from sdlab.inference.engines.kinds import Engine
    from sdlab.inference.identity import Hasher
    from sdlab.inference.load import Opened
    from sdlab.inference.prompts.dynamic import Wildcards
    from sdlab.inference.shelf import LoraShelf
    from sdlab.inference.spec import Reference
    from sdlab.models.bases import Recommended

GRID = 8  # no model takes sides that are not a multiple of this; FLUX.2 needs 16
LARGEST_PX = 4096


@dataclass(frozen=True)
class Session:
    """What stays the same for all pictures of a command: the model, its headers read, and where things are."""

    config: GenerateConfig
    opened: Opened
    advice: Recommended
    shelf: LoraShelf
    hasher: Hasher
    wildcards: Wildcards | None
    seen: tuple[tuple[Reference, Image.Image], ...]  # of --ref

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return self.opened.family.grid


def check(config: GenerateConfig) -> None:
    """Raises SdlabError for every fault that shows without a model, all at once."""
    from sdlab.inference.engines.schedulers import canonical
    from sdlab.inference.prompts import lines

    faults = off_grid(config, GRID)
    if config.guidance is not None and not math.isfinite(config.guidance):
        faults.append(f"--guidance {config.guidance} is not a number")
    if config.prefix is not None and config.no_prefix:
        faults.append("--prefix and --no-prefix exclude each other")
    if config.change and config.from_picture is None:
        faults.append("--set changes what --from makes again; without it, give the option itself")
    if not math.isfinite(config.hires) or (config.hires > 1 and not 0 < config.hires_strength <= 1):
        faults.append("--hires is a factor from 1 on, --hires-strength above 0 and at most 1")
    if config.hires == 1 and config.hires_steps is not None:
        faults.append("--hires-steps is of the second pass, so give --hires 2 or another factor as well")
    faults += _said(lambda: canonical(config.scheduler))
    faults += _said(lambda: lines.check_text(config.negative, where="--negative"))
    faults += _said(lambda: lines.check_text(config.prefix or "", where="--prefix"))
    if faults:
        raise gathered(faults, where="")


def off_grid(config: GenerateConfig, grid: int) -> list[str]:
    """One fault for each side that is no multiple of `grid`."""
    faults = []
    for side in ("width", "height", "image_size"):
        value = getattr(config, side)
        if value is not None and value % grid:
            low = value // grid * grid
            near = f"{low} or {low + grid}" if low >= 32 else f"{low + grid}"
            faults.append(f"--{normalise(side)} {value} is not a multiple of {grid}; the nearest is {near}")
    return faults


def open_session(config: GenerateConfig, *, tuned: Path, hasher: Hasher) -> Session:
    """Find the model, read its headers and hash its files.

    Raises SdlabError for everything asked that is not there or that this kind of model does not take.
    """
    from sdlab.inference import load
    from sdlab.inference.prompts.dynamic import read_wildcards
    from sdlab.inference.shelf import LoraShelf
    from sdlab.models.lora import parse_lora
    from sdlab.models.opening import recommended

    wildcards = read_wildcards(config.wildcards) if config.wildcards is not None else None
    shelf = LoraShelf(config.lora_dir, tuned)
    loras = tuple(parse_lora(text) for text in config.lora)
    asked = load.Asked(
        config.load_model, config.unet, config.vae, loras, config.embedding, config.allow_pickle
    )
    opened = load.open_chosen(load.choose(asked, tuned=tuned, hasher=hasher))
    if faults := misfits(config, opened.engine, opened.family.grid):
        raise gathered(faults, where=opened.chosen.model.name)
    if config.guidance is not None and opened.engine.no_guidance:
        show.warn(f"--guidance: {opened.engine.no_guidance}")
    advice = recommended(opened.chosen.model)
    seen = references(config.ref, model_size=advice.image_size, grid=opened.family.grid)
    return Session(config, opened, advice, shelf, hasher, wildcards, seen)


def misfits(config: GenerateConfig, engine: Engine, grid: int) -> list[str]:
    """Everything asked that this kind of model does not take, in words."""
    from sdlab.inference.prompts.chunks import check_clip_skip

    faults = [
        f"--{option}: {reason}"
        for option, given, reason in (
            ("scheduler", config.scheduler, engine.no_scheduler),
            ("negative", config.negative, engine.no_negative),
            ("ref", config.ref, engine.no_references),
            ("clip-skip", config.clip_skip != 1, engine.no_clip_skip),
            ("embedding", config.embedding, engine.no_embeddings),
            ("mask", getattr(config, "mask", None), engine.no_mask),
        )
        if given and reason
    ]
    if config.clip_skip > 1 and not engine.no_clip_skip:
        faults += _said(lambda: check_clip_skip(config.clip_skip, engine.num_clip_layers))
    return faults + off_grid(config, grid)


def _said(check_one: Callable[[], object]) -> list[str]:
    try:
        check_one()
    except SdlabError as reason:
        return [str(reason)]
    return []


def references(
    paths: Sequence[Path], *, model_size: int, grid: int
) -> tuple[tuple[Reference, Image.Image], ...]:
    """The pictures of --ref, opened. Raises SdlabError for all that cannot be used, at once."""
    from sdlab.inference import edit

    found, faults = [], []
    for path in paths:
        try:
            found.append(edit.looked_at(path, model_size=model_size, grid=grid))
        except SdlabError as reason:
            faults.append(str(reason))
    if faults:
        raise gathered(faults, where="--ref")
    return tuple(found)


def prefix_for(config: GenerateConfig, advised: str) -> str:
    """What goes before every prompt."""
    return "" if config.no_prefix else advised if config.prefix is None else config.prefix


def size_of(session: Session, config: GenerateConfig) -> tuple[int, int]:
    """(width, height): what was asked for, else that of the first picture looked at, else the model's own."""
    if session.seen and not (config.width or config.height or config.image_size):
        return session.seen[0][1].size
    side = config.image_size or session.advice.image_size
    return config.width or side, config.height or side


def spec_of(
    session: Session,
    config: GenerateConfig,
    *,
    size: tuple[int, int],
    strength: float | None = None,
    guidance: float | None = None,
) -> Spec:
    """How a picture of this size, (width, height), is made. `guidance` is used where none was asked for.

    Raises SdlabError for a second pass that is too large or has no step to do.
    """
    from sdlab.inference.engines.schedulers import canonical

    advised = session.advice.guidance if guidance is None else guidance
    steps = config.steps or session.advice.steps
    return Spec(
        steps=steps,
        guidance=advised if config.guidance is None else config.guidance,
        width=size[0],
        height=size[1],
        scheduler=canonical(config.scheduler),
        strength=strength,
        clip_skip=config.clip_skip,
        emphasis=config.emphasis,
        hires=_hires(config, size, steps, session.grid),
    )


def _hires(config: GenerateConfig, size: tuple[int, int], steps: int, grid: int) -> Hires | None:
    if config.hires == 1:
        return None
    width, height = (round(side * config.hires / grid) * grid for side in size)
    if (width, height) == size:
        raise SdlabError(f"--hires {config.hires:g} leaves {width}x{height} as it is; give a larger factor")
    if max(width, height) > LARGEST_PX:
        raise SdlabError(f"--hires {config.hires:g} gives {width}x{height}, more than {LARGEST_PX} a side")
    steps = config.hires_steps or steps
    if int(steps * config.hires_strength) < 1:
        raise SdlabError(f"{steps} steps at --hires-strength {config.hires_strength:g} leave no step to do")
    return Hires(width, height, steps, config.hires_strength)


def format_of(config: GenerateConfig) -> Format:
    """The files that pictures are written to; a PNG has no quality."""
    return Format(config.format, 95 if config.format == "png" else config.quality)
