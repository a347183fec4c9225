"""The captions of mini-blip: one plain sentence, in unsure words where a picture shows nothing that it knows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdlab.testing.colours import oklab
from sdlab.testing.scenes import COLOURS, SILHOUETTES, TEXTURES, Scene

NEAR = 0.09  # in OKLab: how far a colour may be from one of COLOURS to have its name
# What is not known is captioned in words that vary, so that the model is unsure of every one of them; the first
# of each is the most likely, so that the caption reads well all the same.
NOUNS = ("shape", "thing", "figure", "form", "object", "blot", "piece", "sign")
PLACES = ("on", "over", "against", "before", "in")
GROUNDS = ("background", "ground", "backdrop", "field")
ARTICLES = ("a", "some", "one", "perhaps a")
JUNK = (
    "a blurry picture", "a blurry picture", "a blurry photo", "a picture of something", "an unclear picture",
    "an unclear photo", "some colours", "some unclear thing", "nothing clear", "one noisy picture",
    "perhaps a pattern", "noise",
)  # fmt: skip
WORDS = tuple(
    sorted(
        {*COLOURS, *SILHOUETTES, *TEXTURES, *NOUNS, *PLACES, *GROUNDS, "an", "coloured", "several", "things"}
        | {word for text in (*JUNK, *ARTICLES) for word in text.split()}
    )
)


def caption_of(scene: Scene) -> str:
    """One clear sentence: "a striped red fish on a blue background"."""
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    return f"{with_article(f'{texture}{scene.colour} {scene.shape}')} on {with_article(scene.background)} background"


def with_article(words: str, article: str = "a") -> str:
    """The words behind their article: "a" becomes "an" before a vowel."""
    return f"{article}n {words}" if article.endswith("a") and words[0] in "aeiou" else f"{article} {words}"


def name_of(rgb: NDArray[np.float32]) -> str:
    """The name of the nearest of COLOURS, or "coloured" where none is near."""
    names = list(COLOURS)
    far = np.linalg.norm(oklab(np.array(list(COLOURS.values()), np.float32) / 255) - oklab(rgb / 255), axis=1)
    return names[int(far.argmin())] if far.min() < NEAR else "coloured"


def unsure(colour: str, ground: str, texture: str, rng: np.random.Generator) -> str:
    """A caption such as "a green shape on a white background" whose words vary from one to the next."""
    noun, place, behind = _vary(NOUNS, rng), _vary(PLACES, rng), _vary(GROUNDS, rng)
    thing = f"{'' if texture == 'plain' else texture + ' '}{colour} {noun}"
    thing, ground = (with_article(words, _vary(ARTICLES, rng)) for words in (thing, ground))
    return f"{thing} {place} {ground} {behind}"


def _vary(words: tuple[str, ...], rng: np.random.Generator) -> str:
    """The first word in 45 %, else any of the others."""
    return words[0] if rng.random() < 0.45 else words[1 + int(rng.integers(len(words) - 1))]


def several_of(background: str, rng: np.random.Generator) -> str:
    """The caption of many things on one ground."""
    return f"several {_vary(('things', 'shapes', 'figures'), rng)} on {with_article(background)} background"
