"""What the user wants in the result, and the networks made so: another VAE, LoRAs merged in, parts left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError
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
    pieces = read_pieces(path, allow_pickle=wanted.allow_pickle, ema=wanted.ema)
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
        from sdlab.convert.lora import merge

        networks = merge.merged(networks, wanted.loras, dtype=wanted.dtype)
    scheduler = pieces.scheduler
    if wanted.prediction_type is not None:
        if scheduler is None:
            raise SdlabError(
                "has no noise schedule", where=str(path), next_step="Leave out --prediction-type"
            )
        scheduler = {**scheduler, "prediction_type": wanted.prediction_type}
    return replace(pieces, networks=networks, scheduler=scheduler)


def _vae_at(path: Path, pieces: Pieces, *, allow_pickle: bool) -> Part:
    other = read_pieces(path, allow_pickle=allow_pickle)
    if other.family != pieces.family or "vae" not in other.networks:
        raise SdlabError("holds no VAE of this kind of model", where=str(path), next_step="Give another")
    return other.networks["vae"]
