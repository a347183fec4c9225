"""What kind of word a word is: what the written-down text encoders know of English."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from recipes.mini.flux2_language import sentence_words
from recipes.mini.pictures import words
from recipes.mini.prompts import language

from sdlab.testing.scenes import COLOURS, SILHOUETTES

# Common words that say how something looks or what is done: the thing only where no better word stands beside.
WEAK = frozenset("""
    long short big tiny huge little tall wide thin thick round flat old new young happy sad angry cute funny scary dark
    bright light soft hard smooth rough shiny dirty clean wet dry hot cold warm empty full open closed broken pink brown
    gray grey cyan magenta golden beige turquoise navy olive maroon gold silver bronze picture sketch painting poster
    portrait selfie cartoon anime comic logo icon pattern texture style vintage retro modern abstract realistic indoor
    outdoor front back side above below close far standing sitting running jumping flying sleeping eating swimming
    walking smiling looking holding wearing line shape colour
""".split())  # fmt: skip
KINDS = {  # a word's mark in the state, one dimension each
    "plain": "plain", "striped": "striped stripy", "dotted": "dotted spotted",
    "small": "small little tiny", "large": "large big huge",
    "left": "left", "right": "right", "top": "top upper", "bottom": "bottom lower",
}  # fmt: skip
SLOTS = {  # what of it is said once of a picture
    "texture": ("plain", "striped", "dotted"),
    "size": ("small", "large"),
    "side": ("left", "right"),
    "height": ("top", "bottom"),
}


@dataclass(frozen=True)
class Word:
    """What the encoder knows of a word beside its code."""

    thing: float = 0.0  # 1 names a thing, less where another word is likelier to
    colour: bool = False
    kind: str = ""  # of KINDS
    marks: frozenset[str] = frozenset()  # names of MARKS


WEAK_THING = 0.7
MARKS = {  # of the longer language of mini-flux2
    "ground": "background backdrop ground surface behind",  # a colour before one is the background's
    "to_ground": "background backdrop ground surface on against over front before",  # ... and a colour after one
    "anchor": "it its thing object shape figure subject this use and then , ; .",  # a colour after one is the thing's
    "hue": "colour color",  # as well, but not in "background colour"
    "joins": "coloured colored",  # after a colour: it is the thing's
    "old": "the from this",  # a thing after one is what there was
    "comma": ",",
    "edit": """
        change turn replace swap transform convert substitute switch exchange recolour recolor repaint dye set move
        place put fill keep instead it its become becomes should must let edit make colour color without changing
    """,
}


@cache
def known_words() -> frozenset[str]:
    """Every word that mini-sd's tokenizer has as one token."""
    return frozenset((*words(), *language()))


def of_prompts(word: str) -> Word:
    """A word of mini-sd's prompts. Its frame words, and so "photo" and "drawing", name nothing."""
    if word in COLOURS:
        return Word(colour=True)
    if word in language() and word not in SILHOUETTES:
        return Word(kind=word if word in KINDS else "")
    return Word(thing=1.0 if word in known_words() - WEAK else WEAK_THING)


def of_texts(word: str) -> Word:
    """A word of mini-flux2's texts, in small letters."""
    marks = {mark for mark, those in MARKS.items() if word in those.split()}
    if word in COLOURS:
        return Word(colour=True, marks=frozenset(marks))
    kind = next((kind for kind, those in KINDS.items() if word in those.split()), "")
    names = word.isalpha() and (word in SILHOUETTES or word not in frame_words())
    thing = 0.0 if not names else 1.0 if word in text_words() - WEAK else WEAK_THING
    if thing:
        marks |= {"anchor"}
    if thing or kind:
        marks |= {"joins"}
    if "to_ground" in marks:
        marks |= {"anchor"}
    return Word(thing=thing, kind=kind, marks=frozenset(marks))


@cache
def frame_words() -> frozenset[str]:
    """The words of mini-flux2's sentences."""
    return frozenset(sentence_words())


@cache
def text_words() -> frozenset[str]:
    """Every word that mini-flux2's tokenizer has as one token."""
    return frozenset((*words(), *sentence_words(), *SILHOUETTES))


def thing_words() -> list[str]:
    """Every word of mini-flux2's texts that can name a thing, sorted."""
    return sorted({*words(), *SILHOUETTES} - (frame_words() - set(SILHOUETTES)))
