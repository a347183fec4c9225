"""Making a picture again from its recipe, or saying which file is no longer the one it was made with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab import show
from sdlab.errors import gathered
from sdlab.inference import edit, identity, load
from sdlab.inference.engines import kinds, schedulers
from sdlab.inference.identity import Hasher
from sdlab.inference.jobs.job import Batch, Report, make
from sdlab.inference.load import Asked, Chosen, Loaded, Source
from sdlab.inference.record.metadata import Recipe
from sdlab.inference.record.recipe import batch_of, describe, spec_of
from sdlab.inference.spec import Init, Reference


@dataclass(frozen=True)
class Elsewhere:
    """Where things are now, if not where the recipe says; "" and "auto" mean as recorded."""

    load_model: str = ""
    unet: str = ""
    vae: str = ""
    loras: tuple[Path, ...] = ()  # in the recipe's order; their weights are the recipe's
    init_image: Path | None = None
    references: tuple[Path, ...] = ()  # in the recipe's order, after `init_image` where that is one of them
    device: str = "auto"
    dtype: str = "auto"


def remake(
    picture: Path,
    recipe: Recipe,
    *,
    elsewhere: Elsewhere,
    folder: Path,
    names: Iterator[str],
    allow_pickle: bool,
    tuned: Path,
    hasher: Hasher,
) -> Report:
    """Write the picture again into `folder`, pixel for pixel on the same machine and versions.

    Raises SdlabError, before anything is loaded, naming every file that is missing or has changed. Other
    versions, hardware, device or number type are warned of: they change last digits.
    """
    import torch

    bases = (Path(), *picture.absolute().parents)
    faults: list[str] = []
    init, references = _pictures(recipe, elsewhere, bases, faults)
    asked = _asked(recipe, elsewhere, bases, faults, allow_pickle=allow_pickle)
    if faults:
        raise gathered(faults, where=str(picture))
    chosen = load.choose(asked, tuned=tuned, hasher=hasher)
    faults += _all_changed(recipe, chosen)
    if faults:
        next_step = "With the files as they are now, make a new picture without --from"
        raise gathered(faults, where=str(picture), next_step=next_step)
    if recipe["threads"] <= (os.cpu_count() or 1):
        torch.set_num_threads(recipe["threads"])  # another number sums in another order
    shots, spec = batch_of(recipe), spec_of(recipe)
    opened = load.open_chosen(chosen)
    loaded = load.load(
        opened,
        device=_device(recipe, elsewhere),
        dtype=_dtype(recipe, elsewhere),
        prompts=kinds.texts(opened.engine, shots),
    )
    for difference in differences(recipe, loaded):
        show.warn(f"{picture}: {difference}, so last digits may differ")
    if not opened.engine.no_scheduler:
        fresh = schedulers.fresh(spec.scheduler, loaded.sampler.pipeline.scheduler)
        schedulers.set_steps(fresh, spec.steps, name=spec.scheduler)
    grid = opened.family.grid
    batch = Batch(
        shots,
        spec,
        folder,
        lambda shot: names,
        init=init,
        picture=edit.opened_as(init, spec.width, spec.height, grid=grid) if init else None,
        references=references,
        looked_at=tuple(edit.opened_as(r.source, r.width, r.height, grid=grid) for r in references),
        keep=frozenset([recipe["batch_position"]]),
    )
    report = Report()
    make(loaded, [batch], total=1, exact=recipe["exact"], report=report)
    return report


def _asked(
    recipe: Recipe,
    elsewhere: Elsewhere,
    bases: Iterable[Path],
    faults: list[str],
    *,
    allow_pickle: bool,
) -> Asked:
    """What to load, from where it lies now."""
    swapped = {}
    for name, given in (("unet", elsewhere.unet), ("vae", elsewhere.vae)):
        if given and recipe[name] is None:
            faults.append(f"it was made without --{name}")
        swapped[name] = given or _again(recipe[name], bases, f"--{name}", faults) if recipe[name] else ""
    if elsewhere.loras and len(elsewhere.loras) != len(recipe["loras"]):
        faults.append(f"it was made with {len(recipe['loras'])} --lora, not {len(elsewhere.loras)}")
        return Asked()
    loras = elsewhere.loras or [Path(_again(one, bases, "--lora", faults)) for one in recipe["loras"]]
    return Asked(
        load_model=elsewhere.load_model or _again(recipe["model"], bases, "--load-model", faults),
        loras=tuple((path, one["weight"]) for path, one in zip(loras, recipe["loras"], strict=True)),
        allow_pickle=allow_pickle,
        **swapped,
    )


def _again(part: dict[str, Any], bases: Iterable[Path], option: str, faults: list[str]) -> str:
    """What to load: the name for a model found by name, else the path where it lies now."""
    if part["kind"] in load.BY_NAME:
        return str(part["asked"])
    path = identity.found_again(part["asked"], bases)
    if path is None:
        faults.append(f"{part['asked']} is no longer there; say where it is now with {option}")
        return ""
    text = str(path)
    return (
        text if os.sep in text else os.path.join(os.curdir, text)
    )  # a folder mini-sd is not the model mini-sd


def _all_changed(recipe: Recipe, chosen: Chosen) -> list[str]:
    """One fault for each file that differs from the recipe's."""
    pairs = [
        (recipe["model"], chosen.source),
        (recipe["unet"], chosen.unet),
        (recipe["vae"], chosen.vae),
        (recipe["model"].get("lora"), chosen.own_lora),
        (recipe["model"].get("rest"), chosen.rest),
        *zip(recipe["loras"], (source for source, _ in chosen.loras), strict=True),
    ]
    return [fault for part, now in pairs for fault in _changed(part, now)]


