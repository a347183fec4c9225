"""What the tests of the engines share: a sampler from a folder, shots, and pictures as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlab.inference import load
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.identity import Hasher
from sdlab.inference.spec import Shot, Spec

SPEC = Spec(steps=3, guidance=5.0, width=64, height=48)
SHOTS = [Shot(i, text, "best, ", "ugly", 11 + i) for i, text in enumerate(["red", "blue", "green", "red"])]


def any_sampler_of(folder: Path, dtype: str = "fp32", prompts: list[str] | None = None) -> Any:
    chosen = load.choose(load.Asked(str(folder)), tuned=folder.parent / "none", hasher=Hasher())
    return load.load(load.open_chosen(chosen), load.Running("cpu", dtype), prompts=prompts or []).sampler


def sampler_of(folder: Path) -> Sampler:
    sampler = any_sampler_of(folder)
    assert isinstance(sampler, Sampler)
    return sampler


def picture(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 3, y * 3, (x + y) % 90 + 90], -1).astype(np.uint8))


def pixels(sampler: Any, shots: list[Shot], spec: Spec = SPEC, **looks: Any) -> list[np.ndarray]:
    made = [one.image for one in sampler.sample(shots, spec, **looks)]
    assert all(image is not None for image in made)
    return [np.asarray(image).astype(int) for image in made]
