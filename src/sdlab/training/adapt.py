"""What of a denoiser is trained, all of it or a LoRA beside it, and what is saved then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlab import __version__
from sdlab.models.base import Family
from sdlab.models.lora import Lora, add_lora, write_lora
from sdlab.models.resolve import Model
from sdlab.models.runs import LORA_FILE
from sdlab.training.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """The denoiser, with requires_grad on what is trained."""

    denoiser: nn.Module
    lora: Lora | None

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


def load_trained(family: Family, config: TrainConfig, device: torch.device, compute: torch.dtype) -> Trained:
    """Load the denoiser: in the type of `config.weights`, or for a LoRA in `compute` with the LoRA in float32."""
    if config.adapter == "full":
        assert config.weights
        return Trained(family.load_denoiser(device, DTYPES[config.weights]), None)
    denoiser = family.load_denoiser(device, compute)
    assert config.alpha
    return Trained(denoiser, add_lora(denoiser, rank=config.rank, alpha=config.alpha, seed=config.seed))


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
