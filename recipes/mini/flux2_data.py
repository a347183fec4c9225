"""What mini-flux2's denoiser learns from: groups of scenes that differ in one to three attributes, as latents, and
prompts behind the frozen text encoder, all cached.

python recipes/mini/flux2_data.py WORK_FOLDER [--groups 4000] latents      pictures -> WORK_FOLDER/flux2_latents.pt
python recipes/mini/flux2_data.py WORK_FOLDER [--groups 4000] prompts      -> WORK_FOLDER/flux2_prompts.npy, .pt
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from flux2_language import changed, describe, empty, instruct, sentence_words
from flux2_text import OUT_LAYERS, WIDTH, batch_of
from flux2_tokenizer import WINDOW
from flux2_vae import as_tensor, normalised
from numpy.typing import NDArray
from pictures import named_silhouettes, words
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from sdlab.testing.scenes import BASE_SHAPES, NEW_SHAPES, SILHOUETTES, Scene, draw, generator, random_scene
from sdlab.testing.shapes import Silhouette

# N pictures of a bucket, L text tokens, T picture tokens, C packed channels, D text width

SEED = 33
NUM_NAMED, NAMED_SHARE = 200, 0.15  # random outlines with common words for names; share of the groups
BUCKETS_PX = ((128, 128), (112, 144), (144, 112), (96, 160), (160, 96))  # height, width
BUCKET_ODDS = (0.8, 0.05, 0.05, 0.05, 0.05)
GROUP = 5  # pictures: a scene, one with another colour, background, shape, and one with two or three changed
EDITS = 4  # prompts for edits within a group
SINGLE_SHARE = 0.6  # of them change one attribute


@dataclass(frozen=True)
class Edit:
    """Two pictures of a group, by number in the group."""

    before: int
    after: int


@cache
def silhouettes() -> dict[str, Silhouette]:
    """The scenes' base shapes and the named random ones."""
    taken = {*sentence_words(), *NEW_SHAPES}
    return {
        **{name: SILHOUETTES[name] for name in BASE_SHAPES},
        **named_silhouettes(SEED, NUM_NAMED, taken=taken),
    }


def group_of(index: int) -> tuple[int, list[Scene]]:
    """The bucket of a group and its scenes."""
    rng = generator(SEED, "group", index)
    bucket = int(rng.choice(len(BUCKETS_PX), p=BUCKET_ODDS))
    named = [name for name in silhouettes() if name not in BASE_SHAPES]
    shapes = named if rng.random() < NAMED_SHARE else BASE_SHAPES
    first = random_scene(rng, shapes=shapes)
    two = ("shape", "colour", "background")
    left_out = int(rng.integers(4))
    kinds = [("colour",), ("background",), ("shape",), tuple(k for i, k in enumerate(two) if i != left_out)]
    return bucket, [first, *(changed(first, rng, shapes=shapes, kinds=kind) for kind in kinds)]


def edits_of(index: int) -> list[Edit]:
    """The pairs of a group that have a prompt."""
    rng = generator(SEED, "edits", index)
    pairs = list(permutations(range(GROUP), 2))
    single = [pair for pair in pairs if 0 in pair and 4 not in pair]
    several = [pair for pair in pairs if pair not in single]
    chosen = [single if rng.random() < SINGLE_SHARE else several for _ in range(EDITS)]
    return [Edit(*options[int(rng.integers(len(options)))]) for options in chosen]


@torch.no_grad()
def encoded(numbers: range, folder: Path) -> list[Tensor]:
    """The groups' latents as tokens, (GROUP, T, C) each."""
    torch.set_num_threads(1)
    vae = AutoencoderKLFlux2.from_pretrained(folder / "flux2_vae").eval()
    made = []
    for index in numbers:
        bucket, scenes = group_of(index)
        drawn = [np.asarray(draw(scene, BUCKETS_PX[bucket], silhouettes=silhouettes())) for scene in scenes]
        latents = torch.cat(
            [vae.encode(part).latent_dist.mode() for part in as_tensor(np.stack(drawn)).split(8)]
        )
        made.append(normalised(vae, latents).flatten(2).transpose(1, 2).contiguous())
    return made


