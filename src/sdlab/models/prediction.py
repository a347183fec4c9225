"""What the UNet in a single file predicts: the noise, or the velocity ("v"). No tensor says so outright."""

from __future__ import annotations

import math
import statistics
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import FLOATS, Header, Stored
from sdlab.models.ldm import UNET, ema_name
from sdlab.models.sniff import ARCHITECTURE_KEY

PREDICTION_KEY, ZERO_SNR_KEY = "modelspec.prediction_type", "sdlab.zero_terminal_snr"
_WORDS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
_MARK = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09  # the published v-prediction models are above it, the epsilon ones below


@dataclass(frozen=True)
class Prediction:
    """How a UNet was trained, and how we know."""

    kind: str  # epsilon or v_prediction
    zero_snr: bool = False  # its last timestep is pure noise
    told_by: str = ""  # one phrase; empty where it is what all models of this shape are

    @property
    def is_guess(self) -> bool:
        """Was it told from the weights, which can be wrong?"""
        return self.told_by == SPREAD


SPREAD = "by the spread of a bias of its UNet"


ASKED = "as --prediction-type says"


def prediction_of(
    header: Header, scheduler: Mapping[str, Any], *, openclip: bool, channels: int, asked: str | None = None
) -> Prediction:
    """What is `asked` for; else what the file states; else what the weights of a Stable Diffusion 2.x look like.

    Else what `scheduler` says. Reads at most one tensor of a few hundred numbers.
    """
    names = header.tensors.keys()
    zero_snr = (
        "ztsnr" in names
        or header.metadata.get(ZERO_SNR_KEY) == "true"
        or bool(scheduler.get("rescale_betas_zero_snr"))
    )
    if asked is not None:
        return Prediction(asked, zero_snr, ASKED)
    stated = _WORDS.get(header.metadata.get(PREDICTION_KEY, "").lower())
    if stated:
        return Prediction(stated, zero_snr, f"as its {PREDICTION_KEY} says")
    if "v_pred" in names:
        return Prediction("v_prediction", zero_snr, "as its tensor 'v_pred' says")
    architecture = header.metadata.get(ARCHITECTURE_KEY, "").lower()
    for word, kind in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        if word in architecture:
            return Prediction(kind, zero_snr, f"as its {ARCHITECTURE_KEY} says")
    usual = str(scheduler.get("prediction_type", "epsilon"))
    if not openclip:
        return Prediction(usual, zero_snr)
    if channels != 4:
        return Prediction("epsilon", zero_snr)  # there is no inpainting model of the other kind
    mark = header.tensors.get(UNET + _MARK) or header.tensors.get(ema_name(_MARK))
    if mark is None or mark.dtype not in FLOATS:
        return Prediction(usual, zero_snr)
    return Prediction("v_prediction" if _spread(mark) > V_SPREAD else "epsilon", zero_snr, SPREAD)


def _spread(stored: Stored) -> float:
    """The population standard deviation of a tensor's numbers; 0 where there are none, or one is not finite."""
    values = _numbers(stored)
    return statistics.pstdev(values) if values and all(map(math.isfinite, values)) else 0.0


def _numbers(stored: Stored) -> list[float]:
    """The values of a small tensor, with no library: looking at a file is quick."""
    if stored.nbytes > 1 << 20:
        raise SdlabError(f"tensor {stored.name!r} is no bias", where=str(stored.path))
    raw = b"".join(stored.pieces())
    if stored.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[at : at + 2] for at in range(0, len(raw), 2))
    letter = {"F64": "d", "F16": "e"}.get(stored.dtype, "f")
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(letter)}{letter}", raw))


def with_prediction(scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """The schedule, with what the UNet predicts written into it."""
    changed = dict(scheduler)
    if prediction.kind != scheduler.get("prediction_type", "epsilon"):
        changed["prediction_type"] = prediction.kind
    if prediction.zero_snr:
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if prediction.zero_snr and scheduler.get("_class_name") == "PNDMScheduler":  # which knows nothing of it
        changed.pop("skip_prk_steps", None)
        changed["_class_name"] = "DDIMScheduler"
    return changed


def said(prediction: Prediction, path: object) -> str:
    """One phrase for the line that tells which model was chosen; empty where there is nothing to tell."""
    if not prediction.told_by:
        return ""
    word = "v-prediction" if prediction.kind == "v_prediction" else "epsilon-prediction"
    other = "epsilon" if prediction.kind == "v_prediction" else "v_prediction"
    way_on = f"; if pictures are mere noise: sdlab convert --model-path {path} --prediction-type {other}"
    return f"{word} {prediction.told_by}{way_on if prediction.is_guess else ''}"
