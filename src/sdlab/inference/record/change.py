"""`--set steps=30` beside `--from`: the recipe with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdlab.errors import SdlabError, gathered
from sdlab.inference.config import Img2ImgConfig
from sdlab.inference.engines.schedulers import canonical
from sdlab.inference.prompts import dynamic
from sdlab.inference.prompts.lines import check_text
from sdlab.inference.record.schema import Recipe, leaves_a_step
from sdlab.options import did_you_mean, normalise, parse_value

LARGEST_PX = 4096
TEXTS = ("prompt", "negative", "prefix")
OF_ONE = (*TEXTS, "seed")  # what the others of a batch have of their own, so the picture is made alone
PLAIN = (
    "negative",
    "prefix",
    "seed",
    "steps",
    "guidance",
    "width",
    "height",
    "strength",
    "clip_skip",
    "emphasis",
    "format",
    "quality",
)
HIRES = ("hires", "hires_steps", "hires_strength")
PARTS = ("load_model", "unet", "vae", "lora")
SETTABLE = ("prompt", "scheduler", *PLAIN, *HIRES, *PARTS)


def given(changes: Sequence[str]) -> dict[str, Any]:
    """The values of ``["steps=30", "lora=pen.safetensors:0.5"]`` by the names in SETTABLE; `lora` is a tuple.

    An empty `unet`, `vae` or `lora` means without. Raises SdlabError, naming all that cannot be set.
    """
    values: dict[str, Any] = {}
    faults = []
    for change in changes:
        try:
            name, value = _one(change)
            if name in values and name != "lora":
                raise SdlabError(f"{name} is set twice")
            values[name] = (*values.get(name, ()), *value) if name == "lora" else value
        except SdlabError as reason:
            faults.append(str(reason))
    if faults:
        raise gathered(faults, where="--set")
    return values


def _one(change: str) -> tuple[str, Any]:
    option, equals, text = change.partition("=")
    if not equals:
        raise SdlabError(f"'{change}' sets nothing", next_step="Write --set steps=30")
    known = [normalise(name) for name in SETTABLE]
    typed = normalise(option.strip().lstrip("-"))
    name, value = _parsed(typed, text) if typed in (*known, "transformer") else ("", None)
    if name not in SETTABLE:
        near = did_you_mean(typed, known)
        raise SdlabError(f"'{option}' cannot be set{near}", next_step=f"What can: {', '.join(sorted(known))}")
    return name, value


def _parsed(option: str, text: str) -> tuple[str, Any]:
    name, value = parse_value(Img2ImgConfig, option, text)
    if name == "prompt":
        value = text
    if name == "lora":
        value = (text,) if text else ()
    if name == "scheduler":
        value = canonical(text)
    if name in TEXTS:
        check_text(value, where=name)
    return name, value


def drawn(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the choices of set TEXTS made, by the picture's seed.

    With a prompt there comes `template`, what it was chosen from, "" where there was nothing to choose. Raises
    SdlabError for a choice that cannot be made.
    """
    new, seed = dict(values), values.get("seed", recipe["seed"])
    for name in set(TEXTS) & values.keys():
        try:
            new[name] = dynamic.expand(values[name], seed=seed, wildcards=None, part=name)
        except SdlabError as reason:
            raise gathered([str(reason)], where=f"--set {name}") from reason
    if "prompt" in values:
        new["template"] = values["prompt"] if new["prompt"] != values["prompt"] else ""
    return new


def oddities(values: Mapping[str, Any]) -> list[str]:
    """What in set TEXTS, their choices not yet made, may not mean what was meant."""
    texts = [values[name] for name in TEXTS if name in values]
    wild = [name for text in texts for name in dynamic.wildcards_in(text)]
    found = [warning for text in texts for warning in dynamic.warnings_of(text)]
    found += [f"__{name}__ is sent as it is, as --set knows no wildcards" for name in wild]
    return list(dict.fromkeys(found))


def changed(recipe: Recipe, values: Mapping[str, Any], *, grid: int) -> Recipe:
    """The recipe with the values of `drawn`, but for PARTS, which are files.

    What makes a picture another among those of its batch (OF_ONE) has it made alone. Where the prompt or the prefix
    changes, an older version's recipe is read as prompts are today, with emphasis and beyond 77 tokens. Raises
    SdlabError for sides that are no multiple of `grid`, and for values that the picture has no use for.
    """
    new = {**recipe, **{name: values[name] for name in PLAIN if name in values}}
    if "prompt" in values:
        new |= {"prompt": values["prompt"], "template": values.get("template", "")}
    if ("prompt" in values or "prefix" in values) and not recipe["long_prompts"]:
        new["long_prompts"] = True
        if "emphasis" not in values and recipe["emphasis"] == "none":
            new["emphasis"] = Img2ImgConfig().emphasis
    if any(name in values for name in OF_ONE):
        new |= {"batch": [], "batch_position": 0}
    if "scheduler" in values:
        new["scheduler"] = {**recipe["scheduler"], "name": values["scheduler"]}
    new["hires"] = _hires(recipe, new, values, grid=grid)
    faults = _faults(recipe, new, values, grid=grid)
    if faults:
        raise gathered(faults, where="--set")
    return new


def _hires(recipe: Recipe, new: Recipe, values: Mapping[str, Any], *, grid: int) -> dict[str, Any] | None:
    """The second pass: by the factor that is set, else enlarging as much as it did. A set factor of 1 means none."""
    before = recipe["hires"]
    factor = values.get("hires")
    if factor == 1 or (factor is None and before is None):
        return None
    if factor is None:
        factor = before["width"] / recipe["width"]
    default = Img2ImgConfig()
    own = before or {"steps": new["steps"], "strength": default.hires_strength}
    resized = before is None or any(name in values for name in ("hires", "width", "height"))
    sides = ("width", "height")
    size = {side: round(new[side] * factor / grid) * grid if resized else before[side] for side in sides}
    return {
        **size,
        "steps": values.get("hires_steps", own["steps"]),
        "strength": values.get("hires_strength", own["strength"]),
    }


def _faults(recipe: Recipe, new: Recipe, values: Mapping[str, Any], *, grid: int) -> list[str]:
    faults = [
        f"{side} {new[side]} is not a multiple of {grid}"
        for side in ("width", "height")
        if side in values and new[side] % grid
    ]
    if "strength" in values and recipe["strength"] is None:
        faults.append("strength: the picture was not made by noising another")
    elif new["strength"] is not None and not leaves_a_step(new["steps"], new["strength"]):
        faults.append(f"{new['steps']} steps at strength {new['strength']:g} leave no step to do")
    hires = new["hires"]
    if hires is None and ("hires_steps" in values or "hires_strength" in values):
        faults.append("the picture has no second pass; set hires=2 as well")
    if hires is not None and not leaves_a_step(hires["steps"], hires["strength"]):
        faults.append(f"{hires['steps']} steps at hires_strength {hires['strength']:g} leave no step to do")
    if hires is not None and max(hires["width"], hires["height"]) > LARGEST_PX:
        faults.append(f"hires gives {hires['width']}x{hires['height']}, more than {LARGEST_PX} a side")
    if "quality" in values and new["format"] == "png":
        faults.append("quality: a PNG has none; set format=jpeg or format=webp as well")
    assert all(math.isfinite(new[name]) for name in ("guidance", "width", "height"))
    return faults
