"""The table of contents of a diffusers folder: which parts it has, and of which classes. No heavy imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import read_json

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil"),
    "image_encoder": (),
}
REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


def read_index(folder: Path) -> dict[str, Any]:
    """The checked model_index.json of a Stable Diffusion folder; SdlabError for another class or part."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise SdlabError(
            "there is no model_index.json, so this is no diffusers model",
            where=str(folder),
            next_step=_instead(folder),
        )
    index = read_json(path)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise SdlabError(
            f"is a {_pipeline_word(name)}", where=str(folder), next_step="Give a Stable Diffusion 1.x model"
        )
    parts = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, (list, tuple))}
    for part, value in parts.items():
        if part not in CLASSES:
            raise SdlabError(f"names an unknown part {part[:60]!r}", where=str(path))
        if len(value) != 2 or (value != [None, None] and value[1] not in CLASSES[part]):
            raise SdlabError(
                f"its {part} is of a class sdlab does not load: {str(value)[:80]}", where=str(path)
            )
    for part in REQUIRED:
        if parts.get(part, [None, None])[1] is None:
            raise SdlabError(f"it names no {part}", where=str(path), next_step="Copy the model again")
        if not (folder / part).is_dir():
            raise SdlabError(
                f"the folder {part}/ is missing", where=str(folder), next_step="Copy the model again"
            )
    return index


def _pipeline_word(name: Any) -> str:
    word = str(name)[:60]
    if word.startswith("Flux2"):
        return f"FLUX.2 model ({word}), which sdlab does not load yet"
    return f"{word}, which sdlab does not load" if name else "model of no class"


def _instead(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "A unet/ folder goes to --unet; --load-model takes the folder above it"
    inside = sorted(p.parent.name for p in folder.glob("*/model_index.json"))[:3]
    files = sorted(p.name for p in folder.glob("*.safetensors"))[:3]
    if inside or files:
        return f"Did you mean {folder / (inside or files)[0]}?"
    return "Give a folder with model_index.json, a .safetensors file or a name"
