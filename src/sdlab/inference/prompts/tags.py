"""``<lora:name:0.8>`` in a prompt: A1111's way of naming a LoRA and its weight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sdlab.errors import SdlabError

_TAG = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>", re.IGNORECASE)


@dataclass(frozen=True)
class Tag:
    """A LoRA as a prompt names it."""

    name: str
    weight: float


def without_loras(text: str) -> str:
    """The text that is sent to the model: every tag taken out, nothing else touched."""
    return _TAG.sub("", text)


def loras_in(text: str) -> list[Tag]:
    """The LoRAs that the text names, in order, weight 1 where none is given; weights of one name are added up.

    Raises SdlabError for a tag without a name or whose weight is no number.
    """
    weights: dict[str, float] = {}
    for found in _TAG.finditer(text):
        name, weight = found[1].strip(), _weight(found[2])
        if not name or not math.isfinite(weight):
            raise SdlabError(f"'{found[0]}' names no LoRA with a weight", next_step="Write <lora:name:0.8>")
        weights[name] = weights.get(name, 0.0) + weight
    return [Tag(name, weight) for name, weight in weights.items()]


def _weight(text: str | None) -> float:
    try:
        return 1.0 if text is None else float(text)
    except ValueError:
        return math.nan
