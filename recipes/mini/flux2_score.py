"""Does mini-flux2 show what prompts say, and do what instructions ask? Reads its pictures back from their pixels.

python -m recipes.mini.flux2_score PIPELINE_FOLDER [--edits] [--new] [--num N] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from recipes.mini.figures import Figure, failed
from recipes.mini.flux2_language import describe, instruct
from recipes.mini.flux2_tokenizer import WINDOW
from recipes.mini.score import prompts, sheet
from torch import Tensor

from sdlab.testing.edits import ATTRIBUTES, Edit, random_edit, score_edits
from sdlab.testing.scenes import (
    BASE_SHAPES,
    NEW_SHAPES,
    Scene,
    draw,
    generator,
    random_scene,
    read,
    score,
    wanted,
)

SEED = 34
BAR, EDIT_BAR, NEW_CEILING = 0.90, 0.85, 0.15
SIDE_PX, BATCH = 128, 32
KINDS = [*combinations(ATTRIBUTES, 1), *combinations(ATTRIBUTES, 1), *combinations(ATTRIBUTES, 2), ATTRIBUTES]


class OneReferenceEach(Flux2KleinPipeline):
    """The pipeline with a batch of references: picture i is the reference of prompt i alone."""

    def prepare_image_latents(
        self,
        images: list[Tensor],
        batch_size: int,
        generator: object,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """References (B, T, C) and their positions (B, T, 4), all at time 10."""
        one, ids = super().prepare_image_latents(images[:1], 1, generator, device, dtype)
        rest = [
            super(OneReferenceEach, self).prepare_image_latents([i], 1, generator, device, dtype)[0]
            for i in images[1:]
        ]
        return torch.cat([one, *rest]), ids.expand(batch_size, -1, -1)


def free_prompts(num: int) -> list[tuple[str, Scene]]:
    """Descriptions in the training language's many phrasings, of scenes and in words that training did not draw."""
    made = []
    while len(made) < num:
        rng = generator(SEED, "free", len(made))
        scene = random_scene(rng)
        text, slots = describe(scene, rng, plain_share=0.0)
        while slots.colour is None or slots.background is None:
            text, slots = describe(scene, rng, plain_share=0.0)
        made.append((text, scene))
    return made


def edits(num: int, *, plain: bool) -> list[Edit]:
    """A fixed list of edits: half change one attribute, the others two or three; instructions in plain words or in
    the training language's many phrasings."""
    made = []
    for i in range(num):
        rng = generator(SEED, "edit", i)
        edit = random_edit(rng, KINDS[i % len(KINDS)])
        if not plain:
            edit = Edit(edit.before, edit.after, instruct(edit.before, edit.after, rng, full_share=0.0)[0])
        made.append(edit)
    return made


