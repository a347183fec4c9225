"""What a recipe is: drawn pictures, commands in their order, a score and the folder that is shipped. Data only."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from recipes.mini.data.folders import Dataset
from recipes.mini.figures import Figure

READS = ("--images", "--vae", "--text-encoder", "--load-model")


@dataclass(frozen=True)
class Command:
    """A command as typed in the folder for the work.

    An `sdlab` command trains into the run tuned/`name` and can go on with it. A `python` command, `-m module`, then
    what it reads, takes seconds and leaves `makes`, the last of its words and its name.
    """

    name: str
    line: str
    program: Literal["sdlab", "python"] = "sdlab"
    makes: str = ""

    def folder(self, work: Path) -> Path:
        """Where it leaves what it makes."""
        return work / (self.makes or f"tuned/{self.name}")

    @property
    def words(self) -> list[str]:
        """What stands behind the program's name."""
        return [*shlex.split(self.line), *([] if self.makes else ["--save-model", f"tuned/{self.name}"])]

    @property
    def typed(self) -> str:
        """The whole command."""
        return shlex.join([self.program, *self.words])

    @property
    def inputs(self) -> list[str]:
        """What it reads, as named in its line: folders in the one for the work, names of built-in models."""
        words = self.words
        if self.program == "python":
            return words[2:-1]
        return [word for flag, word in pairwise(words) if flag in READS]


@dataclass(frozen=True)
class Recipe:
    """How one built-in model is made."""

    name: str
    datasets: tuple[Dataset, ...]  # drawn into the folder of their name
    commands: tuple[Command, ...]  # the last one leaves the model
    measure: Callable[..., list[Figure]]  # of a model's folder, and device=

    def model(self, work: Path) -> Path:
        """The folder that the last command leaves."""
        return self.commands[-1].folder(work)
