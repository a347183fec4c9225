"""Peak memory of a training run on a card, computed before anything is loaded. On paper: no run was measured for it.

The denoiser is a transformer of equal blocks that computes in bf16; latents and text are cached and their encoders
gone. What is added up, in bytes:

    weights      2 or 4 each; those of a LoRA 4, beside a base of 2
    gradients    like the weights; with a fused backward only the largest tensor's
    optimizer    adamw 8 each, adamw8bit 2 + 8/256, adafactor 8 / width, muon 4; the moving average 4
    activations  a block keeps 29 numbers a token and channel for its backward; with checkpointing each block keeps its
                 input only and one block at a time is computed again, with 12 more in passing
    other        1.5 GiB for the CUDA context and what its allocator cannot use, and the update's float32 temporaries

The 29 were counted with torch's saved-tensor hooks over FLUX.2's blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from sdlab.training.rules import BLOCK, CHUNK

GIB = 2**30
KEPT, IN_PASSING = 29, 12  # numbers of two bytes a token and channel: saved by a block, and its transient
CONTEXT_BYTES = int(1.5 * GIB)
LARGEST = 9  # the largest weight is 9 * width^2: queries, keys, values and the gated feed-forward in one
TEMPORARIES = 8  # float32 tensors of CHUNK elements that an update holds at once
MUON_BYTES = (
    28  # a number of the largest weight, which muon takes as a whole: four copies in float32, six in bf16
)


# From the most exact to the leanest: adapter, optimizer, weights, fused backward.
WAYS = (
    ("full", "adamw", "fp32", False),
    ("full", "adamw8bit", "bf16", False),
    ("full", "adamw8bit", "bf16", True),
    ("full", "adafactor", "bf16", True),
    ("lora", "adamw", "fp32", False),
)


@dataclass(frozen=True)
class Estimate:
    """GiB at the peak, by what holds them."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    other: float

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(getattr(self, field.name) for field in fields(self))

    def as_line(self) -> str:
        """``about 17.4 GiB of the card's memory: weights 7.2, gradients 0.2, …``."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name):.1f}" for field in fields(self))
        return f"about {self.total:.1f} GiB of the card's memory: {parts} (computed, not measured)"


def estimate(
    *,
    num_parameters: int,
    num_trained: int,
    optimizer: str,
    weights: str,
    fused: bool,
    width: int,
    num_blocks: int,
    tokens: int,
    batch: int,
    grad_checkpointing: bool,
    adapter: str,
    ema: bool = False,
) -> Estimate:
    """The peak of a run. `num_parameters` without a LoRA's; `tokens` of one sample: target, references and text."""
    lora = adapter == "lora"
    each = 2 if weights == "bf16" and not lora else 4
    num_gradients = min(num_trained, LARGEST * width**2) if fused else num_trained
    state = {"adamw": 8.0, "adamw8bit": 2 + 8 / BLOCK, "adafactor": 8 / width, "muon": 4.0}[optimizer]
    own_rules = fused or each == 2 or optimizer != "adamw"
    temporaries = TEMPORARIES * 4 * min(CHUNK, num_trained) if own_rules else 0
    if optimizer == "muon":
        temporaries = MUON_BYTES * min(LARGEST * width**2, num_trained)
    frozen = 2 * num_parameters if lora else 0
    casts = 2 * num_trained if each == 4 and not grad_checkpointing else 0  # bf16 copies, kept until backward
    kept = num_blocks + KEPT + IN_PASSING if grad_checkpointing else num_blocks * KEPT
    parts = (
        frozen + num_trained * each,
        num_gradients * each,
        num_trained * (state + 4 * ema),
        2 * width * tokens * batch * kept + casts,
        CONTEXT_BYTES + temporaries,
    )
    return Estimate(*(count / GIB for count in parts))


def what_fits(
    card_gib: float,
    *,
    num_parameters: int,
    num_lora: int,
    width: int,
    num_blocks: int,
    tokens: int,
    adapter: str,
) -> str:
    """The options, as they are typed, of the most exact way that fits a card with one sample a pass.

    Empty if none does. Someone who wants a LoRA is offered a LoRA only.
    """
    for way, optimizer, weights, fused in WAYS:
        needed = estimate(
            num_parameters=num_parameters, num_trained=num_lora if way == "lora" else num_parameters,
            optimizer=optimizer, weights=weights, fused=fused, width=width, num_blocks=num_blocks, tokens=tokens,
            batch=1, grad_checkpointing=True, adapter=way,
        )  # fmt: skip
        if needed.total <= card_gib and (way == "lora" or adapter == "full"):
            number = "" if way == "lora" else f" --weights {weights}"
            backward = "fused" if fused else "no-fused"
            return (
                f"--adapter {way} --optimizer {optimizer}{number} --{backward}-backward "
                "--grad-checkpointing --batch 1 --no-ema"
            )
    return ""
