"""A measured figure and what it must reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One number of a model's score. Without a bar it is told and judged by nobody."""

    name: str
    value: float  # a share in [0, 1], or of `unit`
    at_least: float | None = None
    below: float | None = None
    unit: str = ""

    @property
    def passes(self) -> bool:
        """False for a number that is not one (NaN)."""
        enough = self.at_least is None or self.value >= self.at_least
        return enough and (self.below is None or self.value < self.below)

    def __str__(self) -> str:
        bars = [("must reach", self.at_least), ("must stay below", self.below)]
        said = [f"{what} {self._shown(bar)}" for what, bar in bars if bar is not None]
        failed = "" if self.passes else "   NOT REACHED"
        return f"{self.name}: {self._shown(self.value)}{f' ({said[0]})' if said else ''}{failed}"

    def _shown(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.1%}"


def failed(figures: Sequence[Figure]) -> list[str]:
    """What is below its bar, in words."""
    return [str(figure) for figure in figures if not figure.passes]
