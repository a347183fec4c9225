"""What of a denoiser is trained, all of it or a LoRA beside it, and what is saved then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from sdlab import __version__
from sdlab.models.base import Family
from sdlab.models.lora import Lora, add_lora, write_lora
from sdlab.models.resolve import Model
from sdlab.models.runs import LORA_FILE
from sdlab.training.config import PromptedConfig, TrainConfig

LARGEST_PLAIN_PX = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """The denoiser, with requires_grad on what is trained."""

    denoiser: nn.Module
    lora: Lora | None
    note: str = ""  # what to tell of it, one line

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        if self.lora is None:
            return {"kind": "full"}
        about = self.lora
        return {
            "kind": "lora",
            "rank": about.rank,
            "alpha": about.alpha,
            "scale": about.scale,
            "layers": about.num_layers,
            "parameters": about.num_parameters,
        }

    def result_bytes(self, frozen_bytes: int) -> int:
        """Bytes of what is saved at the end; `frozen_bytes` are those of a pipeline's other parts."""
        if self.lora is None:
            return sum(p.nbytes for p in self.denoiser.parameters()) + frozen_bytes
        return sum(p.nbytes for p in self.denoiser.parameters() if p.requires_grad)


def load_trained(
    family: Family, config: PromptedConfig, device: torch.device, compute: torch.dtype
) -> Trained:
    """Load the denoiser: in the type of `config.weights`, or for a LoRA in `compute` with the LoRA in float32."""
    if not isinstance(config, TrainConfig) or config.adapter == "full":
        assert config.weights
        denoiser = family.load_denoiser(device, DTYPES[config.weights])
        note = _without_dropout(denoiser)
        _suit_device(denoiser, device, compute, image_size=config.image_size)
        return Trained(denoiser, None, note)
    denoiser = family.load_denoiser(device, compute)
    note = _without_dropout(denoiser)
    _suit_device(denoiser, device, compute, image_size=config.image_size)
    assert config.alpha
    lora = add_lora(denoiser, rank=config.rank, alpha=config.alpha, seed=config.seed)
    return Trained(denoiser, lora, "\n".join(line for line in (note, lora.as_line()) if line))


def _without_dropout(denoiser: nn.Module) -> str:
    """Switch dropout off, and say so where there was some: what it draws is no function of seed and step."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, nn.Dropout) and layer.p > 0]
    if not layers:
        return ""
    most = max(layer.p for layer in layers)
    for layer in layers:
        layer.p = 0.0
    return f"the model's dropout of {most:g} is off: a run could not be resumed exactly with it"


def _suit_device(
    denoiser: nn.Module, device: torch.device, compute: torch.dtype, *, image_size: int | None
) -> None:
    """Plain attention for a UNet on small pictures in bf16 on a CPU, where the backward of fused attention is slow.

    Of mini-sd's size a picture of 128 px takes 31 ms instead of 44 on one core; one of 256 px would take 221, not 188.
    """
    weight = next(denoiser.parameters())
    is_bf16 = torch.bfloat16 in (compute, weight.dtype)
    small = (image_size or LARGEST_PLAIN_PX) <= LARGEST_PLAIN_PX
    if device.type == "cpu" and is_bf16 and small and isinstance(denoiser, UNet2DConditionModel):
        denoiser.set_attn_processor(AttnProcessor())


def saver(
    trained: Trained, model: Model, save_pipeline: Callable[[nn.Module, Path], None]
) -> Callable[[nn.Module, Path], None]:
    """What writes the result into a new folder: the whole pipeline, or the LoRA's file alone."""
    lora = trained.lora
    if lora is None:
        return save_pipeline

    def save(denoiser: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True)
        about = {"sdlab": __version__, "base_model": model.source or model.name, "rank": str(lora.rank)}
        write_lora(denoiser, folder / LORA_FILE, rank=lora.rank, alpha=lora.alpha, metadata=about)

    return save
