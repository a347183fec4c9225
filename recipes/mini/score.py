"""Does mini-sd show what prompts say? Generates for a fixed list of prompts and reads the pictures back.

python -m recipes.mini.score PIPELINE_FOLDER [--steps 20] [--guidance 7] [--new]     exits with 1 below the bar
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from recipes.mini.figures import Figure, failed

from sdlab.testing.scenes import (
    BASE_SHAPES,
    COLOURS,
    NEW_SHAPES,
    PREFIX,
    STYLES,
    Scene,
    generator,
    prompt_of,
    score,
)

SEED = 22
BAR, NEW_CEILING = 0.90, 0.15


@dataclass(frozen=True)
class Wish:
    """What to draw and how."""

    steps: int = 20
    guidance: float = 7.0
    num: int = 256
    new: bool = False  # prompts for things that the model must not know
    dtype: torch.dtype = torch.float32


def prompts(shapes: tuple[str, ...], num: int) -> list[str]:
    """A fixed list, balanced over shapes, colours, styles and the prefix; every fourth with extra words."""
    colours = list(COLOURS)
    made = []
    for i in range(num):
        rng = generator(SEED, "prompt", i)
        colour = i % len(colours)
        ground = (colour + 1 + int(rng.integers(len(colours) - 1))) % len(colours)
        scene = Scene(
            shape=shapes[i // len(colours) % len(shapes)],
            colour=colours[colour],
            background=colours[ground],
            size=float(rng.uniform(0.45, 0.8)),
            texture=("plain", "striped", "dotted")[int(rng.integers(3))],
        )
        style = STYLES[(i + i // len(STYLES)) % len(STYLES)]
        prefix = PREFIX if generator(SEED, "prefix", i // 2).permutation(2)[i % 2] else ""
        made.append(prompt_of(scene, style, extras=i % 4 == 3, prefix=prefix))
    return made


def generate(
    pipeline: StableDiffusionPipeline, texts: list[str], *, steps: int, guidance: float, batch: int = 32
) -> list[Image.Image]:
    """One picture for each prompt, number i from seed i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        rngs = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures += pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, height=128, width=128, generator=rngs
        ).images
    return pictures


def sheet(pictures: list[Image.Image], columns: int = 16) -> Image.Image:
    """A contact sheet."""
    width, height = pictures[0].size
    made = Image.new("RGB", (columns * (width + 2), -(-len(pictures) // columns) * (height + 2)), "grey")
    for i, picture in enumerate(pictures):
        made.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return made


def measured(folder: Path, wish: Wish, *, device: str = "cpu") -> tuple[list[Figure], list[Image.Image]]:
    """The figures of a pipeline, the first of them with its bar, and the pictures they are read from."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=wish.dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    texts = prompts(NEW_SHAPES if wish.new else BASE_SHAPES, wish.num)
    pictures = generate(pipeline, texts, steps=wish.steps, guidance=wish.guidance)
    result = score(pictures, texts)
    what = f"{'new things' if wish.new else 'prompts'}, {wish.steps} steps, {result.num} pictures"
    if wish.new:
        return [Figure(f"{what}: all three", result.all_three, below=NEW_CEILING)], pictures
    prefixed = np.array([text.startswith(PREFIX) for text in texts])
    halves = [
        score([pictures[i] for i in np.flatnonzero(part)], [texts[i] for i in np.flatnonzero(part)]).all_three
        for part in (prefixed, ~prefixed)
    ]
    return [
        Figure(f"{what}: all three", result.all_three, at_least=BAR),
        Figure("shape", result.shape),
        Figure("colour", result.colour),
        Figure("background", result.background),
        Figure("all three with the prefix", halves[0]),
        Figure("all three without it", halves[1]),
    ], pictures


def measure(folder: Path, *, device: str = "cpu") -> list[Figure]:
    """All that mini-sd must reach: prompts at 20 and at 50 steps, and new things that it must not know."""
    wishes = (Wish(), Wish(steps=50, num=96), Wish(new=True, num=64))
    return [figure for wish in wishes for figure in measured(folder, wish, device=device)[0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--new", action="store_true", help="prompts for things that mini-sd must not know")
    parser.add_argument("--bf16", action="store_true", help="quicker, for a look while it trains")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="where to leave a contact sheet")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    wish = Wish(steps=args.steps, guidance=args.guidance, num=args.num, new=args.new, dtype=dtype)
    figures, pictures = measured(args.pipeline, wish, device=args.device)
    if args.sheet:
        sheet(pictures).save(args.sheet)
    print(*figures, sep="\n")
    return int(bool(failed(figures)))


if __name__ == "__main__":
    sys.exit(main())
