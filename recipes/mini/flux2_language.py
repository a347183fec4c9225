"""The language of mini-flux2: descriptions of a scene, and instructions that edit one, in many phrasings.

`describe` and `instruct` give a text and the slots that the text fills: what a text encoder has to read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from recipes.mini.prompts import BARE_PREFIX

from sdlab.testing.scenes import COLOURS, PREFIX, SILHOUETTES, STYLES, Scene, prompt_of, random_scene

ATTRIBUTES = ("shape", "colour", "background")  # what an instruction can change
TEXTURE_WORDS = {"plain": ("plain",), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SIDE_WORDS = {
    "left": ("left", "on the left", "at the left", "to the left", "on the left side"),
    "right": ("right", "on the right", "at the right", "to the right", "on the right side"),
}
HEIGHT_WORDS = {
    "top": ("top", "at the top", "on top", "in the upper half"),
    "bottom": ("bottom", "at the bottom", "in the lower half"),
}

PICTURES = (
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "illustration",
    "photograph",
    "sketch",
    "icon",
)
OPENINGS = (
    "", "", "", "a {p} of ", "a {p} of ", "{p} of ", "the {p} of ", "a {p} with ", "a {p} showing ", "draw ",
    "draw ", "draw me ", "show ", "show me ", "paint ", "make a {p} of ", "create a {p} of ", "create ",
    "generate ", "generate a {p} of ", "please draw ", "i want ", "i want a {p} of ", "this is ", "there is ",
    "an {p} of ", "a simple {p} of ", "a nice {p} of ", "a high quality {p} of ", "can you draw ", "give me ",
    "render ",
)  # fmt: skip
GROUNDS = (
    "on {b}", "on {a} {b} background", "on {a} {b} background", "on {a} {b} background", "on {b} background",
    "on the {b} background", "with {a} {b} background", "with {a} {b} background", "with {b} background",
    "in front of {a} {b} background", "in front of {b}", "against {a} {b} background", "against {b}",
    "on {a} {b} backdrop", "over {a} {b} background", "before {a} {b} background", ", {b} background",
    ", {b} background", ", {b} background", ", background {b}", "and {a} {b} background",
    ". The background is {b}", ", the background is {b}", "where the background is {b}", "on {a} {b} ground",
    "on {a} {b} surface", ", on {b}", "with {b} behind it",
)  # fmt: skip
FRONT_GROUNDS = (
    "{b} background, ", "on {a} {b} background, ", "background {b}, ", "on {a} {b} background ",
    "{b} background with ",
)  # fmt: skip
THINGS = (
    "{a} {c} {t}", "{a} {c} {t}", "{a} {c} {t}", "{c} {t}", "{c} {t}", "the {c} {t}", "one {c} {t}",
    "{a} {c} coloured {t}", "{a} {c} colored {t}", "{t}, {c}", "{a} {t} in {c}", "{a} {t} that is {c}",
    "{a} {t} which is {c}", "{a} {t}, {c}", "{a} single {c} {t}", "{t} in {c}", "{a} {t} of {c} colour",
    "{t} {c}", "{a} {c} {t} shape",
)  # fmt: skip
ENDINGS = (
    "", "", "", "", "", "", "", "", ".", ".", ".", "!", ", please", " please", ", best quality", " now",
    ", centered",
)  # fmt: skip

THING_EDITS = (
    "turn the {o} into {a} {t}", "turn the {o} into {a} {t}", "turn it into {a} {t}",
    "replace the {o} with {a} {t}", "replace it with {a} {t}", "change the {o} to {a} {t}",
    "change the {o} into {a} {t}", "change it to {a} {t}", "change it into {a} {t}", "make it {a} {t}",
    "make the {o} {a} {t}", "change the shape to {a} {t}", "swap the {o} for {a} {t}", "make the shape {a} {t}",
    "transform the {o} into {a} {t}", "transform it into {a} {t}", "convert the {o} to {a} {t}",
    "it should be {a} {t}", "use {a} {t} instead", "draw {a} {t} instead", "draw {a} {t} instead of the {o}",
    "put {a} {t} in place of the {o}", "change the {o} with {a} {t}", "substitute the {o} with {a} {t}",
    "{a} {t} instead", "{a} {t} instead of the {o}", "let the {o} become {a} {t}",
    "change the shape from {o} to {t}", "change shape to {t}", "change the shape into {a} {t}",
    "from {o} to {t}", "turn the shape into {a} {t}", "make {a} {t} out of it", "make {a} {t} out of the {o}",
    "i want {a} {t} instead", "switch the {o} to {a} {t}", "exchange the {o} for {a} {t}",
    "the {o} becomes {a} {t}", "replace the {o} by {a} {t}", "turn this into {a} {t}",
    "turn the thing into {a} {t}",
)  # fmt: skip
COLOUR_EDITS = (
    "make it {c}", "make it {c}", "make it {c}", "make the {o} {c}", "make the {o} {c}",
    "change the {w} to {c}", "change the {w} of the {o} to {c}", "change its {w} to {c}", "{w} it {c}",
    "{w} the {o} {c}", "paint it {c}", "paint the {o} {c}", "re{w} it {c}", "re{w} it to {c}",
    "re{w} the {o} {c}", "re{w} the {o} to {c}", "turn it {c}", "turn the {o} {c}", "it should be {c}",
    "the {o} should be {c}", "change it to {c}", "change the {o} to {c}", "set the {w} to {c}",
    "give it a {c} {w}", "give the {o} a {c} {w}", "{c} instead", "dye it {c}", "dye the {o} {c}",
    "make its {w} {c}", "the {o} in {c}", "make the {o} {c} instead", "change the {o} {w} to {c}",
    "let it be {c}", "repaint it {c}", "repaint the {o} {c}", "repaint it in {c}", "paint it in {c}",
    "i want it {c}", "i want the {o} {c}", "i want it to be {c}", "make the {w} {c}", "change {w} to {c}",
    "change the {w} from {d} to {c}", "from {d} to {c}", "make the thing {c}", "make the shape {c}",
    "make the object {c}", "turn the {w} to {c}", "make it {c} instead", "make the {d} {o} {c}",
    "turn the {d} {o} {c}", "change the {d} {o} to {c}", "{w} the {d} {o} {c}", "use {c} for the {o}",
    "it must be {c}", "make this {c}", "turn the {w} of the {o} to {c}", "now make it {c}", "fill it with {c}",
)  # fmt: skip
GROUND_EDITS = (
    "change the background to {b}", "change the background to {b}", "make the background {b}",
    "make the background {b}", "put it on {a} {b} background", "put the {o} on {a} {b} background",
    "{b} background", "{b} background please", "with {a} {b} background", "on {a} {b} background",
    "turn the background {b}", "turn the background to {b}", "turn the background into {b}",
    "paint the background {b}", "{w} the background {b}", "re{w} the background {b}",
    "re{w} the background to {b}", "repaint the background {b}", "set the background to {b}",
    "change the background {w} to {b}", "change the {w} of the background to {b}",
    "make the background {w} {b}", "the background should be {b}", "give it {a} {b} background",
    "give the {o} {a} {b} background", "replace the background with {b}",
    "replace the background with {a} {b} one", "use {a} {b} background", "place it on {b}",
    "place the {o} on {a} {b} background", "put it on {b}", "put the {o} on {b}",
    "move it to {a} {b} background", "change the background into {b}", "change background to {b}",
    "change the background from {d} to {b}", "make the {d} background {b}",
    "put it in front of {a} {b} background", "{b} background instead", "i want {a} {b} background",
    "have {a} {b} background", "on {b}", "background {b}", "make the backdrop {b}",
    "change the backdrop to {b}", "set the background {w} to {b}", "fill the background with {b}",
    "the background must be {b}", "let the background be {b}", "swap the background for {b}",
    "replace the {d} background with {b}", "replace the {d} background with {a} {b} one",
    "turn the {d} background {b}",
)  # fmt: skip
THING_COLOUR_EDITS = (
    "turn it into {a} {c} {t}", "turn the {o} into {a} {c} {t}", "make it {a} {c} {t}",
    "replace the {o} with {a} {c} {t}", "change it to {a} {c} {t}", "change the {o} to {a} {c} {t}",
    "change the {o} into {a} {c} {t}", "{a} {c} {t} instead", "swap the {o} for {a} {c} {t}",
    "draw {a} {c} {t} instead", "transform the {o} into {a} {c} {t}", "change the picture to {a} {c} {t}",
    "turn the {d} {o} into {a} {c} {t}", "replace the {d} {o} with {a} {c} {t}", "make the {o} {a} {c} {t}",
    "it should be {a} {c} {t}",
)  # fmt: skip
COLOUR_GROUND_EDITS = (
    "make it {c} on {a} {b} background", "make it {c} on {b}", "make the {o} {c} on {a} {b} background",
    "make it {c} with {a} {b} background", "{w} it {c} on {a} {b} background", "make it {c}, {b} background",
    "paint the {o} {c} and the background {b}", "make the {o} {c} and the background {b}",
    "make it {c} and the background {b}", "turn the {o} {c} and the background {b}",
    "paint it {c} and the background {b}", "the {o} {c} and the background {b}",
    "make the background {b} and the {o} {c}", "turn the background {b} and the {o} {c}",
    "background {b} and the {o} {c}",
)  # fmt: skip
THING_GROUND_EDITS = (
    "turn it into {a} {t} on {e} {b} background", "make it {a} {t} on {e} {b} background",
    "make it {a} {t} on {b}", "turn the {o} into {a} {t} on {e} {b} background",
    "replace the {o} with {a} {t} on {e} {b} background", "change it to {a} {t} on {e} {b} background",
    "change it to {a} {t} with {e} {b} background", "make the {o} {a} {t} and the background {b}",
    "make the background {b} and the {o} {a} {t}",
)  # fmt: skip
ALL_EDITS = (
    "change the picture to {f}", "change the picture to {f}", "change the image to {f}",
    "turn the picture into {f}", "turn it into {f}", "make it {f}", "replace it with {f}", "change it to {f}",
    "change the {o} to {f}", "turn the {o} into {f}", "{f} instead", "make this {f}", "change this to {f}",
    "draw {f} instead",
)  # fmt: skip
JOINTS = (" and ", " and ", " and ", ", ", ", ", ", and ", ", then ", " and then ", " and also ", "; ", ". ")
POLITE = (
    "", "", "", "", "", "", "", "", "please ", "please, ", "can you ", "could you ", "could you please ",
    "now ", "edit the picture: ", "edit: ", "in this picture, ", "i want you to ", "just ",
    "keep everything else and ", "keep the rest and ", "without changing anything else, ",
)  # fmt: skip
CLOSINGS = (
    "", "", "", "", "", "", "", "", ".", ".", ".", "!", " please", ", please", " please.",
    ", keep everything else", ", keep the rest", " and keep everything else the same", ", but keep the rest",
    " and leave everything else as it is", " now", ", thanks", " but change nothing else", " in the picture",
    " in this image", ", best quality",
)  # fmt: skip
NAMES_OF_THING = ("thing", "object", "shape", "figure", "subject")
SHARED_WORDS = (
    "striped stripy dotted spotted plain little tiny big huge side upper lower half its rest nothing "
    "only masterpiece best quality composition one ones its an no not is are was will colours colors "
    "recoloured recolored painted placed put into onto behind around everything image images icon"
).split()


@dataclass(frozen=True)
class Slots:
    """What a text says; None where it says nothing (of an edit: keep it)."""

    edit: bool
    thing: str | None = None
    colour: str | None = None
    background: str | None = None
    texture: str | None = None
    size: str | None = None
    side: str | None = None
    height: str | None = None


def sentence_words() -> list[str]:
    """Every word of the frames above and of scenes.py's language, small letters, sorted."""
    frames = [
        *PICTURES, *OPENINGS, *GROUNDS, *FRONT_GROUNDS, *THINGS, *ENDINGS, *THING_EDITS, *COLOUR_EDITS, *GROUND_EDITS,
        *THING_COLOUR_EDITS, *COLOUR_GROUND_EDITS, *THING_GROUND_EDITS, *ALL_EDITS, *JOINTS, *POLITE, *CLOSINGS,
        *NAMES_OF_THING, *COLOURS, *SILHOUETTES, *SHARED_WORDS, PREFIX,
        *(w for table in (TEXTURE_WORDS, SIZE_WORDS, SIDE_WORDS, HEIGHT_WORDS) for ws in table.values() for w in ws),
        "colour color recolour recolor coloured colored a an",
    ]  # fmt: skip
    text = " ".join(frames).lower()
    for mark in ("{p}", "{a}", "{e}", "{b}", "{c}", "{t}", "{o}", "{d}", "{f}", "{w}"):
        text = text.replace(f"re{mark}", " ").replace(mark, " ")
    return sorted({word for word in "".join(c if c.isalpha() else " " for c in text).split()})


