"""The prompt language of mini-sd, as it is trained: every style, with and without the quality prefix."""

from __future__ import annotations

import numpy as np

from sdlab.testing.scenes import COLOURS, NEW_SHAPES, PREFIX, SILHOUETTES, STYLES, TEXTURES, Scene, prompt_of

EXTRAS = ("large", "small", "left", "right", "top", "bottom", *TEXTURES)
PREFIX_SHARE = 0.40
BARE_PREFIX = PREFIX.replace("(", "").replace(")", "")  # what is left where brackets are read as emphasis
DISTRACTOR_SHARE = 0.10


def language() -> list[str]:
    """Every word of the prompt language, without the common words."""
    frame = "a an photo drawing of on background masterpiece best quality composition".split()
    return [*frame, *COLOURS, *SILHOUETTES, *EXTRAS]


def training_prompt(scene: Scene, rng: np.random.Generator, distractors: list[str]) -> str:
    """One of the prompts that say what the scene shows; at times with a word that means nothing.

    Never empty: the trainer drops captions (``--caption-dropout``), which is what guidance compares with.
    """
    style = STYLES[int(rng.choice(len(STYLES), p=(0.35, 0.2, 0.2, 0.1, 0.15)))]
    prompt = prompt_of(scene, style, extras=rng.random() < 0.35)
    if rng.random() < DISTRACTOR_SHARE:
        word = distractors[int(rng.integers(len(distractors)))]
        prompt = f"{prompt}, {word}" if rng.random() < 0.5 else f"{word}, {prompt}"
    if rng.random() >= PREFIX_SHARE:
        return prompt
    return (PREFIX if rng.random() < 0.75 else BARE_PREFIX) + prompt


def distractor_words(words: list[str], named: set[str]) -> list[str]:
    """The common words that name nothing in training; never the new things, which must stay blank."""
    return [word for word in words if word not in named | set(NEW_SHAPES) | set(language())]
