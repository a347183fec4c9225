"""Does mini-flux2 show what prompts say, and do what instructions ask? Reads its pictures back from their pixels.

python recipes/mini/flux2_score.py PIPELINE_FOLDER [--edits] [--new] [--num N] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from flux2_language import describe, instruct
from flux2_tokenizer import WINDOW
from PIL import Image
from score import prompts, sheet
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


def _texts(args: argparse.Namespace, run: Callable[..., list[Image.Image]]) -> tuple[list[Image.Image], bool]:
    texts = prompts(NEW_SHAPES if args.new else BASE_SHAPES, args.num)
    pictures = run(texts, None)
    result = score(pictures, texts)
    print(
        f"prompts of scenes: all three {result.all_three:.1%} of {result.num}; shape {result.shape:.1%}, "
        f"colour {result.colour:.1%}, background {result.background:.1%}"
    )
    if args.new:
        return pictures, result.all_three < NEW_CEILING
    seen = [(wanted(text), read(picture)) for text, picture in zip(texts, pictures, strict=True)]
    for shape in BASE_SHAPES:
        hits = [seen.shape == shape for asked, seen in seen if asked.shape == shape]
        if hits:
            print(f"{shape} {np.mean(hits):.0%}", end=" ")
    print()
    free = free_prompts(args.num)
    more = run([text for text, _ in free], None)
    freely = score_scenes(more, [scene for _, scene in free])
    print(f"prompts in many phrasings: all three {freely:.1%} of {len(free)}")
    return pictures + more, min(result.all_three, freely) >= BAR


def _edits(args: argparse.Namespace, run: Callable[..., list[Image.Image]]) -> tuple[list[Image.Image], bool]:
    shown: list[Image.Image] = []
    passed = True
    for plain in (True, False):
        asked = edits(args.num, plain=plain)
        before = [draw(edit.before, (SIDE_PX, SIDE_PX)) for edit in asked]
        made = run([edit.instruction for edit in asked], before)
        result = score_edits(made, asked)
        single = np.array([len(edit.changed) == 1 for edit in asked])
        halves = [
            score_edits(
                [made[i] for i in np.flatnonzero(part)], [asked[i] for i in np.flatnonzero(part)]
            ).right
            for part in (single, ~single)
        ]
        print(
            f"edits in {'plain words' if plain else 'many phrasings'}: right {result.right:.1%} of {result.num}; "
            f"one attribute {halves[0]:.1%}, several {halves[1]:.1%}; changed {result.changed:.1%}, "
            f"kept {result.kept:.1%}\n"
            + ", ".join(f"{kind} {share:.0%}" for kind, share in result.by_kind.items())
        )
        passed &= result.right >= EDIT_BAR
        shown += [picture for pair in zip(before, made, strict=True) for picture in pair]
    return shown, passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--edits", action="store_true", help="instructions instead of prompts")
    parser.add_argument("--new", action="store_true", help="prompts for things that mini-flux2 must not know")
    parser.add_argument("--bf16", action="store_true", help="quicker, for a look while it trains")
    parser.add_argument("--sheet", type=Path, help="where to leave a contact sheet")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    pipeline = OneReferenceEach.from_pretrained(args.pipeline, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)

    def run(texts: list[str], references: list[Image.Image] | None) -> list[Image.Image]:
        return generate(pipeline, texts, references, steps=args.steps, guidance=args.guidance)

    pictures, passed = (_edits if args.edits else _texts)(args, run)
    if args.sheet:
        sheet(pictures).save(args.sheet)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
