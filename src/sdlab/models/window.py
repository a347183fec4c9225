"""How much of a prompt a text encoder reads, told without naming a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptWindow:
    """A text encoder's window and what falls out of it."""

    window: int  # tokens, those around the prompt included
    lost: Callable[[str], tuple[int, str]]  # prompt -> (its tokens, the words that are cut off or "")