def cache_latents(folder: Path, num_groups: int, *, workers: int) -> None:
    """Leaves flux2_latents.pt: for each bucket the groups' numbers and their latents (groups, GROUP, T, C)."""
    parts = [range(start, min(start + 100, num_groups)) for start in range(0, num_groups, 100)]
    latents: list[Tensor] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, made in enumerate(pool.map(partial(encoded, folder=folder), parts)):
            latents += made
            print(f"{100 * (i + 1)} groups", flush=True)
    by_bucket = {}
    for bucket in range(len(BUCKETS_PX)):
        numbers = [i for i in range(num_groups) if group_of(i)[0] == bucket]
        by_bucket[bucket] = (torch.tensor(numbers), torch.stack([latents[i] for i in numbers]))
    torch.save(by_bucket, folder / "flux2_latents.pt")


@torch.no_grad()
def text_states(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, texts: list[str]) -> Tensor:
    """What the denoiser reads of each text, (B, L, D), as FLUX.2 klein's pipeline makes it."""
    ids, mask, _ = batch_of(tokenizer, texts, length=WINDOW)
    hidden = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False
    ).hidden_states
    return torch.cat([hidden[layer] for layer in OUT_LAYERS], dim=2)


def prompts_of(index: int, edition: int) -> list[str]:
    """GROUP descriptions of a group's scenes, then EDITS instructions; another `edition` has other words."""
    rng = generator(SEED, "prompts", edition, index)
    _, scenes = group_of(index)
    blank = blank_words()
    texts = []
    for scene in scenes:
        text = describe(scene, rng)[0]
        if rng.random() < 0.05:
            text = f"{text}, {blank[int(rng.integers(len(blank)))]}"
        texts.append(text)
    return texts + [instruct(scenes[e.before], scenes[e.after], rng)[0] for e in edits_of(index)]


@cache
def blank_words() -> list[str]:
    """Words that name nothing in training; never the new things."""
    return [word for word in words() if word not in {*silhouettes(), *NEW_SHAPES, *sentence_words()}]


def _states_of(numbers: range, folder: Path, edition: int) -> NDArray[np.float16]:
    torch.set_num_threads(1)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "flux2_tokenizer")
    model = Qwen3ForCausalLM.from_pretrained(folder / "flux2_text").eval()
    texts = [text for index in numbers for text in prompts_of(index, edition)]
    made = [text_states(model, tokenizer, texts[i : i + 64]) for i in range(0, len(texts), 64)]
    return torch.cat(made).to(torch.float16).numpy()


def cache_prompts(folder: Path, num_groups: int, *, workers: int, edition: int) -> None:
    """Leaves flux2_prompts.npy, (groups, GROUP + EDITS, L, D) in fp16, and flux2_empty.pt, (L, D)."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "flux2_tokenizer")
    model = Qwen3ForCausalLM.from_pretrained(folder / "flux2_text").eval()
    torch.save(text_states(model, tokenizer, [empty()[0]])[0], folder / "flux2_empty.pt")
    path, each = folder / f"flux2_prompts{edition}.npy", GROUP + EDITS
    shape = (num_groups, each, WINDOW, len(OUT_LAYERS) * WIDTH)
    kept = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.float16, shape)
    parts = [range(start, min(start + 50, num_groups)) for start in range(0, num_groups, 50)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        states = pool.map(partial(_states_of, folder=folder, edition=edition), parts)
        for part, made in zip(parts, states, strict=True):
            kept[part.start : part.stop] = made.reshape(len(part), each, *shape[2:])
            print(f"{part.stop} groups", flush=True)
    kept.flush()
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["latents", "prompts"])
    parser.add_argument("--groups", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--edition", type=int, default=0, help="of the prompts: another one, other words")
    args = parser.parse_args()
    if args.what == "latents":
        cache_latents(args.folder, args.groups, workers=args.workers)
    else:
        cache_prompts(args.folder, args.groups, workers=args.workers, edition=args.edition)
