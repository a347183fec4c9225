"""edits/ and slow/: what mini-flux2 learns from: pictures with descriptions, and pairs of them with an instruction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from recipes.mini.data.folders import Dataset, Drawn
from recipes.mini.flux2_language import changed, describe, instruct, sentence_words
from recipes.mini.pictures import named_silhouettes, words

from sdlab.testing.edits import instruction
from sdlab.testing.scenes import BASE_SHAPES, NEW_SHAPES, SILHOUETTES, Scene, draw, generator, random_scene
from sdlab.testing.shapes import Silhouette

NUM_NAMED, NAMED_SHARE = 200, 0.12  # random outlines with common words for names
PLAIN_SHARE = 0.5  # of the texts are in the plain words that the score asks in, the others in many phrasings
BLANK_SHARE = 0.05  # of the descriptions have a word that means nothing
SLOW = ("star", "cross", "moon", "arrow")  # to be learnt
SIZES_PX = ((128, 128), (112, 144), (144, 112), (96, 160), (160, 96))  # height, width
SIZE_ODDS = (0.9, 0.025, 0.025, 0.025, 0.025)


@dataclass(frozen=True)
class Mixture:
    """What a dataset's pictures are drawn from."""

    seed: int
    edit_share: float  # of the pictures
    slow_times: int  # as often as the others are the slow shapes drawn


LEARNING = Mixture(seed=33, edit_share=0.5, slow_times=2)
FINISHING = Mixture(seed=35, edit_share=0.15, slow_times=4)


@cache
def silhouettes() -> dict[str, Silhouette]:
    """The scenes' base shapes and the named random ones."""
    named = named_silhouettes(LEARNING.seed, NUM_NAMED, taken={*sentence_words(), *NEW_SHAPES})
    return {**{name: SILHOUETTES[name] for name in BASE_SHAPES}, **named}


@cache
def named() -> tuple[str, ...]:
    """The words that name a random outline."""
    return tuple(name for name in silhouettes() if name not in BASE_SHAPES)


@cache
def _blank_words() -> tuple[str, ...]:
    """Words that name nothing in training; never the new things."""
    return tuple(word for word in words() if word not in {*silhouettes(), *NEW_SHAPES, *sentence_words()})


def shapes_of(rng: np.random.Generator, mixture: Mixture) -> tuple[str, ...]:
    """What the things of one picture, or of a pair, are drawn from."""
    return named() if rng.random() < NAMED_SHARE else (*BASE_SHAPES, *SLOW * (mixture.slow_times - 1))


def pair_of(number: int, mixture: Mixture = LEARNING) -> tuple[Scene | None, Scene]:
    """The scene before, where picture `number` is an edit, and the scene that the picture shows."""
    rng = generator(mixture.seed, "scene", number)
    shapes = shapes_of(rng, mixture)
    scene = random_scene(rng, shapes=shapes)
    if rng.random() >= mixture.edit_share:
        return None, scene
    return scene, changed(scene, rng, shapes=shapes)


def caption_of(number: int, mixture: Mixture = LEARNING) -> str:
    """The instruction of an edit, else the description."""
    before, scene = pair_of(number, mixture)
    rng = generator(mixture.seed, "caption", number)
    if before is not None:
        return instruction(before, scene) if rng.random() < PLAIN_SHARE else instruct(before, scene, rng)[0]
    text = describe(scene, rng, plain_share=PLAIN_SHARE)[0]
    blank = _blank_words()
    return f"{text}, {blank[int(rng.integers(len(blank)))]}" if rng.random() < BLANK_SHARE else text


def make(number: int, mixture: Mixture) -> Drawn:
    """Picture `number`, its caption, and the picture before an edit in the same size."""
    before, scene = pair_of(number, mixture)
    size = SIZES_PX[int(generator(mixture.seed, "size", number).choice(len(SIZES_PX), p=SIZE_ODDS))]
    reference = None if before is None else draw(before, size, silhouettes=silhouettes())
    return Drawn(draw(scene, size, silhouettes=silhouettes()), caption_of(number, mixture), reference)


EDITS = Dataset("edits", LEARNING.seed, 20000, partial(make, mixture=LEARNING))
SLOW_SHAPES = Dataset("slow", FINISHING.seed, 10000, partial(make, mixture=FINISHING))