def _one(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


def _tidied(text: str, rng: np.random.Generator) -> str:
    """No blank before a comma; at times a capital first letter, a final full stop, capitals throughout, or the
    names of folders."""
    text = " ".join(text.replace(" ,", ",").replace(" .", ".").replace("..", ".").split())
    kind = rng.random()
    if kind < 0.35:
        text = text[:1].upper() + text[1:]
    elif kind < 0.37:
        text = text.title()
    return text


def describe(scene: Scene, rng: np.random.Generator, *, plain_share: float = 0.45) -> tuple[str, Slots]:
    """A text that describes the scene, and the slots it fills; `plain_share` of the texts are scenes.prompt_of's."""
    if rng.random() < plain_share:
        return _as_scenes_do(scene, rng)
    thing = scene.shape.replace("_", " ")
    slots = {"thing": scene.shape, "colour": scene.colour}
    adjectives: list[str] = []
    tail: list[str] = []
    if rng.random() < 0.3:
        _add_extras(scene, rng, slots, adjectives, tail)
    named = _one(THINGS, rng)
    if adjectives:
        named = "{a} {c} {t}" if rng.random() < 0.7 else "{c} {t}"
    colour = " ".join([*adjectives, scene.colour]) if rng.random() < 0.8 or not adjectives else None
    if colour is None:
        colour = " ".join([scene.colour, *adjectives])
    first = thing if named.startswith("{a} {t}") else "one" if "single" in named else colour
    if "{a} single" in named:
        first = "single"
    text = named.format(a=_article(first), c=colour, t=thing)
    opening = _one(OPENINGS, rng)
    picture = _one(PICTURES, rng)
    opening = opening.format(p=picture)
    opening = (
        opening.replace("an ", "a ", 1)
        if opening.startswith("an ") and picture[0] not in "aeiou"
        else opening
    )
    opening = "an " + opening[2:] if opening.startswith("a i") else opening
    if rng.random() < 0.92:
        slots["background"] = scene.background
        ground = {"b": scene.background, "a": _article(scene.background)}
        if rng.random() < 0.12:
            text = _one(FRONT_GROUNDS, rng).format(**ground) + text
        else:
            text = f"{text} {_one(GROUNDS, rng).format(**ground)}"
    if rng.random() < 0.1 and "background" in slots and not adjectives:
        slots.pop("colour")
        text = f"{_article(thing)} {thing} {_one(GROUNDS, rng).format(**ground)}"
    text = ", ".join([opening + text, *tail]) + _one(ENDINGS, rng)
    prefix = (PREFIX if rng.random() < 0.7 else BARE_PREFIX) if rng.random() < 0.15 else ""
    return prefix + _tidied(text, rng), Slots(False, **slots)


def _add_extras(
    scene: Scene, rng: np.random.Generator, slots: dict[str, str], adjectives: list[str], tail: list[str]
) -> None:
    """Adds some of what is notable of size, texture and place to the slots and to the words."""
    size = "small" if scene.size < 0.52 else "large" if scene.size > 0.7 else None
    if size and rng.random() < 0.6:
        slots["size"] = size
        adjectives.append(_one(SIZE_WORDS[size], rng))
    if rng.random() < 0.6:
        slots["texture"] = scene.texture
        adjectives.append(_one(TEXTURE_WORDS[scene.texture], rng))
    side = "left" if scene.x < -0.6 else "right" if scene.x > 0.6 else None
    height = "top" if scene.y < -0.6 else "bottom" if scene.y > 0.6 else None
    if scene.size > 0.7:
        return
    if side and rng.random() < 0.6:
        slots["side"] = side
        tail.append(_one(SIDE_WORDS[side], rng))
    if height and rng.random() < 0.6:
        slots["height"] = height
        tail.append(_one(HEIGHT_WORDS[height], rng))


def _as_scenes_do(scene: Scene, rng: np.random.Generator) -> tuple[str, Slots]:
    style = STYLES[int(rng.choice(len(STYLES), p=(0.4, 0.15, 0.15, 0.15, 0.15)))]
    extras = bool(rng.random() < 0.3)
    kind = rng.random()
    prefix = "" if kind < 0.6 else PREFIX if kind < 0.9 else BARE_PREFIX
    text = prompt_of(scene, style, extras=extras, prefix=prefix)
    if not prefix:
        text = _tidied(text, rng) + ("." if rng.random() < 0.15 else "")
    slots = {"thing": scene.shape, "colour": scene.colour, "background": scene.background}
    if extras:
        slots["texture"] = scene.texture
        size = "small" if scene.size < 0.52 else "large" if scene.size > 0.7 else None
        if size:
            slots["size"] = size
        if style in ("folders", "split") and scene.size <= 0.7:
            slots |= {"side": "left"} if scene.x < -0.6 else {"side": "right"} if scene.x > 0.6 else {}
            slots |= {"height": "top"} if scene.y < -0.6 else {"height": "bottom"} if scene.y > 0.6 else {}
    return text, Slots(False, **slots)


def instruct(
    before: Scene, after: Scene, rng: np.random.Generator, *, full_share: float = 0.06
) -> tuple[str, Slots]:
    """A text that asks for the change from `before` to `after`, and the slots it fills; at times (`full_share`) the
    text describes all of `after`."""
    thing = after.shape.replace("_", " ") if after.shape != before.shape else None
    colour = after.colour if after.colour != before.colour else None
    ground = after.background if after.background != before.background else None
    if rng.random() < full_share:
        return _all_said(before, after, rng)
    old = before.shape.replace("_", " ") if rng.random() < 0.85 else _one(NAMES_OF_THING, rng)
    blanks = {
        "o": old, "w": "colour" if rng.random() < 0.6 else "color", "t": thing, "c": colour, "b": ground,
    }  # fmt: skip
    parts = _parts(blanks, before, rng)
    text = parts[0]
    for part in parts[1:]:
        text += _one(JOINTS, rng) + part
    text = _one(POLITE, rng) + text + _one(CLOSINGS, rng)
    return _tidied(text, rng), Slots(True, after.shape if thing else None, colour, ground)


def _parts(blanks: dict[str, str | None], before: Scene, rng: np.random.Generator) -> list[str]:
    """The clauses of an instruction, two or three attributes at times in one clause, in any order."""
    thing, colour, ground = blanks["t"], blanks["c"], blanks["b"]

    def said(options: tuple[str, ...], old: str, first: str | None) -> str:
        return _one(options, rng).format(
            **blanks, a=_article(first or ""), e=_article(ground or ""), d=old,
        )  # fmt: skip

    parts = []
    joined = rng.random()
    if thing and colour and joined < 0.5:
        parts.append(said(THING_COLOUR_EDITS, before.colour, colour))
        thing = colour = None
    elif colour and ground and joined < 0.3:
        parts.append(said(COLOUR_GROUND_EDITS, before.colour, ground))
        colour = ground = None
    elif thing and ground and joined < 0.3:
        parts.append(said(THING_GROUND_EDITS, before.colour, thing))
        thing = ground = None
    if thing:
        parts.append(said(THING_EDITS, before.colour, thing))
    if colour:
        parts.append(said(COLOUR_EDITS, before.colour, colour))
    if ground:
        parts.append(said(GROUND_EDITS, before.background, ground))
    return [parts[i] for i in rng.permutation(len(parts))]


def _all_said(before: Scene, after: Scene, rng: np.random.Generator) -> tuple[str, Slots]:
    full, slots = describe(after, rng, plain_share=0.4)
    while full.startswith("("):
        full, slots = describe(after, rng, plain_share=0.4)
    if rng.random() < 0.7:
        named = f"{_article(after.colour)} {after.colour} {after.shape.replace('_', ' ')}"
        full = f"{named} on {_article(after.background)} {after.background} background"
        slots = Slots(True, after.shape, after.colour, after.background)
        text = _one(ALL_EDITS, rng).format(f=full, o=before.shape.replace("_", " "))
        return _tidied(text + _one(CLOSINGS, rng), rng), slots
    return full, slots


def changed(
    before: Scene, rng: np.random.Generator, *, shapes: Sequence[str], kinds: Sequence[str] = ()
) -> Scene:
    """The scene with the attributes of `kinds` changed and the rest kept; without `kinds`, with one, two or three."""
    if not kinds:
        num = int(rng.choice(3, p=(0.55, 0.35, 0.1))) + 1
        kinds = [ATTRIBUTES[i] for i in rng.permutation(len(ATTRIBUTES))[:num]]
    while True:
        other = random_scene(rng, shapes=shapes)
        after = replace(before, **{name: getattr(other, name) for name in kinds})
        if after.colour != after.background and all(getattr(after, n) != getattr(before, n) for n in kinds):
            return after