def generate(
    pipeline: Flux2KleinPipeline,
    texts: list[str],
    references: list[Image.Image] | None,
    *,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """One picture for each text, number i from seed i; of references, each edited by its text."""
    made: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        made += pipeline(
            prompt=part, image=None if references is None else references[start : start + BATCH], height=SIDE_PX,
            width=SIDE_PX, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=WINDOW,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images  # fmt: skip
    return made


def score_scenes(pictures: list[Image.Image], scenes: list[Scene]) -> float:
    """The share of pictures that show the scene's shape, colour and background."""
    texts = [f"{scene.colour} {scene.shape}, {scene.background} background" for scene in scenes]
    return score(pictures, texts).all_three


@dataclass(frozen=True)
class Wish:
    """What to draw and how."""

    steps: int = 15
    guidance: float = 4.0
    num: int = 160
    edits: bool = False  # instructions instead of prompts
    new: bool = False  # prompts for things that the model must not know
    dtype: torch.dtype = torch.float32


Run = Callable[[list[str], list[Image.Image] | None], list[Image.Image]]


def measured(folder: Path, wish: Wish, *, device: str = "cpu") -> tuple[list[Figure], list[Image.Image]]:
    """The figures of a pipeline and the pictures they are read from; of edits each behind its reference."""
    pipeline = OneReferenceEach.from_pretrained(folder, dtype=wish.dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def run(texts: list[str], references: list[Image.Image] | None) -> list[Image.Image]:
        return generate(pipeline, texts, references, steps=wish.steps, guidance=wish.guidance)

    return _edits(wish.num, run) if wish.edits else _new(wish.num, run) if wish.new else _texts(wish.num, run)


def measure(folder: Path, *, device: str = "cpu") -> list[Figure]:
    """All that mini-flux2 must reach: prompts, edits, and new things that it must not know."""
    wishes = (Wish(), Wish(edits=True, num=80), Wish(new=True, num=48))
    return [figure for wish in wishes for figure in measured(folder, wish, device=device)[0]]


def _new(num: int, run: Run) -> tuple[list[Figure], list[Image.Image]]:
    texts = prompts(NEW_SHAPES, num)
    pictures = run(texts, None)
    share = score(pictures, texts).all_three
    return [Figure(f"new things, {num} pictures: all three", share, below=NEW_CEILING)], pictures


def _texts(num: int, run: Run) -> tuple[list[Figure], list[Image.Image]]:
    texts = prompts(BASE_SHAPES, num)
    pictures = run(texts, None)
    result = score(pictures, texts)
    seen = [(wanted(text).shape, read(picture).shape) for text, picture in zip(texts, pictures, strict=True)]
    by_shape = {
        shape: [shown == shape for asked, shown in seen if asked == shape]
        for shape in dict.fromkeys(asked for asked, _ in seen)
    }
    free = free_prompts(num)
    more = run([text for text, _ in free], None)
    freely = score_scenes(more, [scene for _, scene in free])
    return [
        Figure(f"prompts of scenes, {num} pictures: all three", result.all_three, at_least=BAR),
        Figure("shape", result.shape),
        Figure("colour", result.colour),
        Figure("background", result.background),
        *(Figure(f"the shape of a {shape}", float(np.mean(hits))) for shape, hits in by_shape.items()),
        Figure(f"prompts in many phrasings, {num} pictures: all three", freely, at_least=BAR),
    ], pictures + more


def _edits(num: int, run: Run) -> tuple[list[Figure], list[Image.Image]]:
    shown: list[Image.Image] = []
    figures: list[Figure] = []
    for plain in (True, False):
        asked = edits(num, plain=plain)
        before = [draw(edit.before, (SIDE_PX, SIDE_PX)) for edit in asked]
        made = run([edit.instruction for edit in asked], before)
        shown += [picture for pair in zip(before, made, strict=True) for picture in pair]
        figures += _of_edits(f"edits in {'plain words' if plain else 'many phrasings'}", made, asked)
    return figures, shown


def _of_edits(name: str, made: list[Image.Image], asked: list[Edit]) -> list[Figure]:
    result = score_edits(made, asked)
    single = np.array([len(edit.changed) == 1 for edit in asked])
    one, several = (
        score_edits([made[i] for i in np.flatnonzero(part)], [asked[i] for i in np.flatnonzero(part)]).right
        for part in (single, ~single)
    )
    return [
        Figure(f"{name}, {result.num} pictures: right", result.right, at_least=EDIT_BAR),
        Figure("of one attribute", one),
        Figure("of two or three", several),
        Figure("changed what was asked", result.changed),
        Figure("kept the rest", result.kept),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--num", type=int, default=160)
    parser.add_argument("--edits", action="store_true", help="instructions instead of prompts")
    parser.add_argument("--new", action="store_true", help="prompts for things that mini-flux2 must not know")
    parser.add_argument("--bf16", action="store_true", help="quicker, for a look while it trains")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="where to leave a contact sheet")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    wish = Wish(args.steps, args.guidance, args.num, args.edits, args.new, dtype)
    figures, pictures = measured(args.pipeline, wish, device=args.device)
    if args.sheet:
        sheet(pictures).save(args.sheet)
    print(*figures, sep="\n")
    return int(bool(failed(figures)))


if __name__ == "__main__":
    sys.exit(main())
