"""Making a picture again from its recipe, or saying which file is no longer the one it was made with."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import show
from sdlab.errors import gathered
from sdlab.inference import edit, load
from sdlab.inference.batch import Batch
from sdlab.inference.engines import kinds, schedulers
from sdlab.inference.identity import Hasher
from sdlab.inference.jobs import output
from sdlab.inference.jobs.job import make
from sdlab.inference.jobs.report import Report
from sdlab.inference.load import Loaded, Opened, Source
from sdlab.inference.record import change
from sdlab.inference.record.files import Elsewhere, Finder, shown
from sdlab.inference.record.recipe import batch_of, describe, format_of, spec_of
from sdlab.inference.record.schema import Recipe
from sdlab.inference.shelf import LoraShelf

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.spec import Init, Mask, Reference, Spec

__all__ = ["Elsewhere", "remake"]

MOST_THREADS = 64  # more than the cores there are is slow and gives the same bits


def remake(
    picture: Path,
    recipe: Recipe,
    *,
    elsewhere: Elsewhere,
    changes: Sequence[str] = (),
    folder: Path,
    lora_dirs: Sequence[Path] = (),
    allow_pickle: bool,
    tuned: Path,
    hasher: Hasher,
) -> Report:
    """Write the picture again into `folder`, pixel for pixel on the same machine and versions.

    `changes` as ``["steps=30"]`` are made first (see change.py). LoRAs that its prompt names and that are no longer
    where they were are looked for in `lora_dirs` and `tuned`; a changed text may name textual inversions of
    `elsewhere`. Raises SdlabError, before anything is loaded, naming every file that is missing or has changed.
    Other versions, hardware, device or number type are warned of: they change last digits.
    """
    set_values = change.given(changes)
    for oddity in change.oddities(set_values):
        show.warn(f"--set: {oddity}")
    values = change.drawn(recipe, set_values)
    finder = Finder(picture, elsewhere, values)
    init, mask, references = finder.init(recipe), finder.mask(recipe), finder.references(recipe)
    asked = finder.asked(recipe, allow_pickle=allow_pickle)
    tagged = finder.tagged(recipe, LoraShelf(lora_dirs, tuned).find, shelf_first=bool(lora_dirs))
    if finder.faults:
        raise gathered(finder.faults, where=str(picture))
    chosen = load.choose(asked, tuned=tuned, hasher=hasher)
    worn = [(load.lora_source(tag.path, hasher), tag) for tag in tagged]
    finder.compare(recipe, chosen, worn)
    if finder.faults:
        next_step = "With the files as they are now, make a new picture without --from"
        raise gathered(finder.faults, where=str(picture), next_step=next_step)
    opened = load.open_chosen(chosen)
    new = change.changed(recipe, values, grid=opened.family.grid)
    if faults := _misfits(new, opened):
        raise gathered(faults, where=chosen.model.name)
    loras = tuple((source, tag.weight) for source, tag in worn)
    load.check_tagged(opened, loras)
    loaded = _loaded(new, opened, elsewhere)
    for difference in differences(new, loaded, values):
        show.warn(f"{picture}: {difference}")
    batch = _batch(new, opened, folder, loras, init=init, mask=mask, references=references)
    report = Report()
    make(loaded, [batch], total=1, exact=new["exact"], report=report)
    return report


def _misfits(recipe: Recipe, opened: Opened) -> list[str]:
    """What of the recipe this model does not take, in words; after a change it may be another's."""
    engine, grid = opened.engine, opened.family.grid
    asked = {
        "scheduler": (recipe["scheduler"]["name"], engine.no_scheduler),
        "negative": (recipe["negative"], engine.no_negative),
        "ref": (recipe["references"], engine.no_references),
        "clip-skip": (recipe["clip_skip"] != 1, engine.no_clip_skip),
        "embedding": (opened.chosen.embeddings, engine.no_embeddings),
        "mask": (recipe["mask"], engine.no_mask),
    }
    faults = [f"--{option}: {reason}" for option, (there, reason) in asked.items() if there and reason]
    sides = [recipe[side] for side in ("width", "height") if recipe[side] % grid]
    return faults + [f"its sides are multiples of {grid}, not {side}" for side in sides]


