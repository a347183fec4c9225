"""The table of contents of a diffusers folder: which parts it has, and of which classes. No heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import read_json, readable

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


@dataclass(frozen=True)
class Layout:
    """What a pipeline folder of one kind consists of."""

    family: str  # which file of models/ loads it: sd or flux2
    classes: Mapping[str, tuple[str, ...]]  # part -> the classes we load; () for parts that we leave out
    required: tuple[str, ...]
    networks: tuple[str, ...]  # the required parts that have weights


SD = Layout(
    "sd",
    {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "scheduler": SCHEDULERS,
        "safety_checker": ("StableDiffusionSafetyChecker",),
        "feature_extractor": ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil"),
        "image_encoder": (),
    },
    ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    ("unet", "vae", "text_encoder"),
)


def _flux2(text_encoder: str, *tokenizers: str) -> Layout:
    networks = {"transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",)}
    return Layout(
        "flux2",
        {
            **networks,
            "text_encoder": (text_encoder,),
            "tokenizer": tokenizers,
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
        ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
        ("transformer", "vae", "text_encoder"),
    )


_KLEIN = _flux2("Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_DEV = _flux2(
    "Mistral3ForConditionalGeneration",
    "PixtralProcessor",
    "TokenizersBackend",  # what transformers 5 calls a tokenizer.json
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
)
LAYOUTS = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "Flux2KleinPipeline": _KLEIN,
    "Flux2Pipeline": _DEV,
}
LIBRARIES = {  # of which each part's class is; diffusers takes anything else for a file of code to import
    **dict.fromkeys(("unet", "transformer", "vae", "scheduler"), ("diffusers",)),
    **dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "image_encoder"), ("transformers",)),
    "safety_checker": ("stable_diffusion",),  # a folder of diffusers' own
}
LOADS = "Give a Stable Diffusion 1.x, 2.x or FLUX.2 model"


def read_index(folder: Path) -> dict[str, Any]:
    """The checked model_index.json of a folder we load; SdlabError for another class or part."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise SdlabError(
            "there is no model_index.json, so this is no diffusers model",
            where=str(folder),
            next_step=_instead(folder),
        )
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise SdlabError(f"is a {_pipeline_word(name)}", where=str(folder), next_step=LOADS)
    layout = LAYOUTS[name]
    parts = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, (list, dict, str))}
    for part, value in parts.items():
        _check_class(part, value, layout, path)
    for part in layout.required:
        if parts.get(part, [None, None])[1] is None:
            raise SdlabError(f"it names no {part}", where=str(path), next_step="Copy the model again")
        if not (folder / part).is_dir():
            raise SdlabError(
                f"the folder {part}/ is missing", where=str(folder), next_step="Copy the model again"
            )
    return index


def _check_class(part: str, value: Any, layout: Layout, path: Path) -> None:
    """Raise SdlabError unless `value` is [library, class] of a class that we load for `part`, or [null, null]."""
    if part not in layout.classes:
        raise SdlabError(f"names an unknown part {part[:60]!r}", where=str(path))
    if value == [None, None]:
        return
    known = isinstance(value, list) and len(value) == 2 and value[1] in layout.classes[part]
    if not known or value[0] not in LIBRARIES[part]:
        raise SdlabError(f"its {part} is of a class sdlab does not load: {_said(value)}", where=str(path))


def _said(value: Any) -> str:
    """A foreign value for a message: library.class where it is that, the start of it where it is anything else."""
    plain = isinstance(value, list) and all(isinstance(word, str) for word in value)
    return ascii(".".join(value) if plain else str(value)[:80])[:80]


def layout_of(folder: Path) -> Layout:
    """What the folder consists of. Raises SdlabError as `read_index` does."""
    return LAYOUTS[read_index(folder)["_class_name"]]


def _pipeline_word(name: Any) -> str:
    if not name:
        return "model of no class"
    word = readable(str(name), most=60)
    if word.startswith("Flux2"):
        return f"{word}, a kind of FLUX.2 model which sdlab does not load"
    return f"{word}, which sdlab does not load"


def _instead(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "A unet/ or transformer/ folder goes to --unet; --load-model takes the folder above it"
    inside = sorted(p.parent.name for p in folder.glob("*/model_index.json"))[:3]
    files = sorted(p.name for p in folder.glob("*.safetensors"))[:3]
    if inside or files:
        return f"Did you mean {folder / (inside or files)[0]}?"
    return "Give a folder with model_index.json, a .safetensors file or a name"
