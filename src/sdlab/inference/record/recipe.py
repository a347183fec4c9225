"""The recipe of one picture: everything that made it, as plain JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.inference import identity
from sdlab.inference.engines import schedulers
from sdlab.inference.load import Loaded, hardware, versions
from sdlab.inference.record.metadata import SCHEMA, Recipe
from sdlab.inference.spec import Init, Reference, Shot, Spec

if TYPE_CHECKING:
    from sdlab.inference.engines.sd import Made


def recipe(
    made: Made,
    batch: Sequence[Shot],
    position: int,
    spec: Spec,
    *,
    loaded: Loaded,
    init: Init | None,
    references: Sequence[Reference],
    exact: bool,
) -> Recipe:
    """Of the picture at `position` in its batch."""
    import torch

    shot, chosen = batch[position], loaded.chosen
    model = {
        "family": chosen.model.family,
        **chosen.source.record(),
        "lora": chosen.own_lora.record() if chosen.own_lora else None,
        "rest": chosen.rest.record() if chosen.rest else None,
    }
    return {
        "schema": SCHEMA,
        "kind": "img2img" if init else "edit" if references else "txt2img",
        "prompt": shot.typed,
        "prefix": shot.prefix,
        "prompt_sent": shot.prompt,
        "negative": shot.negative,
        "index": shot.index,
        "seed": shot.seed,
        "steps": spec.steps,
        "guidance": spec.guidance,
        "width": spec.width,
        "height": spec.height,
        "strength": spec.strength,
        "scheduler": describe(spec.scheduler, loaded.sampler.pipeline.scheduler),
        "init": _init(init) if init else None,
        "references": [{**_init(one.source), "width": one.width, "height": one.height} for one in references],
        "model": model,
        "unet": chosen.unet.record() if chosen.unet else None,
        "vae": chosen.vae.record() if chosen.vae else None,
        "loras": [{**source.record(), "weight": weight} for source, weight in chosen.loras],
        "batch": [_one(s) for s in batch] if len(batch) > 1 else [],
        "batch_position": position if len(batch) > 1 else 0,
        "exact": exact,
        "device": loaded.device.type,
        "hardware": hardware(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rng": "cpu",
        "flagged": made.flagged,
        "vae_float32": made.vae_float32,
        "versions": versions(),
    }


def describe(name: str, own: Any) -> dict[str, Any]:
    """A scheduler by sdlab's name, by other programs' and by its class and whole configuration."""
    scheduler = schedulers.fresh(name, own)
    sampler, schedule = schedulers.sampler_name(scheduler, name)
    config = {key: value for key, value in sorted(scheduler.config.items()) if not key.startswith("_")}
    plain = json.loads(json.dumps(config, default=str))
    return {
        "name": name,
        "sampler": sampler,
        "schedule_type": schedule,
        "class": type(scheduler).__name__,
        "config": plain,
    }


def _one(shot: Shot) -> dict[str, Any]:
    return {
        "prompt": shot.typed,
        "prefix": shot.prefix,
        "negative": shot.negative,
        "seed": shot.seed,
        "index": shot.index,
    }


def _init(init: Init) -> dict[str, Any]:
    return {
        "name": init.path.name,
        "asked": identity.portable(init.path, base=Path.cwd()),
        "sha256": init.sha256,
        "background": init.background,
        "max_pixels": init.max_pixels,
    }


def batch_of(recipe: Recipe) -> list[Shot]:
    """The shots that were made together with this picture, itself among them."""
    return [
        Shot(one["index"], one["prompt"], one["prefix"], one["negative"], one["seed"])
        for one in recipe["batch"] or [recipe]
    ]


def spec_of(recipe: Recipe) -> Spec:
    """How the picture was made."""
    return Spec(
        steps=recipe["steps"],
        guidance=recipe["guidance"],
        width=recipe["width"],
        height=recipe["height"],
        scheduler=recipe["scheduler"]["name"],
        strength=recipe["strength"],
    )
