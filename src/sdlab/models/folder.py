"""A Stable Diffusion pipeline folder, as diffusers saves it, read as data and checked part by part.

Only the classes listed here are accepted, every part lies in the folder of its own name, and nothing in the
folder is imported or run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import Stored, component_weights, read_json, regular_size
from sdlab.models.index import read_index
from sdlab.models.parts import Part, bounded

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DIFFUSERS_STEM, TRANSFORMERS_STEMS = ("diffusion_pytorch_model",), ("model", "pytorch_model")
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class SdParts:
    """All parts of a Stable Diffusion 1.x or 2.x model: configurations and places of tensors, no weights."""

    unet: Part
    vae: Part
    text_encoder: Part
    tokenizer: Path  # a folder with its files
    scheduler: dict[str, Any]  # as in scheduler_config.json
    safety_checker: Part | None
    feature_extractor: dict[str, Any] | None
    folder: Path | None  # the pipeline folder whose frozen parts can be copied as they are


def read_folder(folder: Path, *, allow_pickle: bool = False) -> SdParts:
    """The parts of a pipeline folder; headers only. Raises SdlabError naming the file at fault and why."""
    index = read_index(folder)
    checker, extractor = None, None
    if index.get("safety_checker", [None, None])[1] is not None:
        checker = _safety_checker(folder / "safety_checker", allow_pickle=allow_pickle)
        extractor = read_json(folder / "feature_extractor" / "preprocessor_config.json")
    tokenizer = folder / "tokenizer"
    check_tokenizer(tokenizer)
    return SdParts(
        unet=unet_part(folder / "unet", allow_pickle=allow_pickle),
        vae=vae_part(folder / "vae", allow_pickle=allow_pickle),
        text_encoder=text_part(folder / "text_encoder", allow_pickle=allow_pickle),
        tokenizer=tokenizer,
        scheduler=read_scheduler(folder / "scheduler", index["scheduler"][1]),
        safety_checker=checker,
        feature_extractor=extractor,
        folder=folder,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a part, its numbers within what real models have."""
    config = read_json(folder / "config.json")
    bounded({k: v for k, v in config.items() if not k.startswith("_")}, folder / "config.json")
    return config


def unet_part(folder: Path, *, allow_pickle: bool) -> Part:
    """The UNet in a `unet/` folder."""
    config = read_config(folder)
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise SdlabError(
            f"its class is {str(config['_class_name'])[:60]}, not UNet2DConditionModel", where=str(folder)
        )
    weights = component_weights(folder, DIFFUSERS_STEM, allow_pickle=allow_pickle)
    return Part("unet", "UNet2DConditionModel", config, weights, folder)


def vae_part(folder: Path, *, allow_pickle: bool) -> Part:
    """The VAE in a `vae/` folder."""
    weights = component_weights(folder, DIFFUSERS_STEM, allow_pickle=allow_pickle)
    return Part("vae", "AutoencoderKL", read_config(folder), _renamed(weights, vae_module_name), folder)


def text_part(folder: Path, *, allow_pickle: bool) -> Part:
    """The CLIP text encoder in a `text_encoder/` folder, of either spelling."""
    weights = component_weights(folder, TRANSFORMERS_STEMS, allow_pickle=allow_pickle)
    return Part("text_encoder", "CLIPTextModel", read_config(folder), clip_weights(weights), folder)


def vae_module_name(name: str) -> str:
    """The present name of a VAE tensor; older models (SD 1.5 itself) name the attention differently."""
    stem, _, leaf = name.rpartition(".")
    head, _, last = stem.rpartition(".")
    return (
        f"{head}.{_OLD_VAE_ATTENTION[last]}.{leaf}"
        if ".attentions." in head + "." and last in _OLD_VAE_ATTENTION
        else name
    )


def clip_weights(weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """Text encoder tensors as transformers names them today, from either spelling; no position numbers."""
    kept = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    return _renamed(kept, lambda name: name.removeprefix("text_model."))


def _safety_checker(folder: Path, *, allow_pickle: bool) -> Part:
    weights = component_weights(folder, TRANSFORMERS_STEMS, allow_pickle=allow_pickle)
    kept = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    named = _renamed(kept, lambda name: name.replace("vision_model.vision_model.", "vision_model.", 1))
    return Part(
        "safety_checker", "StableDiffusionSafetyChecker", read_json(folder / "config.json"), named, folder
    )


def _renamed(weights: Mapping[str, Stored], rename: Any) -> dict[str, Stored]:
    named = {rename(name): stored for name, stored in weights.items()}
    if len(named) != len(weights):
        first = next(iter(weights.values()))
        raise SdlabError("holds a tensor under two names", where=str(first.path))
    return named


def check_tokenizer(folder: Path) -> None:
    """Raise SdlabError unless the folder has a vocabulary of a sane size."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists() and path.suffix == ".json":
            read_json(path)
        elif path.exists() and regular_size(path) > 1 << 26:
            raise SdlabError("is too large for a tokenizer", where=str(path))
    complete = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not complete and not (folder / "tokenizer.json").is_file():
        raise SdlabError("has neither vocab.json and merges.txt nor tokenizer.json", where=str(folder))


def read_scheduler(folder: Path, class_name: str) -> dict[str, Any]:
    """The noise schedule, its numbers checked. Raises SdlabError for one that we cannot train."""
    path = folder / "scheduler_config.json"
    config = read_json(path)
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 2 <= steps <= 10_000:
        raise SdlabError(f"num_train_timesteps is {steps}, not 2 to 10000", where=str(path))
    trained = config.get("trained_betas")
    if trained is None:
        ends = [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)]
    elif isinstance(trained, list) and len(trained) == steps:
        ends = trained
    else:
        raise SdlabError(f"trained_betas is no list of {steps} numbers", where=str(path))
    if not all(isinstance(b, (int, float)) and math.isfinite(b) and 0 < b < 1 for b in ends):
        raise SdlabError("its betas are not between 0 and 1", where=str(path))
    if config.get("beta_schedule", "linear") not in _SCHEDULES:
        raise SdlabError(f"unknown beta_schedule {str(config['beta_schedule'])[:40]!r}", where=str(path))
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise SdlabError(
            f"prediction_type is {str(kind)[:40]!r}, not epsilon or v_prediction", where=str(path)
        )
    bounded({k: v for k, v in config.items() if not k.startswith("_") and k != "trained_betas"}, path)
    return {**config, "_class_name": class_name}


def with_unet(parts: SdParts, unet: Part, scheduler: dict[str, Any] | None) -> SdParts:
    """The same model around another UNet, and around its noise schedule where it brings one."""
    return replace(parts, unet=unet, scheduler=scheduler or parts.scheduler)
