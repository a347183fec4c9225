"""The options that every training command has. No torch here: this is read before anything heavy is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sdlab.errors import SdlabError
from sdlab.options import opt

LR_SCHEDULES = ("constant", "linear", "cosine")
COMPUTE_DTYPES = ("auto", "fp32", "bf16")
ADAPTERS = ("full", "lora")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")

# What a continued run does not take over from the first start.
OF_THE_MOMENT = frozenset(("resume", "overwrite", "save_model"))

# What may differ between a run and its continuation: it changes no number of the result, or what it means is
# compared instead (images by content, the device by kind).
INCIDENTAL = frozenset(
    (*OF_THE_MOMENT, "images", "device", "cache_dir", "num_workers", "save_every", "keep", "preview_every",
     "preview_prompt")
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Options of every training run. None means: what is recommended for the model that is trained."""

    images: Annotated[
        Path,
        opt("Folder of pictures; the folders' names are the prompts.", old=("--train-dir",), group="Data"),
    ] = Path("images")
    load_model: Annotated[str, opt("Model to start from (default: sd15 with a CUDA card, else mini-sd).")] = (
        ""
    )
    save_model: Annotated[
        Path | None, opt("Folder of the run (default: tuned/<base>).", old=("--output-model",))
    ] = None
    image_size: Annotated[
        int | None, opt("Side of the square of equal area, in pixels.", min=16, max=4096, group="Data")
    ] = None
    batch: Annotated[
        int | None,
        opt("Pictures per forward pass and process.", min=1, old=("--batch-size",), group="Training"),
    ] = None
    epoch: Annotated[
        int | None, opt("Times every picture is seen.", min=1, old=("--epochs",), group="Training")
    ] = None
    steps: Annotated[int | None, opt("Optimizer steps, instead of --epoch.", min=1, group="Training")] = None
    lr: Annotated[float | None, opt("Learning rate.", min=0.0, group="Training")] = None
    lr_schedule: Annotated[
        str | None, opt("How the rate goes on after warm-up.", choices=LR_SCHEDULES, group="Training")
    ] = None
    warmup: Annotated[int | None, opt("Steps in which the rate rises to --lr.", min=0, group="Training")] = (
        None
    )
    grad_accum: Annotated[int, opt("Forward passes per optimizer step.", min=1, group="Training")] = 1
    grad_checkpointing: Annotated[
        bool | None, opt("Compute activations twice to need less memory.", group="Memory")
    ] = None
    max_grad_norm: Annotated[
        float, opt("Clip the gradient to this norm; 0: never.", min=0.0, group="Training")
    ] = 1.0
    weight_decay: Annotated[float, opt("Weight decay.", min=0.0, group="Training")] = 0.01
    ema: Annotated[
        bool | None, opt("Keep a moving average of the weights, and save that.", group="Training")
    ] = None
    seed: Annotated[int, opt("Names every random draw of the run.", min=0, group="Training")] = 42
    repeats: Annotated[
        tuple[str, ...], opt("FOLDER=N: visit its pictures N times an epoch. Repeatable.", group="Data")
    ] = ()
    balance: Annotated[bool, opt("Repeat small folders until all weigh about the same.", group="Data")] = (
        False
    )
    flip: Annotated[bool, opt("Mirror half of the visits (not for faces or text).", group="Data")] = False
    background: Annotated[str, opt("Colour behind transparent pictures.", group="Data")] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures unread.", min=1, group="Data")] = 64_000_000
    cache_dir: Annotated[
        Path | None, opt("Encoded pictures and prompts (default: .sdlab-cache beside the run).", group="Data")
    ] = None
    save_every: Annotated[
        int, opt("Steps between checkpoints; 0: only at the end.", min=0, group="Saving")
    ] = 500
    keep: Annotated[int, opt("Checkpoints kept.", min=1, group="Saving")] = 2
    preview_every: Annotated[
        int, opt("Steps between preview grids; 0: start and end.", min=0, group="Saving")
    ] = 500
    resume: Annotated[
        bool | None, opt("Go on with the run in --save-model, exactly.", flag="--resume", group="Saving")
    ] = None
    overwrite: Annotated[
        bool | None, opt("Replace the run in --save-model.", flag="--overwrite", group="Saving")
    ] = None
    device: Annotated[str, opt("auto, cpu, cuda, cuda:1 …", group="Machine")] = "auto"
    dtype: Annotated[
        str,
        opt("Compute precision.", choices=COMPUTE_DTYPES, group="Machine"),
    ] = "auto"
    compile: Annotated[bool, opt("torch.compile the model.", group="Machine")] = False
    optimizer: Annotated[
        str | None,
        opt(
            "adamw8bit and adafactor need less memory; muon is meant for new models.",
            choices=OPTIMIZERS,
            group="Memory",
        ),
    ] = None
    weights: Annotated[
        str | None,
        opt("Number type of trained weights; bf16 is rounded stochastically.", choices=("fp32", "bf16"),
            group="Memory"),
    ] = None  # fmt: skip
    fused_backward: Annotated[
        bool | None,
        opt("Update each weight as soon as its gradient is there: no room for gradients.", group="Memory"),
    ] = None
    num_workers: Annotated[int, opt("Threads that read ahead.", min=0, max=64, group="Machine")] = 2
    allow_pickle: Annotated[bool, opt("Load .ckpt and .bin files (weights only).", group="Machine")] = False


@dataclass(frozen=True)
class PromptedConfig(RunConfig):
    """Options of a run that learns what pictures show from their prompts."""

    caption_dropout: Annotated[
        float,
        opt(
            "Share of samples trained with the empty prompt.", min=0.0, max=1.0, group="Training", after="ema"
        ),
    ] = 0.1
    prompt_prefix: Annotated[str, opt("Text before every prompt.", group="Data", after="seed")] = ""
    txt: Annotated[bool, opt("Also read captions from .txt files.", group="Data", after="prompt_prefix")] = (
        True
    )
    preview_prompt: Annotated[
        tuple[str, ...],
        opt(
            "Prompt of the previews (default: four of the dataset's). Repeatable.",
            group="Saving",
            after="preview_every",
        ),
    ] = ()


@dataclass(frozen=True)
class TrainConfig(PromptedConfig):
    """Options of a run that trains a denoiser, or a LoRA beside it."""

    adapter: Annotated[
        str,
        opt(
            "Train all weights, or a small LoRA beside them.",
            choices=ADAPTERS,
            group="Training",
            after="grad_checkpointing",
        ),
    ] = "full"
    rank: Annotated[int, opt("Rank of the LoRA.", min=1, max=1024, group="Training", after="adapter")] = 16
    alpha: Annotated[
        float | None,
        opt(
            "The LoRA counts alpha/rank times (default: alpha = rank).",
            min=0.001,
            group="Training",
            after="rank",
        ),
    ] = None


def parse_range(text: str, *, where: str) -> tuple[int, int]:
    """``0-700`` as (0, 700): timesteps t with 0 <= t < 700. Raises SdlabError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*[-,:]\s*(\d+)\s*", text)
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not low < high <= 1000:
        raise SdlabError(
            f"'{text}' is not a range of timesteps",
            where=where,
            next_step="Write it as 0-700, at most 0-1000",
        )
    return low, high
