"""Stable Diffusion 1.x from one file, offline: its header, our configurations and CLIP's tokenizer.

Which configuration applies is told by the shapes in the file. A whole checkpoint has the original ("LDM")
names; a UNet alone may have those or diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import ldm
from sdlab.models.files import Header, Stored, read_weights
from sdlab.models.folder import SdParts, read_config, read_scheduler
from sdlab.models.index import read_index
from sdlab.models.parts import Part, build, expected
from sdlab.models.sniff import known_by_shape, recognise, unet_prefix
from sdlab.models.vae_file import squeezed

PREDICTION_KEY = "modelspec.prediction_type"
_ROOTS = {
    "unet": (ldm.UNET,),
    "vae": tuple(ldm.VAE + n for n in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")),
    "text_encoder": tuple(
        ldm.CLIP + middle + n
        for middle in ("", "text_model.")
        for n in ("embeddings.", "encoder.", "final_layer_norm.")
    ),
}


def read_single_file(path: Path, *, allow_pickle: bool = False) -> SdParts:
    """The parts of a whole checkpoint; headers only. Raises SdlabError naming what the file is or lacks."""
    header = read_weights(path, allow_pickle=allow_pickle)
    what = recognise(header)
    if what == "flux2":
        raise SdlabError(
            "is a FLUX.2 transformer", where=str(path), next_step="Give a Stable Diffusion model"
        )
    if what != "checkpoint":
        raise SdlabError(
            "holds a UNet alone, no VAE and no text encoder",
            where=str(path),
            next_step=f"Give it as --unet {path}",
        )
    _, folder = known_by_shape(header)
    index = read_index(folder)
    scheduler = read_scheduler(folder / "scheduler", index["scheduler"][1])
    parts = {
        name: _part(name, read_config(folder / name), header) for name in ("unet", "vae", "text_encoder")
    }
    return SdParts(
        **parts,
        tokenizer=folder / "tokenizer",
        scheduler=_prediction(header, scheduler),
        safety_checker=None,
        feature_extractor=None,
        folder=None,
    )


def read_single_unet(path: Path, config: Mapping[str, Any], *, allow_pickle: bool = False) -> Part:
    """The UNet of a checkpoint, or alone in a file, in either naming; `config` is the base model's."""
    header = read_weights(path, allow_pickle=allow_pickle)
    if recognise(header) == "flux2":
        raise SdlabError(
            "is a FLUX.2 transformer, no UNet", where=str(path), next_step="Give a Stable Diffusion UNet"
        )
    return _part("unet", dict(config), header)


def _part(name: str, config: dict[str, Any], header: Header) -> Part:
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    empty = Part(name, classes[name], config, {}, header.path)
    found: dict[str, Stored] = {}
    candidates = _candidates(name, config, header)
    for wanted, shape in expected(build(empty)).items():
        for candidate in candidates(wanted):
            stored = header.tensors.get(candidate)
            if stored is not None:
                found[wanted] = squeezed(stored, shape)
                break
    _no_strangers(name, found, header, candidates("conv_in.weight")[0] if name == "unet" else "")
    return replace(empty, weights=found)


def _candidates(name: str, config: Mapping[str, Any], header: Header) -> Callable[[str], tuple[str, ...]]:
    """The names a tensor of this part may have in this file."""
    if name == "vae":
        return lambda wanted: (ldm.VAE + ldm.vae_name(wanted, config),)
    if name == "text_encoder":
        return lambda wanted: tuple(ldm.CLIP + n for n in ldm.clip_names(wanted))
    prefix = unet_prefix(header.tensors.keys())
    assert prefix is not None  # recognise() has seen the UNet
    if f"{prefix}conv_in.weight" in header.tensors:
        return lambda wanted: (prefix + wanted,)
    return lambda wanted: (prefix + ldm.unet_name(wanted, config),)


def _no_strangers(name: str, found: Mapping[str, Stored], header: Header, first_name: str) -> None:
    """Raise SdlabError for tensors within the part that its configuration has no place for."""
    roots = _ROOTS[name]
    if name == "unet":
        roots = (first_name.removesuffix("input_blocks.0.0.weight").removesuffix("conv_in.weight"),)
    used = {stored.name for stored in found.values()}
    strangers = [
        n
        for n in sorted(header.tensors)
        if n.startswith(roots)
        and n not in used
        and not n.endswith("position_ids")
        and _of_part(name, roots, n)
    ]
    if found and strangers:
        raise SdlabError(
            f"tensor {strangers[0]!r} has no place in the {name} of this kind of model",
            where=str(header.path),
        )


def _of_part(name: str, roots: tuple[str, ...], tensor: str) -> bool:
    """With no prefix at all, only names of UNet modules count: such files may carry other things beside."""
    unet = ("input_blocks.", "middle_block.", "output_blocks.", "down_blocks.", "mid_block.", "up_blocks.")
    return name != "unet" or roots != ("",) or tensor.startswith(unet)


def _prediction(header: Header, scheduler: dict[str, Any]) -> dict[str, Any]:
    """The schedule with the prediction type the file itself states, where it states one."""
    words = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    stated = words.get(header.metadata.get(PREDICTION_KEY, "").lower())
    return {**scheduler, "prediction_type": stated} if stated else scheduler
