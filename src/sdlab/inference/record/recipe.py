"""The recipe of one picture: everything that made it, as plain JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.inference import identity
from sdlab.inference.engines import schedulers
from sdlab.inference.load import Loaded, Source, hardware, versions
from sdlab.inference.record import container
from sdlab.inference.record.schema import SCHEMA, Recipe
from sdlab.inference.spec import Format, Hires, Init, Mask, Reference, Shot, Spec

if TYPE_CHECKING:
    from sdlab.inference.batch import Batch
    from sdlab.inference.engines.checks import Made


def recipe(made: Made, batch: Batch, position: int, *, loaded: Loaded, exact: bool) -> Recipe:
    """Of the picture at `position` in its batch."""
    shots = batch.shots
    return {
        "schema": SCHEMA,
        "kind": "img2img" if batch.init else "edit" if batch.references else "txt2img",
        **_one(shots[position]),
        "prompt_sent": shots[position].prompt,
        **_how(batch.spec),
        "scheduler": describe(batch.spec.scheduler, loaded.sampler.pipeline.scheduler),
        "init": _init(batch.init) if batch.init else None,
        "mask": _mask(batch.mask) if batch.mask else None,
        "references": [_reference(one) for one in batch.references],
        **_parts(batch, loaded),
        "batch": [_one(shot) for shot in shots] if len(shots) > 1 else [],
        "batch_position": position if len(shots) > 1 else 0,
        "exact": exact,
        "device": loaded.device.type,
        "hardware": hardware(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": loaded.num_threads,
        "compile": loaded.running.compile,
        "vae_tiling": loaded.running.vae_tiling,
        "rng": "cpu",
        "safety": made.safety,
        "vae_float32": made.vae_float32,
        "format": batch.format.name,
        "quality": batch.format.quality,
        "versions": versions(),
    }


def check_fits(batch: Batch, *, loaded: Loaded, exact: bool) -> None:
    """Raises SdlabError where the batch's files cannot hold their recipes; nothing has to be computed yet."""
    from sdlab.inference.engines.checks import Made

    if batch.format.name != "jpeg":
        return
    texts = [shot.prefix + shot.typed + shot.negative + shot.template for shot in batch.shots]
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))  # all hold the others' texts too
    to_come = recipe(Made(None, safety="flagged"), batch, longest, loaded=loaded, exact=exact)
    container.check_fits(to_come, batch.format)


def _how(spec: Spec) -> dict[str, Any]:
    table = asdict(spec)
    del table["scheduler"]  # told at length
    return table


def _parts(batch: Batch, loaded: Loaded) -> dict[str, Any]:
    """The files that the picture was made with, by what they are."""
    chosen = loaded.chosen
    model = {
        "family": chosen.model.family,
        **chosen.source.record(),
        "lora": _lora(chosen.own_lora) if chosen.own_lora else None,
        "rest": chosen.rest.record() if chosen.rest else None,
    }
    loras = [(source, weight, False) for source, weight in chosen.loras]
    loras += [(source, weight, True) for source, weight in batch.loras]
    return {
        "model": model,
        "unet": chosen.unet.record() if chosen.unet else None,
        "vae": chosen.vae.record() if chosen.vae else None,
        "loras": [{**_lora(source), "weight": weight, "tag": tag} for source, weight, tag in loras],
        "embeddings": [source.record() for source in batch.embeddings],
    }


def _lora(source: Source) -> dict[str, Any]:
    return {**source.record(), "autov3": source.autov3}


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
        "template": shot.template,
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


def _mask(mask: Mask) -> dict[str, Any]:
    return {**_init(mask.source), "blur_px": mask.blur_px}


def _reference(reference: Reference) -> dict[str, Any]:
    return {**_init(reference.source), "width": reference.width, "height": reference.height}


class LiteralShot(Shot):
    """A shot of an older version, which sent ``<lora:name:1>`` to the text encoder like any other text."""

    @property
    def prompt(self) -> str:
        """The prompt as sent to the model."""
        return self.prefix + self.typed


def batch_of(recipe: Recipe) -> list[Shot]:
    """The shots that were made together with this picture, itself among them."""
    return [_shot(one, literal=not recipe["long_prompts"]) for one in recipe["batch"] or [recipe]]


def _shot(one: Mapping[str, Any], *, literal: bool) -> Shot:
    kind = LiteralShot if literal else Shot
    return kind(one["index"], one["prompt"], one["prefix"], one["negative"], one["seed"], one["template"])


def spec_of(recipe: Recipe) -> Spec:
    """How the picture was made."""
    hires = recipe["hires"]
    return Spec(
        steps=recipe["steps"],
        guidance=recipe["guidance"],
        width=recipe["width"],
        height=recipe["height"],
        scheduler=schedulers.canonical(recipe["scheduler"]["name"]),
        strength=recipe["strength"],
        clip_skip=recipe["clip_skip"],
        emphasis=recipe["emphasis"],
        hires=hires and Hires(hires["width"], hires["height"], hires["steps"], hires["strength"]),
        long_prompts=recipe["long_prompts"],
    )


def format_of(recipe: Recipe) -> Format:
    """The file it was written to."""
    return Format(recipe["format"], recipe["quality"])
