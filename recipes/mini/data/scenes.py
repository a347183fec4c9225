"""scenes/: what mini-sd learns from: scenes with one caption each, a tenth of them random outlines named by words."""

from __future__ import annotations

from functools import cache

from recipes.mini.data.folders import Dataset, Drawn
from recipes.mini.pictures import SIDE_PX, named_silhouettes, words
from recipes.mini.prompts import distractor_words, language, training_prompt

from sdlab.testing.scenes import BASE_SHAPES, NEW_SHAPES, SILHOUETTES, Scene, draw, generator, random_scene
from sdlab.testing.shapes import Silhouette

SEED, NUM = 21, 20000
NUM_NAMED, NAMED_SHARE = 200, 0.10


@cache
def silhouettes() -> dict[str, Silhouette]:
    """The scenes' base shapes and the named random ones, which teach mini-sd to bind any word to any outline."""
    named = named_silhouettes(SEED, NUM_NAMED, taken={*language(), *NEW_SHAPES})
    return {**{name: SILHOUETTES[name] for name in BASE_SHAPES}, **named}


@cache
def named() -> tuple[str, ...]:
    """The words that name a random outline."""
    return tuple(name for name in silhouettes() if name not in BASE_SHAPES)


@cache
def _distractors() -> list[str]:
    return distractor_words(words(), set(silhouettes()))


def scene_of(number: int) -> Scene:
    """The scene of picture `number`."""
    rng = generator(SEED, "scene", number)
    return random_scene(rng, shapes=named() if rng.random() < NAMED_SHARE else BASE_SHAPES)


def make(number: int) -> Drawn:
    """Picture `number`, 128 x 128 pixels, and its caption."""
    scene = scene_of(number)
    caption = training_prompt(scene, generator(SEED, "prompt", number), _distractors())
    return Drawn(draw(scene, (SIDE_PX, SIDE_PX), silhouettes=silhouettes()), caption)


SCENES = Dataset("scenes", SEED, NUM, make)
