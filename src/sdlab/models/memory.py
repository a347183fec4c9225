"""Which device, which number type and how many threads to compute with."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sdlab.errors import SdlabError

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
NUM_CORES = torch.get_num_threads()  # before anyone changes it: OMP_NUM_THREADS, or the cores that are ours
MAX_WORKERS = 8
SMALL = 200_000_000  # weights of a denoiser whose layers are too short for two cores to share


@dataclass(frozen=True)
class Threads:
    """How a CPU's cores are shared out."""

    num_threads: int  # that work on one batch
    num_workers: int  # batches at the same time, each with threads of its own


def pick_device(name: str) -> torch.device:
    """The device meant by ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; auto takes what is there.

    Raises SdlabError when the word is unknown or this computer has no such device.
    """
    word = name.strip().lower()
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", word):
        raise SdlabError(
            f"unknown device {name!r}", where="--device", next_step="Use auto, cpu, cuda, cuda:1 or mps"
        )
    if word == "mps" and not torch.backends.mps.is_available():
        raise SdlabError("this computer has no mps device", where="--device", next_step="Use --device auto")
    if word.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise SdlabError(
                "PyTorch finds no CUDA card (no card, no driver, or a CPU build of torch)",
                where="--device",
                next_step="Use --device auto",
            )
        index = int(word.partition(":")[2] or 0)
        if index >= count:
            raise SdlabError(
                f"there is no cuda:{index}, only {count} card(s), counted from 0", where="--device"
            )
        return torch.device("cuda", index)
    return torch.device(word)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type meant by ``auto``, ``fp32``, ``fp16``, ``bf16`` or their long names.

    auto is bf16 on CUDA (fp16 on cards without it), float32 elsewhere: half types save no time on a CPU.
    """
    word = name.strip().lower()
    if word == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if word not in DTYPES:
        raise SdlabError(
            f"unknown number type {name!r}", where="--dtype", next_step="Use auto, fp32, fp16 or bf16"
        )
    return DTYPES[word]


def pick_threads(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_parameters: int,
    asked: int | None = None,
    num_cores: int = NUM_CORES,
) -> Threads:
    """One thread a picture, and as many pictures at once as there are cores, where the denoiser is small.

    mini-sd, two cores: 0.38 s a picture instead of 0.73 s, and no bit depends on the number of cores. That holds
    for one picture alone too, so it is slower than it could be. Large models, half types and other devices take
    all cores for one batch, as torch does. `asked`, of a recipe: exactly so many, and one batch at a time.
    """
    if asked is not None:
        return Threads(asked, 1)
    if device.type == "cpu" and dtype == torch.float32 and num_parameters < SMALL:
        return Threads(1, min(num_cores, MAX_WORKERS))
    return Threads(num_cores, 1)


def check_compiler(device: torch.device) -> None:
    """Raises SdlabError where torch.compile would find nothing to compile with."""
    next_step = "Leave out --compile"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise SdlabError(
                "--compile needs Triton, which is not installed for this card", next_step=next_step
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as reason:
        raise SdlabError(
            "--compile needs a C++ compiler, and there is none here",
            next_step=f"Install g++ or clang++, or l{next_step[1:]}",
        ) from reason
