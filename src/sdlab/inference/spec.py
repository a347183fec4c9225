"""What is asked for: one shot a picture, one spec for all of a batch's pictures. Plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdlab.inference.prompts.tags import without_loras

MAX_SEED = 2**53 - 1  # readers written in JavaScript round anything above
Emphasis = Literal["a1111", "comfy", "none"]
EMPHASES: tuple[Emphasis, ...] = ("a1111", "comfy", "none")
Offload = Literal["none", "model", "layers"]
OFFLOADS: tuple[Offload, ...] = ("none", "model", "layers")
FORMATS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    index: int  # place in the whole job
    typed: str  # what is to be drawn; of {a|b} and __name__ one is chosen, <lora:name:1> still stands in it
    prefix: str
    negative: str
    seed: int
    template: str = ""  # what `typed` was chosen from, "" where there was nothing to choose

    @property
    def prompt(self) -> str:
        """The prompt as sent to the model."""
        return without_loras(self.prefix + self.typed)


@dataclass(frozen=True)
class Init:
    """A picture to start from. `path` is where it lies now, `sha256` is of the file's bytes."""

    path: Path
    sha256: str
    background: str
    max_pixels: int


@dataclass(frozen=True)
class Reference:
    """A picture that an edit looks at, and the size in which it is looked at."""

    source: Init
    width: int
    height: int


@dataclass(frozen=True)
class Mask:
    """Where a picture is made anew (white) and where it stays (black)."""

    source: Init
    blur_px: int  # radius by which its edge is softened, in pixels of the result


@dataclass(frozen=True)
class Hires:
    """A second pass: the picture, scaled up, is noised and made anew."""

    width: int
    height: int
    steps: int
    strength: float


@dataclass(frozen=True)
class Spec:
    """How pictures are made; the same for every picture of a batch."""

    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str = ""  # canonical name, "" for the model's own
    strength: float | None = None  # only when starting from a picture
    clip_skip: int = 1  # which of CLIP's layers is read, counted from the last: 1 is the last
    emphasis: Emphasis = "a1111"  # what (x:1.2) means
    hires: Hires | None = None
    long_prompts: bool = (
        True  # False, in recipes of older versions: what is beyond CLIP's 77 tokens is cut off
    )


@dataclass(frozen=True)
class Format:
    """The files that pictures are written to."""

    name: str = "png"  # one of FORMATS
    quality: int = 95  # of JPEG and WebP; 100 is WebP without loss

    @property
    def suffix(self) -> str:
        """``.png``, ``.jpg`` or ``.webp``."""
        return ".jpg" if self.name == "jpeg" else f".{self.name}"