def _loaded(recipe: Recipe, opened: Opened, elsewhere: Elsewhere) -> Loaded:
    spec = spec_of(recipe)
    running = load.Running(
        device=_device(recipe, elsewhere),
        dtype=recipe["dtype"] if elsewhere.dtype == "auto" else elsewhere.dtype,
        compile=recipe["compile"],
        vae_tiling=recipe["vae_tiling"],
        offload=elsewhere.offload,
        threads=recipe["threads"] if recipe["threads"] <= max(MOST_THREADS, os.cpu_count() or 1) else None,
    )
    loaded = load.load(opened, running, prompts=kinds.texts(opened.engine, batch_of(recipe)))
    if not opened.engine.no_scheduler:
        for steps in (spec.steps, *([spec.hires.steps] if spec.hires else [])):
            fresh = schedulers.fresh(spec.scheduler, loaded.sampler.pipeline.scheduler)
            schedulers.set_steps(fresh, steps, name=spec.scheduler)
    return loaded


def _batch(
    recipe: Recipe,
    opened: Opened,
    folder: Path,
    loras: tuple[tuple[Source, float], ...],
    *,
    init: Init | None,
    mask: Mask | None,
    references: tuple[Reference, ...],
) -> Batch:
    spec, grid, form = spec_of(recipe), opened.family.grid, format_of(recipe)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    batch = Batch(
        batch_of(recipe),
        spec,
        folder,
        lambda shot: output.numbered(stamp, shot.index, form.suffix),
        references=references,
        looked_at=tuple(edit.opened_as(r.source, r.width, r.height, grid=grid) for r in references),
        keep=frozenset([recipe["batch_position"]]),
        loras=loras,
        embeddings=opened.chosen.embeddings,
        format=form,
    )
    return batch if init is None else replace(batch, **_started(init, mask, spec, grid))


def _started(init: Init, mask: Mask | None, spec: Spec, grid: int) -> dict[str, Any]:
    """The picture to start from and its mask, as the engine sees them."""
    picture = edit.opened(init.path, background=init.background, max_pixels=init.max_pixels)

    def fitting(image: Image.Image) -> Image.Image:
        return edit.prepared(image, width=spec.width, height=spec.height, grid=grid)

    given = {"init": init, "picture": fitting(picture)}
    if mask is None:
        return given
    _, grey = edit.mask_for(picture, mask.source.path, max_pixels=mask.source.max_pixels)
    return {**given, "mask": mask, "mask_picture": fitting(grey)}


def _device(recipe: Recipe, elsewhere: Elsewhere) -> str:
    if elsewhere.device != "auto":
        return elsewhere.device
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return str(recipe["device"]) if there.get(recipe["device"], True) else "auto"


def differences(recipe: Recipe, loaded: Loaded, values: dict[str, Any]) -> list[str]:
    """What is not as it was, in words: versions, hardware, device, number type, the scheduler's settings.

    Versions that the recipe does not tell, as older ones do not tell all, are not asked after.
    """
    described = describe(spec_of(recipe).scheduler, loaded.sampler.pipeline.scheduler)
    now = {
        **{f"{name} version": new for name, new in load.versions().items() if name in recipe["versions"]},
        "device": loaded.device.type,
        "number type": str(loaded.dtype).removeprefix("torch."),
        "hardware": load.hardware(loaded.device),
        "number of threads": loaded.num_threads,
        "scheduler": [described["class"], described["config"]],
    }
    then = {
        **{f"{name} version": version for name, version in recipe["versions"].items()},
        "device": recipe["device"],
        "number type": recipe["dtype"],
        "hardware": recipe.get("hardware", ""),
        "number of threads": recipe["threads"],
        "scheduler": [recipe["scheduler"]["class"], recipe["scheduler"]["config"]],
    }
    other = {"scheduler", "load_model"} & values.keys()
    found = [name for name in now if now[name] != then.get(name) and not (name == "scheduler" and other)]
    return [
        "the scheduler's settings are others than those recorded, so this may be another picture"
        if name == "scheduler"
        else f"{name} was {shown(str(then.get(name)))}, is {now[name]}, so last digits may differ"
        for name in found
    ]
