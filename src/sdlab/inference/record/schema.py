"""What a recipe holds, and whether one from anywhere can be trusted to be one."""

from __future__ import annotations

import math
import re
from typing import Any

from sdlab.errors import SdlabError
from sdlab.inference.engines.schedulers import canonical
from sdlab.inference.spec import EMPHASES, FORMATS, MAX_SEED

SCHEMA = 3
ADDED_IN_2: dict[str, Any] = {"vae": None, "loras": [], "references": []}
ADDED_IN_3: dict[str, Any] = {
    "emphasis": "none",
    "clip_skip": 1,
    "hires": None,
    "long_prompts": False,  # what was beyond CLIP's 77 tokens was cut off
    "mask": None,
    "template": "",
    "embeddings": [],
    "vae_tiling": False,
    "compile": False,
    "format": "png",
    "quality": 95,
}
SAFETY = ("none", "passed", "flagged")
MAX_BATCH, MAX_PARTS, MAX_REFERENCES, MAX_TEXT = 1024, 1024, 64, 1_000_000
MAX_BLUR_PX = 64

Recipe = dict[str, Any]

SHAPE: dict[str, Any] = {
    "prompt": str,
    "prefix": str,
    "prompt_sent": str,
    "negative": str,
    "template": str,
    "index": int,
    "seed": int,
    "steps": int,
    "guidance": (int, float),
    "width": int,
    "height": int,
    "strength": (int, float, type(None)),
    "clip_skip": int,
    "emphasis": str,
    "hires": (dict, type(None)),
    "long_prompts": bool,
    "scheduler": dict,
    "model": dict,
    "unet": (dict, type(None)),
    "vae": (dict, type(None)),
    "loras": list,
    "embeddings": list,
    "init": (dict, type(None)),
    "mask": (dict, type(None)),
    "references": list,
    "batch": list,
    "batch_position": int,
    "device": str,
    "dtype": str,
    "threads": int,
    "compile": bool,
    "vae_tiling": bool,
    "exact": bool,
    "safety": str,
    "format": str,
    "quality": int,
    "versions": dict,
}
_FILES = {"asked": str, "kind": str, "name": str, "files": dict, "sha256": str}
_PICTURE = {"asked": str, "name": str, "sha256": str, "background": str, "max_pixels": int}
INNER: dict[str, dict[str, Any]] = {
    "scheduler": {"name": str, "sampler": str, "schedule_type": str, "class": str, "config": dict},
    "hires": {"width": int, "height": int, "steps": int, "strength": (int, float)},
    "model": {**_FILES, "family": str},
    "unet": _FILES,
    "vae": _FILES,
    "loras": {**_FILES, "weight": (int, float), "autov3": str, "tag": bool},
    "embeddings": _FILES,
    "init": _PICTURE,
    "mask": {**_PICTURE, "blur_px": int},
    "references": {**_PICTURE, "width": int, "height": int},
    "batch": {"prompt": str, "prefix": str, "negative": str, "template": str, "seed": int, "index": int},
}
RANGES = {
    "steps": (1, 1000),
    "width": (8, 4096),
    "height": (8, 4096),
    "guidance": (0, 100),
    "index": (0, 10**9),
    "seed": (0, MAX_SEED),
    "clip_skip": (1, 12),
    "threads": (1, 4096),
    "quality": (1, 100),
}
_DIGEST = re.compile("[0-9a-f]{64}")


def checked(recipe: Any, where: str) -> Recipe:
    """The recipe with what older versions lacked, if each part has its type and a sane value.

    Raises SdlabError, naming parts that have not: a picture may come from anywhere.
    """
    if isinstance(recipe, dict) and recipe.get("kind") == "grid":
        raise SdlabError("is a grid of several pictures", where=where, next_step="Give one of its pictures")
    if not isinstance(recipe, dict) or recipe.get("schema") not in (1, 2, SCHEMA):
        raise SdlabError("its sdlab recipe is of another version", where=where, next_step="Update sdlab")
    whole = _completed(recipe)
    bad = _misfits(whole, SHAPE)
    for name, shape in INNER.items():
        inner = whole.get(name)
        for part in inner if isinstance(inner, list) else [inner] * (inner is not None):
            bad += [f"{name}.{key}" for key in (_misfits(part, shape) if isinstance(part, dict) else ["?"])]
    bad = bad or _insane(whole)
    if bad:
        raise SdlabError(f"its sdlab recipe is damaged at {', '.join(bad[:5])}", where=where)
    return whole


