"""The networks that a path holds: a whole model or some of its parts, in any layout. Headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import flux2_folder, folder
from sdlab.models.bases import base_of, flux2_base_of, known_flux2_configs, safe_name
from sdlab.models.files import Header, component_weights, read_json, read_weights
from sdlab.models.flux2_file import transformer_in
from sdlab.models.flux2_folder import KINDS, Flux2Parts, read_flux2_folder
from sdlab.models.folder import SdParts, read_folder
from sdlab.models.index import layout_of
from sdlab.models.openclip import is_openclip
from sdlab.models.parts import Part, check_tensors
from sdlab.models.prediction import ASKED, Prediction, said, with_prediction
from sdlab.models.runs import vae_run
from sdlab.models.single_file import read_sd
from sdlab.models.sniff import (
    INPAINTING,
    Found,
    known_flux2_by_shape,
    known_vae_by_shape,
    look,
    states_distilled,
)
from sdlab.models.vae_file import vae_in

SHARDS = ".safetensors.index.json"
_NAMES = ("unet", "transformer", "vae", "text_encoder", "safety_checker")


@dataclass(frozen=True)
class Pieces:
    """What was found; every network has been compared with its configuration, name by name and shape by shape."""

    family: str  # sd or flux2
    kind: str  # sd1, sd2, flux2-klein or flux2-dev; of a VAE alone, which tells no more, sd1 or flux2-klein
    base: str  # known model of that shape (sd15, sd21, mini-sd, flux2-klein-base-4b, ...), else a name fit for a folder
    networks: Mapping[
        str, Part
    ]  # of unet, transformer, vae, text_encoder, safety_checker those that are there
    scheduler: dict[str, Any] | None  # with what is predicted; None for a part alone
    tokenizer: Path | None  # a folder with its files
    feature_extractor: dict[str, Any] | None
    is_distilled: bool | None  # None where it is not said, or makes no difference
    layout: str  # folder (a pipeline's), part (the folder of one part) or file
    path: Path  # what was read
    metadata: Mapping[str, str]  # of a file's own header
    notes: tuple[str, ...] = ()  # phrases about what was taken for what, and why
    left_out: tuple[str, ...] = ()  # names of tensors in the file that are no part of the model, sorted

    @property
    def is_inpainting(self) -> bool:
        """Does its UNet read a mask and a masked picture beside the latents?"""
        unet = self.networks.get("unet")
        return unet is not None and unet.config.get("in_channels") == INPAINTING


def read_pieces(
    path: Path, *, allow_pickle: bool = False, ema: bool = False, prediction_type: str | None = None
) -> Pieces:
    """The networks in a pipeline folder, the folder of a part, shards with their index, or a single file.

    `ema`: of a single file the moving averages instead of the UNet's own weights. `prediction_type` (epsilon or
    v_prediction): what the UNet predicts, whatever the model says. Raises SdlabError, in one line, for everything
    else, and for networks with tensors missing, unknown or of another shape.
    """
    pieces = _read(path, allow_pickle=allow_pickle, ema=ema, prediction_type=prediction_type)
    if prediction_type is not None:
        pieces = _predicting(pieces, prediction_type)
    if ema and pieces.layout != "file":
        raise SdlabError(
            "is a folder; moving averages (EMA) are read from single files",
            where=str(path),
            next_step="Leave --ema away",
        )
    for part in pieces.networks.values():
        check_tensors(part)
    return pieces


def _predicting(pieces: Pieces, asked: str) -> Pieces:
    """The pieces with `asked` in their schedule, and a note of it where the reading of a file has made none yet."""
    if pieces.family != "sd" or pieces.scheduler is None:
        raise SdlabError(
            "has no noise schedule that says what is predicted",
            where=str(pieces.path),
            next_step="Leave out --prediction-type",
        )
    prediction = Prediction(asked, told_by=ASKED)
    notes = dict.fromkeys((*pieces.notes, said(prediction, pieces.path)))
    return replace(pieces, scheduler=with_prediction(pieces.scheduler, prediction), notes=tuple(notes))


def _read(path: Path, *, allow_pickle: bool, ema: bool, prediction_type: str | None) -> Pieces:
    if path.is_dir() and (path / "model_index.json").is_file():
        return _pipeline(path, allow_pickle=allow_pickle)
    if path.is_dir() and (path / "config.json").is_file():
        return _part_folder(path, allow_pickle=allow_pickle)
    if path.is_dir() and vae_run(str(path)) is not None:
        return _part_folder(path / "vae", allow_pickle=allow_pickle)
    header = _shards(path, allow_pickle=allow_pickle) or read_weights(path, allow_pickle=allow_pickle)
    return _file(header, look(header), ema=ema, prediction_type=prediction_type)


def _shards(path: Path, *, allow_pickle: bool) -> Header | None:
    """The shards of a folder, or behind an index, as one table; None for a single file."""
    if not path.is_dir() and not path.name.endswith(SHARDS):
        return None
    found = sorted(path.glob(f"*{SHARDS}")) if path.is_dir() else [path]
    if len(found) != 1:
        files = sorted(p.name for p in path.glob("*.safetensors"))[:3]
        what = f"there are {len(found)} indexes of shards in it" if found else "holds no model"
        way_on = f"Did you mean {path / files[0]}?" if files else "Give a model's folder or a single file"
        raise SdlabError(what, where=str(path), next_step=way_on)
    stem = found[0].name.removesuffix(SHARDS)
    tensors = component_weights(found[0].parent, (stem,), allow_pickle=allow_pickle)
    return Header(path, dict(tensors), {})


def _pipeline(path: Path, *, allow_pickle: bool) -> Pieces:
    if layout_of(path).family == "flux2":
        return _flux2_pipeline(path, read_flux2_folder(path, allow_pickle=allow_pickle))
    parts = read_folder(path, allow_pickle=allow_pickle)
    networks = _networks(parts)
    return Pieces(
        family="sd",
        kind=_sd_kind(networks),
        base=_sd_base(networks, _name(path)),
        networks=networks,
        scheduler=parts.scheduler,
        tokenizer=parts.tokenizer,
        feature_extractor=parts.feature_extractor,
        is_distilled=None,
        layout="folder",
        path=path,
        metadata={},
    )


def _flux2_pipeline(path: Path, parts: Flux2Parts) -> Pieces:
    return Pieces(
        family="flux2",
        kind=f"flux2-{parts.kind}",
        base=flux2_base_of(parts.transformer.config, parts.is_distilled, _name(path)),
        networks=_networks(parts),
        scheduler=parts.scheduler,
        tokenizer=parts.tokenizer,
        feature_extractor=None,
        is_distilled=parts.is_distilled if parts.kind == "klein" else None,
        layout="folder",
        path=path,
        metadata={},
    )


def _networks(parts: SdParts | Flux2Parts) -> dict[str, Part]:
    found = ((name, getattr(parts, name, None)) for name in _NAMES)
    return {name: part for name, part in found if part is not None}


def _part_folder(path: Path, *, allow_pickle: bool) -> Pieces:
    """One network with its config.json, as the folders in a pipeline are."""
    part = _read_part(path, allow_pickle=allow_pickle)
    is_flux2 = part.class_name in (
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
        "Qwen3Model",
        "MistralModel",
    )
    is_dev = part.class_name == "MistralModel" or part.config.get("guidance_embeds", False) is True
    networks, name = {part.name: part}, _name(path)
    return Pieces(
        family="flux2" if is_flux2 else "sd",
        kind=("flux2-dev" if is_dev else "flux2-klein") if is_flux2 else _sd_kind(networks),
        base=flux2_base_of(part.config, False, name) if is_flux2 else _sd_base(networks, name),
        networks=networks,
        scheduler=None,
        tokenizer=None,
        feature_extractor=None,
        is_distilled=None,
        layout="part",
        path=path,
        metadata={},
    )


def _read_part(path: Path, *, allow_pickle: bool) -> Part:
    config = read_json(path / "config.json")
    kinds = [
        kind for kind in KINDS.values() if kind.text_class == _TEXT_MODELS.get(str(config.get("model_type")))
    ]
    if kinds:
        return flux2_folder.text_part(path, kinds[0], allow_pickle=allow_pickle)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    read = _READERS.get(str(config.get("_class_name") or first))
    if read is None:
        what = f"is a {str(config.get('_class_name') or first)[:60]}, which is no part that sdlab reads"
        raise SdlabError(
            what, where=str(path), next_step="Give the folder of a UNet, transformer, VAE or text encoder"
        )
    return read(path, allow_pickle=allow_pickle)


_READERS = {
    "UNet2DConditionModel": folder.unet_part,
    "AutoencoderKL": folder.vae_part,
    "CLIPTextModel": folder.text_part,
    "Flux2Transformer2DModel": flux2_folder.transformer_part,
    "AutoencoderKLFlux2": flux2_folder.vae_part,
}
_TEXT_MODELS = {"qwen3": "Qwen3Model", "mistral": "MistralModel", "mistral3": "MistralModel"}


def _file(header: Header, found: Found, *, ema: bool, prediction_type: str | None) -> Pieces:
    if ema and "unet" not in found.parts:
        what = "holds no moving averages (EMA)"
        raise SdlabError(what, where=str(header.path), next_step="Leave --ema away")
    if found.parts == ("vae",):
        pieces = _vae_file(header, found.family)
    elif found.family == "flux2":
        pieces = _flux2_file(header)
    else:
        pieces = _sd_file(header, found, ema=ema, prediction_type=prediction_type)
    used = {stored.name for part in pieces.networks.values() for stored in part.weights.values()}
    return replace(pieces, left_out=tuple(sorted(set(header.tensors) - used)))


def _sd_file(header: Header, found: Found, *, ema: bool, prediction_type: str | None) -> Pieces:
    file = read_sd(header, found, ema=ema, prediction_type=prediction_type)
    alone = len(file.parts) == 1
    return Pieces(
        family="sd",
        kind=_sd_kind(file.parts),
        base=file.base,
        networks=file.parts,
        scheduler=None if alone else file.scheduler,
        tokenizer=file.folder / "tokenizer" if "text_encoder" in file.parts else None,
        feature_extractor=None,
        is_distilled=None,
        layout="file",
        path=header.path,
        metadata=header.metadata,
        notes=file.notes,
    )


def _flux2_file(header: Header) -> Pieces:
    base = known_flux2_by_shape(header)
    config = folder.read_config(known_flux2_configs()[base] / "transformer")
    stated = states_distilled(header)
    is_dev = config.get("guidance_embeds", False) is True
    return Pieces(
        family="flux2",
        kind="flux2-dev" if is_dev else "flux2-klein",
        base=base.replace("-base", "") if stated else base,
        networks={"transformer": transformer_in(header, config)},
        scheduler=None,
        tokenizer=None,
        feature_extractor=None,
        is_distilled=None if is_dev else stated,
        layout="file",
        path=header.path,
        metadata=header.metadata,
    )


def _vae_file(header: Header, family: str) -> Pieces:
    base, known = known_vae_by_shape(header, family)
    config = folder.read_config(known / "vae")
    class_name = "AutoencoderKL" if family == "sd" else "AutoencoderKLFlux2"
    part = vae_in(header, Part("vae", class_name, config, {}, header.path))
    return Pieces(
        family=family,
        kind="sd1" if family == "sd" else "flux2-klein",
        base=base,
        networks={"vae": part},
        scheduler=None,
        tokenizer=None,
        feature_extractor=None,
        is_distilled=None,
        layout="file",
        path=header.path,
        metadata=header.metadata,
    )


def _sd_kind(networks: Mapping[str, Part]) -> str:
    text, unet = networks.get("text_encoder"), networks.get("unet")
    if text is not None:
        return "sd2" if is_openclip(text.config) else "sd1"
    is_second = unet is not None and unet.config.get("use_linear_projection", False) is True
    return "sd2" if is_second else "sd1"


def _sd_base(networks: Mapping[str, Part], name: str) -> str:
    """The known model of the UNet's shape, whether or not it is one for inpainting; else `name`."""
    unet = networks.get("unet")
    if unet is None:
        return name
    channels = unet.config.get("in_channels", 4)
    return base_of({**unet.config, "in_channels": 4 if channels == INPAINTING else channels}, name)


def _name(path: Path) -> str:
    """A model's own name: that of its folder, or of the one above where it is a part's."""
    whole = path.resolve()
    return safe_name(whole.parent.name if whole.name in _NAMES else whole.name)
