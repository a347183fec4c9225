"""Preview grids of a run: the same prompts and seeds each time, so that only the weights differ."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from sdlab.dataset.cache import write_whole
from sdlab.dataset.sheet import font_for, labelled
from sdlab.keyed import key
from sdlab.models.base import Family


def previewer(
    family: Family,
    module: nn.Module,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int,
    image_size: int,
    num_steps: int,
    guidance: float,
) -> Callable[[int], None]:
    """A function that draws ``samples/step-NNNNNN.png`` from the module's weights as they are.

    The pipeline's other parts are loaded for the preview only and freed after it.
    """

    def preview(step: int) -> None:
        module.eval()
        pictures = _draw(family.pipeline(module), prompts, seed, image_size, num_steps, guidance)
        font, _ = font_for(prompts)
        sheet = labelled(zip(pictures, prompts, strict=True), num=len(prompts), side_px=image_size, font=font)
        out = io.BytesIO()
        sheet.save(out, "PNG")
        write_whole(folder / f"step-{step:06d}.png", out.getvalue())

    return preview


def _draw(
    pipeline: Callable[..., object],
    prompts: Sequence[str],
    seed: int,
    image_size: int,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    pictures = []
    for index, prompt in enumerate(prompts):
        noise = torch.Generator("cpu").manual_seed(key(seed, "preview", index))
        made = pipeline(
            prompt=prompt,
            height=image_size,
            width=image_size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
        )
        pictures.append(made.images[0])  # type: ignore[attr-defined]
    return pictures
