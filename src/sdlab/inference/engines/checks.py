"""What can go wrong with a picture: numbers that are not finite, a VAE that overflows, a picture of one colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from sdlab.errors import OutOfResources
from sdlab.inference.spec import Spec

Safety = Literal["none", "passed", "flagged"]  # "none": the model has no safety checker
TOO_LITTLE = ("DefaultCPUAllocator", "MPS backend out of memory")  # plain RuntimeErrors that say so
BLANK_LEVELS = 2  # of 255: a picture whose channels all vary by no more shows nothing


@dataclass(frozen=True)
class Made:
    """A finished picture, or None in its place where there is nothing to show, and why."""

    image: Image.Image | None
    safety: Safety = "none"  # a flagged picture is black: the model's checker blacked it out
    vae_float32: bool = False  # the VAE overflowed in its own number type and worked in float32
    fault: str = ""


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or not a number."""
    return bool(torch.isfinite(tensor).all())


def is_blank(image: Image.Image) -> bool:
    """Whether every channel is of one value, give or take a rounding."""
    extrema = image.convert("RGB").getextrema()
    return all(high - low <= BLANK_LEVELS for low, high in extrema)  # type: ignore[misc]  # RGB: pairs


def of_image(image: Image.Image, *, safety: Safety = "none", vae_float32: bool = False) -> Made:
    """The picture, or the fault that nothing is on it. What the safety checker blacked out is not called blank."""
    if safety != "flagged" and is_blank(image):
        return Made(None, safety, vae_float32, fault="the picture is blank: it is all of one colour")
    return Made(image, safety, vae_float32)


def with_range(vae: nn.Module, work: Callable[[torch.dtype], Tensor]) -> tuple[Tensor, bool]:
    """What `work` makes with the VAE in its own number type; where that overflows, in float32, and then True.

    Half precision overflows in some VAEs. The VAE's number type changes meanwhile, and no lock keeps other threads
    from it: several work at once in float32 only (`pick_threads`), and there nothing changes.
    """
    dtype = next(vae.parameters()).dtype
    if dtype == torch.float32:
        return work(dtype), False
    made = work(dtype)
    if all_finite(made):
        return made, False
    with _in_float32(vae, dtype):
        return work(torch.float32), True


@contextmanager
def _in_float32(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    module.to(torch.float32)
    try:
        yield
    finally:
        module.to(dtype)


@contextmanager
def memory_in_words(count: int, spec: Spec) -> Iterator[None]:
    """Turns torch's errors of too little memory, of a CPU and of Apple's GPUs, into OutOfResources."""
    try:
        yield
    except RuntimeError as reason:
        if not any(words in str(reason) for words in TOO_LITTLE):
            raise
        size = f"{count} of {spec.width}x{spec.height}"
        raise OutOfResources(
            f"not enough memory for {size}", next_step="Try a smaller --batch or size"
        ) from reason
