"""Stable Diffusion 1.x and 2.x from one file, offline: its header, our configurations and CLIP's tokenizer.

Which configuration applies is told by the shapes in the file. A whole checkpoint has the original ("LDM")
names; a UNet alone may have those or diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import ldm, openclip
from sdlab.models.files import Header, Stored, read_weights
from sdlab.models.folder import SdParts, read_config, read_scheduler
from sdlab.models.index import read_index
from sdlab.models.ldm import Place
from sdlab.models.parts import Part, expected_of
from sdlab.models.prediction import Prediction, prediction_of, said, with_prediction
from sdlab.models.sniff import Found, inpainting, known_by_shape, look, recognise, unet_prefix
from sdlab.models.vae_file import squeezed

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
EMA_ROOT = ldm.EMA + "diffusion_model"
_ROOTS = {
    "vae": tuple(ldm.VAE + n for n in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")),
    "text_encoder": (
        *(
            ldm.CLIP + middle + n
            for middle in ("", "text_model.")
            for n in ("embeddings.", "encoder.", "final_layer_norm.")
        ),
        *(ldm.OPENCLIP + n for n in openclip.ROOTS),
    ),
}
_UNET_MODULES = (
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
)
_Candidates = Callable[[str], tuple[Place, ...]]


@dataclass(frozen=True)
class SdFile:
    """What of Stable Diffusion a file holds, each part as far as it is there; headers only."""

    base: str  # the known model of its shape
    folder: Path  # with the configurations of that one
    parts: dict[str, Part]
    scheduler: dict[str, Any]
    notes: tuple[str, ...]  # phrases about what was taken, and how we know


def read_single_file(path: Path, *, allow_pickle: bool = False) -> SdParts:
    """The parts of a model to draw with; headers only. Raises SdlabError naming what the file is or lacks.

    Where the VAE is missing, that part has no tensors: one from elsewhere has to take its place.
    """
    header = read_weights(path, allow_pickle=allow_pickle)
    what = recognise(header)
    if what == "flux2":
        raise SdlabError(
            "is a FLUX.2 transformer", where=str(path), next_step="Give a Stable Diffusion model"
        )
    if what != "checkpoint":
        raise unet_alone(path)
    file = read_sd(header, look(header))
    vae = file.parts.get("vae") or _empty("vae", file.folder, path)
    return SdParts(
        unet=file.parts["unet"],
        vae=vae,
        text_encoder=file.parts["text_encoder"],
        tokenizer=file.folder / "tokenizer",
        scheduler=file.scheduler,
        safety_checker=None,
        feature_extractor=None,
        folder=None,
    )


def unet_alone(path: Path) -> SdlabError:
    """The error for a UNet where a whole model is wanted."""
    what = "holds a UNet alone, no VAE and no text encoder"
    return SdlabError(what, where=str(path), next_step=f"Give it as --unet {path}")


def read_sd(header: Header, found: Found, *, ema: bool = False, prediction_type: str | None = None) -> SdFile:
    """What `found` says is in the file, with the moving averages for the UNet's weights where `ema` or nothing else is.

    `prediction_type` goes before what the file says. Raises SdlabError for another size, tensors without a place, and
    where there are no moving averages.
    """
    if ema and not any(name.startswith(EMA_ROOT) for name in header.tensors):
        raise SdlabError(
            "holds no moving averages (EMA)", where=str(header.path), next_step="Leave --ema away"
        )
    base, folder = known_by_shape(header)
    scheduler, prediction = _schedule(header, found, folder, prediction_type)
    parts = {name: _empty(name, folder, header.path) for name in found.parts}
    unet = {**parts["unet"].config, "in_channels": found.channels}
    if unet.get("sample_size") == 96 and prediction.kind == "epsilon":
        unet["sample_size"] = (
            64  # Stable Diffusion 2's epsilon models are made for 512 pixels, the others for 768
        )
    parts["unet"] = replace(parts["unet"], config=unet)
    filled = {name: _filled(part, header, ema=ema or found.ema_only) for name, part in parts.items()}
    return SdFile(base, folder, filled, scheduler, _notes(found, prediction, header.path))


def told(header: Header) -> tuple[str, tuple[str, ...]]:
    """The known model of the file's shape, and the notes `read_sd` makes; builds nothing."""
    base, folder = known_by_shape(header)
    found = look(header)
    return base, _notes(found, _schedule(header, found, folder)[1], header.path)


