"""Saving a whole pipeline folder that any tool opens: the trained denoiser, and the frozen parts as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sdlab.models.base import Family
from sdlab.models.files import Stored, component_weights, read_json, write_safetensors
from sdlab.models.flux2 import Flux2
from sdlab.models.folder import TOKENIZER_FILES, TRANSFORMERS_STEMS
from sdlab.models.parts import Part
from sdlab.models.sd import StableDiffusion

TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja", ".model")


def save_pipeline(family: Family, denoiser: nn.Module, folder: Path) -> None:
    """Write a complete pipeline of diffusers into `folder`, which must be new or empty.

    The denoiser is saved in the dtype it has. Frozen parts keep their bytes. Files get the usual modes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _SAVERS[type(family)](family, denoiser, folder)


def _save_sd(family: StableDiffusion, denoiser: nn.Module, folder: Path) -> None:
    """The text encoder is written under names with ``text_model.``, which tools older than transformers 5.6 need."""
    parts = family.parts
    _save_module(denoiser, parts.unet, folder / "unet")
    _save_frozen(parts.vae, folder / "vae", "diffusion_pytorch_model", parts.folder)
    _save_frozen(parts.text_encoder, folder / "text_encoder", "model", parts.folder)
    if parts.safety_checker is not None:
        _save_frozen(parts.safety_checker, folder / "safety_checker", "model", parts.folder)
        write_json(folder / "feature_extractor" / "preprocessor_config.json", parts.feature_extractor or {})
    save_tokenizer(parts.tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
    scheduler = str(parts.scheduler["_class_name"])
    index = sd_index("StableDiffusionPipeline", scheduler, checked=parts.safety_checker is not None)
    write_json(folder / "model_index.json", index)


def _save_flux2(family: Flux2, denoiser: nn.Module, folder: Path) -> None:
    """The text encoder is copied whole, with the layers that FLUX.2 does not read."""
    parts = family.parts
    _save_module(denoiser, parts.transformer, folder / "transformer")
    _save_frozen(parts.vae, folder / "vae", "diffusion_pytorch_model", parts.folder)
    _copy_text_encoder(parts.text_encoder.where, folder / "text_encoder")
    copy_files(parts.tokenizer, folder / "tokenizer", TOKENIZER_SUFFIXES)
    write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
    source = read_json(parts.folder / "model_index.json")
    write_json(folder / "model_index.json", flux2_index(source, parts.is_distilled))


_SAVERS: dict[type[Any], Callable[[Any, nn.Module, Path], None]] = {
    StableDiffusion: _save_sd,
    Flux2: _save_flux2,
}


def flux2_index(source: Mapping[str, Any], is_distilled: bool | None) -> dict[str, Any]:
    """The model_index.json of a FLUX.2 model, made of that of the model it came from."""
    named = {
        name: ["transformers" if name in ("text_encoder", "tokenizer") else "diffusers", value[1]]
        for name, value in sorted(source.items())
        if isinstance(value, list)
    }
    says = source["_class_name"] == "Flux2KleinPipeline" and is_distilled is not None
    distilled = {"is_distilled": is_distilled} if says else {}
    return {"_class_name": source["_class_name"], **distilled, **named}


def _copy_text_encoder(source: Path, folder: Path) -> None:
    """All files of a text encoder under the names that every reader looks for first."""
    copy_files(source, folder, (".json",))
    weights = component_weights(source, TRANSFORMERS_STEMS, allow_pickle=True)  # allowed when it was opened
    files = sorted({stored.path for stored in weights.values()})
    if any(path.suffix != ".safetensors" for path in files):
        write_safetensors(folder / "model.safetensors", weights)
    for path in files if (folder / "model.safetensors.index.json").exists() else []:
        shutil.copyfile(path, folder / path.name)
    if not any(folder.glob("*.safetensors")):
        shutil.copyfile(files[0], folder / "model.safetensors")


def copy_files(source: Path, folder: Path, suffixes: tuple[str, ...], *, but: str = "") -> None:
    """Copy the files with these suffixes, less those whose name ends with `but`."""
    folder.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in suffixes and not (but and path.name.endswith(but)):
            shutil.copyfile(path, folder / path.name)


def sd_index(class_name: str, scheduler: str, *, checked: bool) -> dict[str, Any]:
    """The model_index.json of a Stable Diffusion model, with or without a safety checker."""
    return {
        "_class_name": class_name,
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if checked else [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": checked,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if checked else [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _save_module(module: nn.Module, part: Part, folder: Path) -> None:
    folder.mkdir()
    tensors = {name: Stored.of(name, t, folder) for name, t in module.state_dict().items()}
    assert set(tensors) == set(part.weights), (
        "the module given is not the denoiser of this model (wrapped or changed?)"
    )
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "config.json", {"_class_name": part.class_name, **_public(part.config)})


def _save_frozen(part: Part, folder: Path, stem: str, base: Path | None) -> None:
    """The part's own file where that can be copied, else its tensors under the names that others read."""
    target = folder / f"{stem}.safetensors"
    folder.mkdir()
    files = {stored.path for stored in part.weights.values()}
    names = {_public_name(part, name): stored for name, stored in part.weights.items()}
    as_they_are = part.where.is_dir() and all(name == stored.name for name, stored in names.items())
    if len(files) == 1 and as_they_are and next(iter(files)).suffix == ".safetensors":
        shutil.copyfile(next(iter(files)), target)
    else:
        write_safetensors(target, names)
    own = part.where if part.where.is_dir() else base / part.name if base is not None else None
    if own is not None:
        shutil.copyfile(own / "config.json", folder / "config.json")
    else:
        kind = (
            {"architectures": [part.class_name]}
            if part.name == "text_encoder"
            else {"_class_name": part.class_name}
        )
        write_json(folder / "config.json", {**kind, **_public(part.config)})


def _public_name(part: Part, name: str) -> str:
    """The name that other tools read: of a folder its own, of a single file that of diffusers."""
    if part.name == "text_encoder":
        return f"text_model.{name}"
    return part.weights[name].name if part.where.is_dir() else name


def save_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files; where only tokenizer.json exists, add the two that older tools read."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "vocab.json").exists():
        model = read_json(source / "tokenizer.json")["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        write_json(folder / "vocab.json", model["vocab"])
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="\n"
        )


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without keys such as _name_or_path, which tell where the model lay on someone's disk."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, its folder made where it is not there."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
