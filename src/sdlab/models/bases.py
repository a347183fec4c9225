"""The models we know by name, and the settings that suit each. Data; no heavy imports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "flux2-klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
}
DISTILLED = (
    "flux2-klein-4b",
    "flux2-klein-9b",
)  # of the same shape as the base models, made to draw in four steps
BUILTINS = {"mini-sd": "sd", "mini-flux2": "flux2"}  # name -> family
CAPTIONERS = {
    "blip-base": "Salesforce/blip-image-captioning-base",
    "blip-large": "Salesforce/blip-image-captioning-large",
}
BUILTIN_CAPTIONER = "mini-blip"

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
class FlowObjective:
    """How noise levels are drawn in the training of a rectified flow (FLUX.2)."""

    sampling: str = "logit-normal"  # or uniform, before the shift
    shift: float | None = None  # None: by the number of tokens; 1 is no shift


@dataclass(frozen=True)
class Init:
    """An untrained denoiser instead of the model's own."""

    asked: str  # a known size, or the path of a config.json
    seed: int  # names the draws of its weights


@dataclass(frozen=True)
class Recommended:
    """Settings used where the user gave none."""

    image_size: int  # pixels
    batch: int
    epoch: int
    lr: float
    timestep_range: tuple[int, int] = (0, 1000)
    warmup: int = 0  # optimizer steps
    lr_schedule: str = "constant"
    snr_gamma: float = 0.0
    ema: bool = False  # keep a moving average of the weights
    guidance: float = 7.0
    steps: int = 50  # of sampling
    prefix: str = ""  # before every prompt given to generate
    shift: str = "auto"  # of noise levels, FLUX.2 only: auto is by the number of tokens
    optimizer: str = "adamw"
    weights: str = "fp32"  # number type of the weights that are trained; a LoRA's are always fp32
    fused_backward: bool = False
    grad_checkpointing: bool = False


RECOMMENDED = {
    "sd15": Recommended(
        image_size=512,
        batch=4,
        epoch=20,
        lr=1e-4,
        timestep_range=(0, 700),
        warmup=200,
        prefix=QUALITY_PREFIX,
    ),
    "mini-sd": Recommended(
        image_size=128,
        batch=8,
        epoch=30,
        lr=1e-3,
        warmup=20,
        lr_schedule="cosine",
        snr_gamma=1.0,
        ema=True,
        prefix=QUALITY_PREFIX,
    ),
    "mini-flux2": Recommended(
        image_size=128,
        batch=8,
        epoch=26,
        lr=6e-4,
        warmup=20,
        lr_schedule="cosine",
        guidance=4.0,
        steps=15,
        shift="5",  # 64 tokens are few: below high noise the outline of a thing is seen, and no word is needed
    ),
}
_FLUX2 = Recommended(
    image_size=1024,
    batch=1,
    epoch=5,
    lr=1e-5,
    warmup=100,
    guidance=4.0,
    steps=15,
    optimizer="adafactor",
    weights="bf16",
    fused_backward=True,
    grad_checkpointing=True,
)
_DISTILLED = replace(_FLUX2, guidance=1.0, steps=4)
RECOMMENDED |= {
    "flux2-klein-base-4b": _FLUX2,
    "flux2-klein-base-9b": _FLUX2,
    "flux2-dev": _FLUX2,
    "flux2-klein-4b": _DISTILLED,
    "flux2-klein-9b": _DISTILLED,
}
RECOMMENDED |= {  # of those that `--init` begins: what is trained on later, and drawn with
    "sd-small": replace(RECOMMENDED["mini-sd"], prefix=""),
    "sd-sd": replace(RECOMMENDED["sd15"], prefix=""),
    "flux2-small": replace(RECOMMENDED["mini-flux2"], shift="auto"),
    "flux2-medium": replace(RECOMMENDED["mini-flux2"], image_size=256, lr=1e-4, warmup=100, shift="auto"),
}
FROM_SCRATCH = {  # of the training of an untrained denoiser; larger ones take a lower rate, and longer
    "sd-small": Recommended(
        image_size=128,
        batch=32,
        epoch=100,
        lr=2e-3,
        warmup=200,
        lr_schedule="cosine",
        snr_gamma=5.0,
        ema=True,
    ),
    "flux2-small": Recommended(
        image_size=128,
        batch=32,
        epoch=100,
        lr=1e-3,
        warmup=200,
        lr_schedule="cosine",
        ema=True,
        guidance=4.0,
        steps=15,
    ),
}
FROM_SCRATCH |= {
    "sd-sd": replace(FROM_SCRATCH["sd-small"], image_size=512, batch=8, lr=1e-4, warmup=1000),
    "flux2-medium": replace(FROM_SCRATCH["flux2-small"], image_size=256, batch=16, lr=3e-4, warmup=1000),
}
LORA_LR = {"sd15": 1e-4, "mini-sd": 2e-3, "mini-flux2": 2e-3, "sd-small": 2e-3, "flux2-small": 2e-3}

