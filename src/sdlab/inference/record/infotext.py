"""The line that other programs read: A1111's `parameters`, which ComfyUI, Civitai and others take too.

Their readers are simple, so its rules matter; tests/inference/record/readers.py holds what they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_TAG_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_SETTINGS_LINE = re.compile(r"^(?=Steps:)", re.MULTILINE)
_LORA_TAG = re.compile(r"<(?=lora:)", re.IGNORECASE)
_RESERVED = ("steps", "sampler", "seed", "size", "model", "version", "ensd")  # keys that readers look for


def parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe as an A1111 infotext: prompt, negative prompt and one line of settings.

    The negative line is always there (ComfyUI reads nothing without it), so is the prompt's, even empty. What would
    be taken for something else gets a space that CLIP does not see: a line that starts with ``Steps:`` in front,
    ``Negative prompt:`` and ``<lora:`` within. Names lose the marks that separate fields. Only the tables of hashes
    are quoted. Each LoRA is a ``<lora:name:weight>`` behind the prompt, where A1111 wants it.
    """
    loras = _loras(recipe)
    tags = [f"<lora:{name}:{_number(weight)}>" for name, weight, _ in loras]
    prompt = " ".join(part for part in (_guarded(recipe["prompt_sent"]), *tags) if part)
    pairs = [*_how(recipe), *_with_what(recipe), *_hashes(recipe, loras)]
    pairs += [("RNG", "CPU"), ("Version", f"sdlab {recipe['versions']['sdlab']}")]
    settings = ", ".join(f"{key}: {value}" for key, value in pairs)
    return f"{prompt}\nNegative prompt: {_guarded(recipe['negative'])}\n{settings}"


def _how(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Steps, sampler, size and all that is set by a number."""
    scheduler, hires = recipe["scheduler"], recipe["hires"]
    strength = recipe["strength"] if hires is None else hires["strength"]
    mask, reads_clip = recipe["mask"], recipe["model"]["family"] == "sd"
    pairs: list[tuple[str, Any]] = [
        ("Steps", recipe["steps"]),
        ("Sampler", scheduler["sampler"]),
        ("Schedule type", scheduler["schedule_type"] or None),
        ("CFG scale", _number(recipe["guidance"])),
        ("Seed", recipe["seed"]),
        ("Size", f"{recipe['width']}x{recipe['height']}"),
        ("Denoising strength", None if strength is None else _number(strength)),
        ("Mask blur", mask and mask["blur_px"]),
        ("Clip skip", recipe["clip_skip"] if reads_clip and recipe["clip_skip"] > 1 else None),
        ("Emphasis", {"none": "None", "comfy": "Comfy"}.get(recipe["emphasis"]) if reads_clip else None),
    ]
    if hires is not None:
        pairs += [
            ("Hires upscale", _number(hires["width"] / recipe["width"])),
            ("Hires steps", hires["steps"]),
            ("Hires upscaler", "Lanczos"),
        ]
    return [(key, value) for key, value in pairs if value is not None]


def _with_what(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Model and VAE; the hashes that Civitai knows are those of single files, so no other is written."""
    model, unet, vae = recipe["model"], recipe["unet"], recipe["vae"]
    pairs = []
    if unet is None and _is_one_file(model):
        pairs.append(("Model hash", model["sha256"][:10]))
    pairs.append(("Model", _field(model["name"] if unet is None else f"{model['name']} with {unet['name']}")))
    if vae is not None and _is_one_file(vae):
        pairs.append(("VAE hash", vae["sha256"][:10]))
    if vae is not None:
        pairs.append(("VAE", _field(vae["name"])))
    return pairs


def _is_one_file(part: Mapping[str, Any]) -> bool:
    return list(part["files"]) == [""]


def _loras(recipe: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(name, weight, hash) of every LoRA, that of the run first; one that was added twice stands there once."""
    own = recipe["model"].get("lora")
    files: dict[str, tuple[str, float, str]] = {}
    for one in [{**own, "weight": 1.0}] if own else []:
        files[one["sha256"]] = (one["name"], one["weight"], one.get("autov3", ""))
    for one in recipe["loras"]:
        before = files.get(one["sha256"], (one["name"], 0.0, ""))
        files[one["sha256"]] = (before[0], before[1] + one["weight"], one["autov3"])
    names = _unique(name for name, _, _ in files.values())
    return [(name, weight, digest) for name, (_, weight, digest) in zip(names, files.values(), strict=True)]


def _hashes(recipe: Mapping[str, Any], loras: list[tuple[str, float, str]]) -> list[tuple[str, str]]:
    texts = f"{recipe['prompt_sent']}\n{recipe['negative']}".casefold()
    named = [one for one in recipe["embeddings"] if one["name"].casefold() in texts]
    tables = {
        "Lora hashes": [(name, digest) for name, _, digest in loras if digest],
        "TI hashes": list(
            zip(_unique(one["name"] for one in named), (o["sha256"] for o in named), strict=True)
        ),
    }
    return [
        (key, '"' + ", ".join(f"{name}: {digest[:12]}" for name, digest in table) + '"')
        for key, table in tables.items()
        if table
    ]


def _unique(names: Iterable[str]) -> list[str]:
    """The names with only letters, digits, _ . and -, no two alike in any case, none a key of the line."""
    found: list[str] = []
    taken = set(_RESERVED)
    for name in names:
        plain = _TAG_NAME.sub("_", name).strip("_") or "unnamed"
        free, number = plain, 2
        while free.lower() in taken:
            free, number = f"{plain}-{number}", number + 1
        taken.add(free.lower())
        found.append(free)
    return found


def _number(value: float) -> str:
    return f"{value:.10g}"


def _field(text: str) -> str:
    """A name without what separates fields: Civitai reads anything quoted as a table of its own."""
    return (
        " ".join("".join(" " if c in ',:"{}' or not c.isprintable() else c for c in text).split())
        or "unnamed"
    )


def _guarded(text: str) -> str:
    """The text without control characters and halves of characters, and with nothing that readers stumble over."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c if c >= " " or c in "\n\t" else " " for c in text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = text.replace("Negative prompt:", "Negative prompt :")
    return _LORA_TAG.sub("< ", _SETTINGS_LINE.sub(" ", text))