def _completed(recipe: Recipe) -> Recipe:
    """An older recipe with the values by which its picture was made."""
    if recipe["schema"] == SCHEMA:
        return recipe
    whole: Recipe = {**(ADDED_IN_2 if recipe["schema"] == 1 else {}), **recipe}
    parts: dict[str, Recipe] = {"loras": {"autov3": "", "tag": False}, "batch": {"template": ""}}
    filled: Recipe = {
        name: [{**added, **one} if isinstance(one, dict) else one for one in whole[name]]
        for name, added in parts.items()
        if isinstance(whole.get(name), list)
    }
    safety = "flagged" if recipe.get("flagged") is True else "none"
    return {**ADDED_IN_3, "safety": safety, **whole, **filled}


def _insane(recipe: Recipe) -> list[str]:
    """Parts of the right type whose value no picture of ours has."""
    batch, references = recipe["batch"], recipe["references"]
    alone = [recipe[name] for name in ("model", "unet", "vae") if recipe[name]]
    parts = [*alone, *recipe["loras"], *recipe["embeddings"]]
    pictures = [recipe[name] for name in ("init", "mask") if recipe[name]] + references
    beside = [recipe["model"].get(name) for name in ("lora", "rest")]
    sized = [recipe, *references, *([recipe["hires"]] if recipe["hires"] else [])]
    sane = {
        **{key: low <= recipe[key] <= high for key, (low, high) in RANGES.items()},
        "batch": len(batch) <= MAX_BATCH and all(_within(one, "seed", "index") for one in batch),
        "batch_position": 0 <= recipe["batch_position"] < max(1, len(batch)),
        "scheduler.name": _is_scheduler(recipe["scheduler"]["name"]),
        "strength": _sane_strength(recipe),
        "hires": recipe["hires"] is None or _sane_hires(recipe["hires"]),
        "mask": recipe["mask"] is None
        or (recipe["init"] is not None and 0 <= recipe["mask"]["blur_px"] <= MAX_BLUR_PX),
        "emphasis": recipe["emphasis"] in EMPHASES,
        "safety": recipe["safety"] in SAFETY,
        "format": recipe["format"] in FORMATS,
        "texts": all(
            len(one[key]) <= MAX_TEXT for one in (recipe, *batch) for key in ("prompt", "prefix", "negative")
        ),
        "files": all(_is_digest(digest) for part in parts for digest in part["files"].values()),
        "sha256": all(_is_digest(part["sha256"]) for part in (*parts, *pictures)),
        "size": all(one[side] % 8 == 0 for one in sized for side in ("width", "height")),
        "references": len(references) <= MAX_REFERENCES
        and all(_within(one, "width", "height") for one in references),
        "loras": len(recipe["loras"]) <= MAX_PARTS
        and all(
            math.isfinite(one["weight"]) and _is_digest(one["autov3"] or "0" * 64) for one in recipe["loras"]
        ),
        "embeddings": len(recipe["embeddings"]) <= MAX_PARTS,
        "model": all(p is None or (isinstance(p, dict) and not _misfits(p, _FILES)) for p in beside),
    }
    return [key for key, good in sane.items() if not good]


def _within(part: Recipe, *keys: str) -> bool:
    return all(RANGES[key][0] <= part[key] <= RANGES[key][1] for key in keys)


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _is_scheduler(name: str) -> bool:
    try:
        return bool(canonical(name)) or name == ""
    except SdlabError:
        return False


def _sane_strength(recipe: Recipe) -> bool:
    strength = recipe["strength"]
    if recipe["init"] is None or strength is None:
        return recipe["init"] is None and strength is None
    return leaves_a_step(recipe["steps"], strength)


def _sane_hires(hires: Recipe) -> bool:
    return _within(hires, "width", "height", "steps") and leaves_a_step(hires["steps"], hires["strength"])


def leaves_a_step(steps: int, strength: float) -> bool:
    """Whether so many steps at that strength are any at all."""
    return 0 < strength <= 1 and int(steps * strength) >= 1


def _misfits(table: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    def fits(value: Any, kinds: Any) -> bool:
        return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))

    return [key for key, kinds in shape.items() if key not in table or not fits(table[key], kinds)]