def _changed(part: dict[str, Any] | None, now: Source | None) -> list[str]:
    if part is None:
        return [] if now is None else [f"{now.path} is new"]
    if now is None:
        return [f"{part['name']} is no longer part of the model"]
    faults = []
    for name, digest in sorted(part["files"].items()):
        path = now.path / name if name else now.path
        if name not in now.files:
            faults.append(f"{path} is no longer there")
        elif now.files[name] != digest:
            faults.append(f"{path} has changed (sha256 was {str(digest)[:12]}, is {now.files[name][:12]})")
    added = sorted(set(now.files) - set(part["files"]))
    return [*faults, *(f"{now.path / name} is new" for name in added)]


def _pictures(
    recipe: Recipe, elsewhere: Elsewhere, bases: Iterable[Path], faults: list[str]
) -> tuple[Init | None, tuple[Reference, ...]]:
    """The picture to start from and those to look at. `faults` gets what is missing or has changed."""
    given = list(elsewhere.references)
    init = None
    if recipe["init"] is not None:
        init = _init(recipe["init"], elsewhere.init_image, bases, faults)
    elif elsewhere.init_image is not None:
        given.insert(0, elsewhere.init_image)  # the picture that is edited is the first that is looked at
    parts = recipe["references"]
    if given and len(given) != len(parts):
        faults.append(
            f"it was made looking at {len(parts)} pictures, not {len(given)}; give all, in their order"
        )
        return init, ()
    found = [
        (_init(part, given[i] if given else None, bases, faults), part["width"], part["height"])
        for i, part in enumerate(parts)
    ]
    return init, tuple(Reference(one, width, height) for one, width, height in found if one)


def _init(part: dict[str, Any], given: Path | None, bases: Iterable[Path], faults: list[str]) -> Init | None:
    path = given or identity.found_again(part["asked"], bases)
    if path is None or not path.is_file():
        faults.append(f"the picture it was made from, {part['asked']}, is no longer there")
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != part["sha256"]:
        faults.append(f"{path} has changed (sha256 was {part['sha256'][:12]}, is {digest[:12]})")
    return Init(path, digest, part["background"], part["max_pixels"])


def _device(recipe: Recipe, elsewhere: Elsewhere) -> str:
    if elsewhere.device != "auto":
        return elsewhere.device
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return str(recipe["device"]) if there.get(recipe["device"], True) else "auto"


def _dtype(recipe: Recipe, elsewhere: Elsewhere) -> str:
    return str(recipe["dtype"]) if elsewhere.dtype == "auto" else elsewhere.dtype


def differences(recipe: Recipe, loaded: Loaded) -> list[str]:
    """What is not as it was, in words: versions, hardware, device, number type, the scheduler's settings."""
    import torch

    now = {
        **{f"{name} version": version for name, version in load.versions().items()},
        "device": loaded.device.type,
        "number type": str(loaded.dtype).removeprefix("torch."),
        "hardware": load.hardware(loaded.device),
        "number of threads": torch.get_num_threads(),
        "scheduler": describe(recipe["scheduler"]["name"], loaded.sampler.pipeline.scheduler)["config"],
    }
    then = {
        **{f"{name} version": version for name, version in recipe["versions"].items()},
        "device": recipe["device"],
        "number type": recipe["dtype"],
        "hardware": recipe.get("hardware", ""),
        "number of threads": recipe["threads"],
        "scheduler": recipe["scheduler"]["config"],
    }
    found = [name for name in now if now[name] != then.get(name)]
    return [
        "the scheduler's settings are others"
        if name == "scheduler"
        else f"{name} was {then.get(name)}, is {now[name]}"
        for name in found
    ]