_UNET_SIGNATURE = ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block")


FLUX2_SIGNATURE = ("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim")
FLUX2_SHAPES: dict[str, tuple[Any, ...]] = {
    "flux2-klein-base-4b": (5, 20, 24, 7680),
    "flux2-klein-base-9b": (8, 24, 32, 12288),
    "flux2-dev": (8, 48, 48, 15360),
}


def base_of(unet_config: Mapping[str, Any], name: str) -> str:
    """`sd15`, `sd21` or `mini-sd` where the UNet has that shape, else the model's own name, safe as a folder name."""
    from sdlab.models.files import read_json

    for base, folder in known_configs().items():
        path = folder / "unet" / "config.json"
        if path.is_file():
            known = read_json(path)
            if all(unet_config.get(key) == known.get(key) for key in _UNET_SIGNATURE):
                return base
    return safe_name(name)


def flux2_base_of(transformer_config: Mapping[str, Any], is_distilled: bool, name: str) -> str:
    """The alias of the FLUX.2 model of that shape, or `mini-flux2`, else the model's own name, fit for a folder."""
    shape = tuple(transformer_config.get(key) for key in FLUX2_SIGNATURE)
    for base, known in known_flux2().items():
        if shape == known:
            return base.replace("-base", "") if is_distilled else base
    return safe_name(name)


def known_flux2() -> dict[str, tuple[Any, ...]]:
    """The shapes of the FLUX.2 models we know, as in FLUX2_SIGNATURE; the undistilled one of each size."""
    from sdlab.models.files import read_json

    shapes = dict(FLUX2_SHAPES)
    mini = builtin_folder("mini-flux2") / "transformer" / "config.json"
    if mini.is_file():
        config = read_json(mini)
        shapes["mini-flux2"] = tuple(config.get(key) for key in FLUX2_SIGNATURE)
    return shapes


def known_configs() -> dict[str, Path]:
    """Folders with the configurations of the models we know by shape: base -> folder."""
    return {"sd15": CONFIGS / "sd15", "sd21": CONFIGS / "sd21", "mini-sd": builtin_folder("mini-sd")}


def known_flux2_configs() -> dict[str, Path]:
    """Folders with the configurations of the FLUX.2 models we know by shape, as `known_flux2` has them."""
    return {base: builtin_folder(base) if base in BUILTINS else CONFIGS / base for base in known_flux2()}


def safe_name(name: str) -> str:
    """The name made fit for a folder: letters, digits, `-`, `_` and `.`, at most 80."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-._")[:80] or "model"


def recommended_for(base: str, image_size: int, *, like: str = "sd15", adapter: str = "full") -> Recommended:
    """The settings of `base` for training the whole denoiser or a LoRA.

    For a base we do not know, those of `like` at `image_size`.
    """
    found = RECOMMENDED.get(base) or replace(RECOMMENDED[like], image_size=image_size)
    if adapter == "full":
        return found
    lr = LORA_LR.get(base if base in RECOMMENDED else like, 1e-4)
    return replace(found, optimizer="adamw", fused_backward=False, ema=False, lr=lr)
