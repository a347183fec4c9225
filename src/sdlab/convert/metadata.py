"""What the header of a written file says of the model: the fields of Stability AI's model metadata (``modelspec.*``).

See https://github.com/Stability-AI/ModelSpec. Nothing in it depends on the day or the computer: the same model gives
the same bytes. stream.py adds the hash of all that went in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdlab import __version__
from sdlab.convert.stream import SOURCE_HASH
from sdlab.models.prediction import PREDICTION_KEY, ZERO_SNR_KEY
from sdlab.models.sniff import ARCHITECTURE_KEY, architecture_of

if TYPE_CHECKING:
    from sdlab.models.pieces import Pieces

SPEC, TITLE = "modelspec.sai_model_spec", "modelspec.title"
_IMPLEMENTATIONS = {
    "sd": "https://github.com/Stability-AI/generative-models",
    "flux2": "https://github.com/black-forest-labs/flux2",
}
VERSION = "sdlab.version"
_STALE = (  # of other bytes than those that are written
    *(SOURCE_HASH, "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"),
    *("lora_adapter_metadata", "format"),
)


def of_model(pieces: Pieces, *, title: str, merged: Sequence[str]) -> dict[str, str]:
    """The fields for a model or a part of one: what its own file said, brought up to date."""
    said = {
        SPEC: "1.0.0",
        ARCHITECTURE_KEY: _architecture(pieces),
        "modelspec.implementation": _IMPLEMENTATIONS[pieces.family],
        TITLE: title,
        **_drawing(pieces),
        **({"modelspec.merged_from": ", ".join(merged)} if merged else {}),
    }
    own = _kept(pieces.metadata)
    if "unet" not in pieces.networks:  # nothing else predicts
        own = {key: value for key, value in own.items() if key not in (PREDICTION_KEY, ZERO_SNR_KEY)}
    return {**own, **said, VERSION: __version__}


def of_lora(kind: str, own: Mapping[str, str], *, title: str) -> dict[str, str]:
    """The fields for a LoRA of a model of `kind`; what training wrote into its file stays."""
    family = "flux2" if kind.startswith("flux2") else "sd"
    said = {
        SPEC: "1.0.0",
        ARCHITECTURE_KEY: f"{_LORA_ARCHITECTURES.get(kind) or architecture_of(kind)}/lora",
        "modelspec.implementation": _IMPLEMENTATIONS[family],
        TITLE: title,
    }
    return {**said, **_kept(own), VERSION: __version__}


def _kept(own: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in own.items() if key not in _STALE}


_LORA_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2"}


def _architecture(pieces: Pieces) -> str:
    if set(pieces.networks) == {"vae"}:  # the same for all models of the family
        return "flux-2/vae" if pieces.family == "flux2" else "stable-diffusion-v1/vae"
    if pieces.family == "flux2":
        is_told = pieces.kind != "flux2-klein" or pieces.is_distilled is not None
        known = is_told and pieces.base.startswith("flux2-")
        return architecture_of(pieces.base if known else pieces.kind)
    inpaints = "-inpainting" if pieces.is_inpainting else ""
    if pieces.kind != "sd2":
        return f"stable-diffusion-v1{inpaints}"
    return f"stable-diffusion-v2-{'768-v' if _predicts_velocity(pieces) else '512'}{inpaints}"


def _predicts_velocity(pieces: Pieces) -> bool:
    return (pieces.scheduler or {}).get("prediction_type") == "v_prediction"


def _drawing(pieces: Pieces) -> dict[str, str]:
    """What the model predicts; only where it has a UNet, as a VAE predicts nothing."""
    if "unet" not in pieces.networks or pieces.scheduler is None:
        return {}
    said = {PREDICTION_KEY: "v" if _predicts_velocity(pieces) else "epsilon"}
    return {**said, **({ZERO_SNR_KEY: "true"} if pieces.scheduler.get("rescale_betas_zero_snr") else {})}
