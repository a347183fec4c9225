"""The models we know by name, and the settings that suit each. Data; no heavy imports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ALIASES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
BUILTINS = ("mini-sd",)
LATER = (
    "flux2-klein-base-4b",
    "flux2-klein-4b",
    "flux2-klein-base-9b",
    "flux2-klein-9b",
    "flux2-dev",
    "mini-flux2",
)  # recognised, and refused with the reason, until FLUX.2 is there

CONFIGS = Path(__file__).parent / "configs"
QUALITY_PREFIX = "(masterpiece), best quality, best composition, "


def builtin_folder(name: str) -> Path:
    """Where the weights of a built-in model lie."""
    return Path(__file__).parent / "builtin" / name


@dataclass(frozen=True)
class Objective:
    """What the loss of a denoiser is made of."""

    timestep_range: tuple[int, int] = (0, 1000)  # trained timesteps, low <= t < high
    snr_gamma: float = 0.0  # cap of min-SNR weighting; 0 is off
    noise_offset: float = 0.0  # extra noise per channel; 0 is off


@dataclass(frozen=True)
class Recommended:
    """Settings used where the user gave none."""

    image_size: int  # pixels
    batch: int
    epoch: int
    lr: float
    timestep_range: tuple[int, int]
    warmup: int  # optimizer steps
    lr_schedule: str
    snr_gamma: float
    ema: bool  # keep a moving average of the weights
    guidance: float
    steps: int  # of sampling
    prefix: str  # before every prompt given to generate


RECOMMENDED = {
    "sd15": Recommended(
        image_size=512,
        batch=4,
        epoch=20,
        lr=1e-4,
        timestep_range=(0, 700),
        warmup=200,
        lr_schedule="constant",
        snr_gamma=0.0,
        ema=False,
        guidance=7.0,
        steps=50,
        prefix=QUALITY_PREFIX,
    ),
    "mini-sd": Recommended(
        image_size=128,
        batch=8,
        epoch=30,
        lr=1e-3,
        timestep_range=(0, 1000),
        warmup=20,
        lr_schedule="cosine",
        snr_gamma=1.0,
        ema=True,
        guidance=7.0,
        steps=50,
        prefix=QUALITY_PREFIX,
    ),
}

_UNET_SIGNATURE = ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block")


def base_of(unet_config: Mapping[str, Any], name: str) -> str:
    """`sd15` or `mini-sd` where the UNet has that shape, else the model's own name, safe as a folder name."""
    from sdlab.models.files import read_json

    for base, folder in known_configs().items():
        path = folder / "unet" / "config.json"
        if path.is_file():
            known = read_json(path)
            if all(unet_config.get(key) == known.get(key) for key in _UNET_SIGNATURE):
                return base
    return safe_name(name)


def known_configs() -> dict[str, Path]:
    """Folders with the configurations of the models we know by shape: base -> folder."""
    return {"sd15": CONFIGS / "sd15", "mini-sd": builtin_folder("mini-sd")}


def safe_name(name: str) -> str:
    """The name made fit for a folder: letters, digits, `-`, `_` and `.`, at most 80."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-._")[:80] or "model"


def recommended_for(base: str, image_size: int) -> Recommended:
    """The settings of `base`; for a base we do not know, those of sd15 at `image_size`."""
    return RECOMMENDED.get(base) or replace(RECOMMENDED["sd15"], image_size=image_size)
