"""What the user wants in the result, and the networks made so: another VAE, LoRAs merged in, parts left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.models.bases import DISTILLED, known_configs, known_flux2_configs
from sdlab.models.folder import read_config
from sdlab.models.pieces import Pieces, read_pieces

if TYPE_CHECKING:
    from sdlab.models.parts import Part

WORDS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Wanted:
    """What the user asked to have in the result."""

    dtype: str | None = None  # F16, BF16 or F32; None keeps every tensor's own
    without: Collection[str] = ()  # of vae, text_encoder
    only: str | None = None  # unet, vae or transformer
    ema: bool = False
    comfyui: bool = False  # the prefix before a FLUX.2 transformer's names
    prediction_type: str | None = None
    loras: Sequence[tuple[Path, float]] = ()
    vae: Path | None = None
    allow_pickle: bool = False


def gathered(path: Path, wanted: Wanted) -> Pieces:
    """The networks at `path` as they are wanted: with another VAE, LoRAs merged in, parts left out."""
    pieces = read_pieces(
        path,
        allow_pickle=wanted.allow_pickle,
        ema=wanted.ema,
        prediction_type=wanted.prediction_type,
    )
    networks = dict(pieces.networks)
    if wanted.vae is not None:
        networks["vae"] = _vae_at(wanted.vae, pieces, allow_pickle=wanted.allow_pickle)
    if wanted.only is not None:
        if wanted.only not in networks:
            raise SdlabError(
                f"holds no {wanted.only}", where=str(path), next_step=f"It has {', '.join(networks)}"
            )
        networks = {wanted.only: networks[wanted.only]}
    networks = {name: part for name, part in networks.items() if name not in wanted.without}
    if not networks:
        raise SdlabError("nothing is left to write", where=str(path), next_step="Leave out fewer parts")
    if wanted.loras:
        _check_for_loras(networks, path)
        from sdlab.convert.lora import merge

        networks = merge.merged(networks, wanted.loras, dtype=wanted.dtype)
    return replace(pieces, networks=networks)


def _check_for_loras(networks: Collection[str], path: Path) -> None:
    if not {"unet", "transformer", "text_encoder"} & set(networks):
        what = "nothing that a LoRA changes is to be written: no UNet, transformer or text encoder"
        raise SdlabError(what, where=str(path), next_step="Leave out --lora, or write the whole model")


def _vae_at(path: Path, pieces: Pieces, *, allow_pickle: bool) -> Part:
    if not path.exists():
        raise SdlabError(
            "there is no such file or folder, and --with-vae takes no names of models",
            where=str(path),
            next_step="Give the path of a VAE, or of a model that has one",
        )
    other = read_pieces(path, allow_pickle=allow_pickle)
    if other.family != pieces.family or "vae" not in other.networks:
        raise SdlabError("holds no VAE of this kind of model", where=str(path), next_step="Give another")
    vae = other.networks["vae"]
    wanted, found = _own_vae(pieces), _form(vae.class_name, vae.config)
    if wanted is not None and found != wanted:
        raise SdlabError(
            f"is {_in_words(found)}; this model's is {_in_words(wanted)}",
            where=str(path),
            next_step="Give one of the same form",
        )
    return vae


_Form = tuple[str, tuple[int, ...], int]  # class, channels of its blocks, latent channels


def _own_vae(pieces: Pieces) -> _Form | None:
    """The form of the VAE that the model has, or that the known model of its shape has; None where neither is there."""
    own = pieces.networks.get("vae")
    if own is not None:
        return _form(own.class_name, own.config)
    base = pieces.base.replace("klein", "klein-base") if pieces.base in DISTILLED else pieces.base
    folder = {**known_configs(), **known_flux2_configs()}.get(base)
    if folder is None:
        return None
    class_name = "AutoencoderKL" if pieces.family == "sd" else "AutoencoderKLFlux2"
    return _form(class_name, read_config(folder / "vae"))


def _form(class_name: str, config: Mapping[str, Any]) -> _Form:
    latent = config.get(
        "latent_channels", 4 if class_name == "AutoencoderKL" else 32
    )  # as the class fills in
    return class_name, tuple(config.get("block_out_channels", ())), latent


def _in_words(form: _Form) -> str:
    class_name, channels, latent = form
    return f"an {class_name} of {'-'.join(map(str, channels))} channels with {latent} latent ones"
