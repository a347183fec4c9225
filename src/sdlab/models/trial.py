"""Whether a network that a configuration describes can be used at all: one step of it on the meta device, no memory.

A configuration can be built and still not run: a UNet that waits for class labels, blocks that do not fit each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import OutOfResources, SdlabError

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOAT32_BYTES = 4
GB = 1e9
_LEVELS = 8  # halvings of a side that every network of ours survives: 256 of something


def refuse_unusable(module: nn.Module, class_name: str, where: Path) -> None:
    """Raise SdlabError where a network on the meta device does not make, of what a training gives it, its like."""
    import torch

    try:
        with torch.no_grad():
            given, made = _STEPS[class_name](module)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as reason:
        said = " ".join(str(reason).split())[:160] or type(reason).__name__
        raise SdlabError(
            f"describes a {class_name} that cannot be used ({said})", where=str(where)
        ) from reason
    if given.shape != made.shape:
        what = f"describes a {class_name} that makes {list(made.shape)} of {list(given.shape)}"
        raise SdlabError(what, where=str(where))


def refuse_too_large(module: nn.Module, where: Path) -> None:
    """Raise OutOfResources where the weights in float32 do not fit into the memory that is free now."""
    import psutil

    need = FLOAT32_BYTES * num_weights(module)
    free = psutil.virtual_memory().available
    if need > free:
        what = f"describes {in_words(need // FLOAT32_BYTES)}: {need / GB:.1f} GB, and {free / GB:.1f} GB are free"
        raise OutOfResources(what, where=str(where), next_step="Describe a smaller one")


def num_weights(module: nn.Module) -> int:
    """How many numbers the module's parameters hold."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def in_words(count: int) -> str:
    """ "3.8 million weights" """
    return f"{count / 1e6:,.1f} million weights" if count >= 100_000 else f"{count:,} weights"


def _unet(module: Any) -> tuple[Tensor, Tensor]:
    import torch

    config = module.config
    sample = torch.empty(1, config.in_channels, 1 << _LEVELS, 1 << _LEVELS, device="meta")
    prompt = torch.empty(1, 7, _width(config.cross_attention_dim), device="meta")
    return sample, module(sample, torch.zeros(1, device="meta"), encoder_hidden_states=prompt).sample


def _width(width: Any) -> int:
    if isinstance(width, int):
        return width
    raise ValueError(f"cross_attention_dim is {width}, not one number")


def _vae(module: Any) -> tuple[Tensor, Tensor]:
    import torch

    pixels = torch.empty(1, 3, 1 << _LEVELS, 1 << _LEVELS, device="meta")
    return pixels, module.decode(module.encode(pixels).latent_dist.mean).sample


def _transformer(module: Any) -> tuple[Tensor, Tensor]:
    import torch

    config = module.config
    tokens = torch.empty(1, 4, config.in_channels, device="meta")
    made = module(
        hidden_states=tokens,
        encoder_hidden_states=torch.empty(1, 3, config.joint_attention_dim, device="meta"),
        timestep=torch.zeros(1, device="meta"),
        guidance=torch.zeros(1, device="meta") if config.guidance_embeds else None,
        img_ids=torch.zeros(4, 4, device="meta"),
        txt_ids=torch.zeros(3, 4, device="meta"),
        return_dict=False,
    )
    return tokens, made[0]


_STEPS: Mapping[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "AutoencoderKLFlux2": _vae,
    "Flux2Transformer2DModel": _transformer,
}
