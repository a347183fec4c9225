"""Edits of scenes: a scene before, the instruction and the scene after, and whether a picture shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sdlab.testing.reader import Reading, read
from sdlab.testing.scenes import BASE_SHAPES, Scene, random_scene

ATTRIBUTES = ("shape", "colour", "background")


@dataclass(frozen=True)
class Edit:
    """A scene, the scene that is asked for, and the instruction that says how they differ."""

    before: Scene
    after: Scene
    instruction: str

    @property
    def changed(self) -> tuple[str, ...]:
        """The attributes that differ, in the order of `ATTRIBUTES`."""
        return tuple(n for n in ATTRIBUTES if getattr(self.before, n) != getattr(self.after, n))


@dataclass(frozen=True)
class EditScore:
    """Fractions of pictures, in [0, 1]. `right`: what was asked for is changed and all else is kept."""

    num: int
    right: float
    changed: float  # all that was asked for is there
    kept: float  # all that was not asked for is as before
    by_kind: Mapping[str, float]  # `right` of the edits of the same attributes, such as "colour+background"


def instruction(before: Scene, after: Scene) -> str:
    """The plain words for the change from one scene to the other: "make it red and change the background to
    green", "turn the circle into a star"."""
    parts = []
    if after.shape != before.shape:
        article = "an" if after.shape[0] in "aeiou" else "a"
        parts.append(f"turn the {before.shape} into {article} {after.shape}")
    if after.colour != before.colour:
        parts.append(f"make it {after.colour}")
    if after.background != before.background:
        parts.append(f"change the background to {after.background}")
    return " and ".join(parts)


def random_edit(
    rng: np.random.Generator, attributes: Sequence[str], *, shapes: Sequence[str] = BASE_SHAPES
) -> Edit:
    """An edit of a random scene that changes all of `attributes` and nothing else; the thing keeps its place, size,
    tilt and texture and never gets the background's colour."""
    before = random_scene(rng, shapes=shapes)
    while True:
        other = random_scene(rng, shapes=shapes)
        after = replace(before, **{name: getattr(other, name) for name in attributes})
        edit = Edit(before, after, instruction(before, after))
        if set(edit.changed) == set(attributes) and after.colour != after.background:
            return edit


def score_edits(pictures: Sequence[Image.Image], edits: Sequence[Edit]) -> EditScore:
    """How many pictures, one for each edit, show what was asked for and kept the rest, read from their pixels."""
    changed, kept = [], []
    for picture, edit in zip(pictures, edits, strict=True):
        seen = read(picture)
        changed.append(_shows(seen, edit.after, edit.changed))
        kept.append(_shows(seen, edit.after, [n for n in ATTRIBUTES if n not in edit.changed]))
    right = np.array(changed, bool) & np.array(kept, bool)
    kinds = ["+".join(edit.changed) for edit in edits]
    by_kind = {
        kind: float(np.mean([hit for hit, k in zip(right, kinds, strict=True) if k == kind]))
        for kind in sorted(set(kinds))
    }
    return EditScore(len(right), float(right.mean()), float(np.mean(changed)), float(np.mean(kept)), by_kind)


def _shows(seen: Reading, scene: Scene, attributes: Sequence[str]) -> bool:
    return all(getattr(seen, name) == getattr(scene, name) for name in attributes)
