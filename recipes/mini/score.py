"""Does mini-sd show what prompts say? Generates for a fixed list of prompts and reads the pictures back.

python recipes/mini/score.py PIPELINE_FOLDER [--steps 20] [--guidance 7] [--new]     exits 1 below the bar
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--new", action="store_true", help="prompts for things that mini-sd must not know")
    parser.add_argument("--bf16", action="store_true", help="quicker, for a look while it trains")
    parser.add_argument("--sheet", type=Path, help="where to leave a contact sheet")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    texts = prompts(NEW_SHAPES if args.new else BASE_SHAPES, args.num)
    pictures = generate(pipeline, texts, steps=args.steps, guidance=args.guidance)
    if args.sheet:
        sheet(pictures).save(args.sheet)
    result = score(pictures, texts)
    prefixed = np.array([text.startswith(PREFIX) for text in texts])
    halves = [
        score([pictures[i] for i in np.flatnonzero(part)], [texts[i] for i in np.flatnonzero(part)]).all_three
        for part in (prefixed, ~prefixed)
    ]
    print(
        f"{args.steps} steps, guidance {args.guidance}: all three {result.all_three:.1%} of {result.num}\n"
        f"shape {result.shape:.1%}, colour {result.colour:.1%}, background {result.background:.1%}\n"
        f"all three with the prefix {halves[0]:.1%}, without {halves[1]:.1%}"
    )
    return int(result.all_three >= NEW_CEILING if args.new else result.all_three < BAR)


if __name__ == "__main__":
    sys.exit(main())
