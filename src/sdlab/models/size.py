"""How large a denoiser is, told from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sdlab.models.flux2_folder import Flux2Parts
from sdlab.models.lora import targets
from sdlab.models.parts import build


@dataclass(frozen=True)
class DenoiserSize:
    """Numbers that an estimate of memory is made of."""

    num_parameters: int
    num_blocks: int
    width: int
    num_lora_parameters: Callable[[int], int]  # of a LoRA of that rank on all linear layers of the blocks


def size_of(parts: Flux2Parts) -> DenoiserSize:
    """The size of a FLUX.2 transformer; it is built without memory. Raises SdlabError where it cannot be built."""
    module = build(parts.transformer)
    config = parts.transformer.config
    adapted = [module.get_submodule(name) for name in targets(module)]
    sides = sum(layer.in_features + layer.out_features for layer in adapted if isinstance(layer, nn.Linear))
    return DenoiserSize(
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        num_blocks=int(config.get("num_layers", 8)) + int(config.get("num_single_layers", 48)),
        width=int(config.get("num_attention_heads", 48)) * int(config.get("attention_head_dim", 128)),
        num_lora_parameters=lambda rank: rank * sides,
    )
