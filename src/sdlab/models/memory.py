"""Which device and which number type to compute with."""

from __future__ import annotations

import re

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
