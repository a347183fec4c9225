"""Recipes as pictures hold them."""

from __future__ import annotations

from typing import Any

MODEL_HASH = "0f1e2d3c4b5a" + "0" * 52
MODEL: dict[str, Any] = {
    "name": "harbour",
    "kind": "file",
    "asked": "harbour.safetensors",
    "family": "sd",
    "files": {"": MODEL_HASH},
    "sha256": MODEL_HASH,
}
SOURCE: dict[str, Any] = {
    "name": "pen",
    "kind": "file",
    "asked": "pen.safetensors",
    "files": {"": "2" * 64},
    "sha256": "2" * 64,
}
LORA: dict[str, Any] = {**SOURCE, "weight": -0.5, "autov3": "5f4e3d2c1b0a" + "1" * 52, "tag": False}
INIT: dict[str, Any] = {
    "name": "a.png",
    "asked": "a.png",
    "sha256": "0" * 64,
    "background": "white",
    "max_pixels": 64_000_000,
}
MASK: dict[str, Any] = {**INIT, "blur_px": 4}
REFERENCE: dict[str, Any] = {**INIT, "width": 64, "height": 80}
HIRES: dict[str, Any] = {"width": 1024, "height": 1536, "steps": 12, "strength": 0.35}
SHOT: dict[str, Any] = {
    "prompt": "red star",
    "prefix": "",
    "negative": "blurry",
    "template": "",
    "seed": 2**53 - 1,
    "index": 0,
}


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of this version. `prompt_sent` follows the prompt."""
    plain: dict[str, Any] = {
        "schema": 3,
        "kind": "txt2img",
        **SHOT,
        "prompt_sent": changes.get("prefix", "") + changes.get("prompt", SHOT["prompt"]),
        "steps": 24,
        "guidance": 6.5,
        "width": 512,
        "height": 768,
        "strength": None,
        "clip_skip": 1,
        "emphasis": "a1111",
        "hires": None,
        "long_prompts": True,
        "scheduler": {
            "name": "dpm++ 2m karras",
            "sampler": "DPM++ 2M Karras",
            "schedule_type": "Karras",
            "class": "DPMSolverMultistepScheduler",
            "config": {},
        },
        "model": MODEL,
        "unet": None,
        "vae": None,
        "loras": [],
        "embeddings": [],
        "init": None,
        "mask": None,
        "references": [],
        "batch": [],
        "batch_position": 0,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "compile": False,
        "vae_tiling": False,
        "exact": False,
        "safety": "none",
        "format": "png",
        "quality": 95,
        "versions": {"sdlab": "0.1.0"},
    }
    return {**plain, **changes}


ADDED_IN_3 = (
    "template",
    "clip_skip",
    "emphasis",
    "hires",
    "long_prompts",
    "embeddings",
    "mask",
    "compile",
    "vae_tiling",
    "safety",
    "format",
    "quality",
)


def old_recipe(schema: int = 2, **changes: Any) -> dict[str, Any]:
    """A recipe as version 1 or 2 wrote it."""
    left_out = {*ADDED_IN_3, *(("vae", "loras", "references") if schema == 1 else ())}
    whole = {**recipe(schema=schema), "flagged": False, **changes}
    return {name: value for name, value in whole.items() if name not in left_out}
