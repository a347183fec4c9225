"""What is asked for: one shot a picture, one spec for all of a job's pictures. Plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_SEED = 2**53 - 1  # readers written in JavaScript round anything above


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    index: int  # place in the whole job
    typed: str
    prefix: str
    negative: str
    seed: int

    @property
    def prompt(self) -> str:
        """The prompt as sent to the model."""
        return self.prefix + self.typed


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
class Spec:
    """How pictures are made; the same for every picture of a batch."""

    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str = ""  # canonical name, "" for the model's own
    strength: float | None = None  # only when starting from a picture


def shots(
    prompts: list[str], *, num: int, prefix: str, negative: str, seed: int, first: int = 0
) -> list[Shot]:
    """`num` shots of each prompt in turn; index and seed run on from prompt to prompt, from `first`."""
    typed = [prompt for prompt in prompts for _ in range(num)]
    return [Shot(first + i, prompt, prefix, negative, seed + first + i) for i, prompt in enumerate(typed)]


def in_batches(items: list[Shot], size: int) -> list[list[Shot]]:
    """Consecutive groups of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]