def _schedule(
    header: Header, found: Found, folder: Path, asked: str | None = None
) -> tuple[dict[str, Any], Prediction]:
    scheduler = read_scheduler(folder / "scheduler", read_index(folder)["scheduler"][1])
    is_openclip = openclip.is_openclip(read_config(folder / "text_encoder"))
    prediction = prediction_of(header, scheduler, openclip=is_openclip, channels=found.channels, asked=asked)
    return with_prediction(scheduler, prediction), prediction


def _notes(found: Found, prediction: Prediction, path: Path) -> tuple[str, ...]:
    ema = "its UNet from moving averages (EMA), as it holds no other" if found.ema_only else ""
    return tuple(filter(None, (ema, said(prediction, path) if len(found.parts) > 1 else "")))


def read_single_unet(path: Path, config: Mapping[str, Any], *, allow_pickle: bool = False) -> Part:
    """The UNet of a checkpoint, or alone in a file, in either naming; `config` is the base model's."""
    header = read_weights(path, allow_pickle=allow_pickle)
    found = look(header)
    if found.family == "flux2":
        raise SdlabError(
            "is a FLUX.2 transformer, no UNet", where=str(path), next_step="Give a Stable Diffusion UNet"
        )
    if "unet" not in found.parts:
        raise SdlabError(
            "is a VAE alone", where=str(path), next_step="Give it with --vae beside a whole model"
        )
    if found.channels != config.get("in_channels", 4):
        raise inpainting(str(path))
    return _filled(Part("unet", CLASSES["unet"], dict(config), {}, path), header, ema=found.ema_only)


def _empty(name: str, folder: Path, path: Path) -> Part:
    return Part(name, CLASSES[name], read_config(folder / name), {}, path)


def _filled(part: Part, header: Header, *, ema: bool) -> Part:
    """The part with its tensors, as many as the file has."""
    found: dict[str, Stored] = {}
    candidates = _candidates(part, header, ema=ema and part.name == "unet")
    for wanted, shape in expected_of(part).items():
        for place in candidates(wanted):
            stored = header.tensors.get(place.name)
            if stored is not None:
                found[wanted] = squeezed(ldm.taken(stored, place), shape)
                break
    _no_strangers(part, found, header, ema=ema)
    return replace(part, weights=found)


def _candidates(part: Part, header: Header, *, ema: bool) -> _Candidates:
    """The places a tensor of this part may have in this file."""
    if part.name == "unet":
        return _unet_candidates(part.config, header, ema=ema)
    if part.name == "vae":
        return lambda wanted: (ldm.place_of("vae", wanted, part.config),)
    return lambda wanted: (
        ldm.place_of("text_encoder", wanted, part.config),
        *(Place(ldm.CLIP + name) for name in ldm.clip_names(wanted)),
    )


def _unet_candidates(config: Mapping[str, Any], header: Header, *, ema: bool) -> _Candidates:
    if ema:
        return lambda wanted: (Place(ldm.ema_name(ldm.unet_name(wanted, config))),)
    prefix = unet_prefix(header.tensors.keys())
    assert prefix is not None  # look() has seen the UNet
    if f"{prefix}conv_in.weight" in header.tensors:
        return lambda wanted: (Place(prefix + wanted),)
    return lambda wanted: (Place(prefix + ldm.unet_name(wanted, config)),)


def _no_strangers(part: Part, found: Mapping[str, Stored], header: Header, *, ema: bool) -> None:
    """Raise SdlabError for tensors within the part that its configuration has no place for."""
    used = {stored.name for stored in found.values()}
    belongs = _belongs(part, header, ema=ema)
    strangers = [n for n in sorted(header.tensors) if n not in used and belongs(n)]
    if found and strangers:
        raise SdlabError(
            f"tensor {strangers[0]!r} has no place in the {part.name} of this kind of model",
            where=str(header.path),
        )


def _belongs(part: Part, header: Header, *, ema: bool) -> Callable[[str], bool]:
    """Whether a name is within the part. With no prefix at all, only names of UNet modules are of the UNet."""
    if part.name == "unet" and ema:
        return lambda name: name.startswith(EMA_ROOT)
    if part.name == "unet":
        prefix = unet_prefix(header.tensors.keys()) or ""
        return lambda name: name.startswith(prefix or _UNET_MODULES)
    num_layers = int(part.config.get("num_hidden_layers", 12))

    def within(name: str) -> bool:
        unread = name.endswith("position_ids") or openclip.is_last_layer(
            name.removeprefix(ldm.OPENCLIP), num_layers
        )
        return name.startswith(_ROOTS[part.name]) and not unread

    return within
