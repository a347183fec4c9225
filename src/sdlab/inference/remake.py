"""Making a picture again from its recipe, or saying which file is no longer the one it was made with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import show
from sdlab.errors import gathered
from sdlab.inference import edit, identity, load, schedulers
from sdlab.inference.identity import Hasher
from sdlab.inference.job import Batch, Report, make
from sdlab.inference.load import Loaded, Source
from sdlab.inference.metadata import Recipe
from sdlab.inference.recipe import batch_of, describe, spec_of
from sdlab.inference.spec import Init

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Elsewhere:
    """Where things are now, if not where the recipe says; "" and "auto" mean as recorded."""

    load_model: str = ""
    unet: str = ""
    init_image: Path | None = None
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
    init = _init(recipe["init"], elsewhere.init_image, bases, faults)
    if elsewhere.unet and recipe["unet"] is None:
        faults.append("it was made without --unet")
    unet = elsewhere.unet or _again(recipe["unet"], bases, "--unet", faults) if recipe["unet"] else ""
    asked = elsewhere.load_model or _again(recipe["model"], bases, "--load-model", faults)
    if faults:
        raise gathered(faults, where=str(picture))
    chosen = load.choose(asked, unet=unet, tuned=tuned, allow_pickle=allow_pickle, hasher=hasher)
    faults += _changed(recipe["model"], chosen.source)
    faults += _changed(recipe["unet"], chosen.unet) if chosen.unet else []
    if faults:
        next_step = "With the files as they are now, make a new picture without --from"
        raise gathered(faults, where=str(picture), next_step=next_step)
    if recipe["threads"] <= (os.cpu_count() or 1):
        torch.set_num_threads(recipe["threads"])  # another number sums in another order
    loaded = load.load(chosen, device=_device(recipe, elsewhere), dtype=_dtype(recipe, elsewhere))
    for difference in differences(recipe, loaded):
        show.warn(f"{picture}: {difference}, so last digits may differ")
    shots, spec = batch_of(recipe), spec_of(recipe)
    fresh = schedulers.fresh(spec.scheduler, loaded.sampler.pipeline.scheduler)
    schedulers.set_steps(fresh, spec.steps, name=spec.scheduler)
    batch = Batch(
        shots,
        spec,
        folder,
        lambda shot: names,
        init=init,
        picture=_opened(init, spec.width, spec.height, loaded.sampler.grid) if init else None,
        keep=recipe["batch_position"],
    )
    report = Report()
    make(loaded, [batch], total=len(shots), exact=recipe["exact"], report=report)
    return report


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


def _changed(part: dict[str, Any], now: Source) -> list[str]:
    """One fault for each file that differs from the recipe's."""
    faults = []
    for name, digest in sorted(part["files"].items()):
        path = now.path / name if name else now.path
        if name not in now.files:
            faults.append(f"{path} is no longer there")
        elif now.files[name] != digest:
            faults.append(f"{path} has changed (sha256 was {str(digest)[:12]}, is {now.files[name][:12]})")
    added = sorted(set(now.files) - set(part["files"]))
    return [*faults, *(f"{now.path / name} is new" for name in added)]


def _init(
    part: dict[str, Any] | None, given: Path | None, bases: Iterable[Path], faults: list[str]
) -> Init | None:
    if part is None:
        return None
    path = given or identity.found_again(part["asked"], bases)
    if path is None or not path.is_file():
        faults.append(f"the picture it starts from, {part['asked']}, is no longer there")
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != part["sha256"]:
        faults.append(f"{path} has changed (sha256 was {part['sha256'][:12]}, is {digest[:12]})")
    return Init(path, digest, part["background"], part["max_pixels"])


def _opened(init: Init, width: int, height: int, grid: int) -> Image.Image:
    opened = edit.opened(init.path, background=init.background, max_pixels=init.max_pixels)
    return edit.prepared(opened, width=width, height=height, grid=grid)


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
