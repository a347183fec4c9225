"""Edits change what they say and nothing else; the score tells right pictures from wrong ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from sdlab.testing.edits import ATTRIBUTES, Edit, instruction, random_edit, score_edits
from sdlab.testing.scenes import Scene, draw, generator

KINDS = [kind for num in (1, 2, 3) for kind in combinations(ATTRIBUTES, num)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_edit_changes_the_asked_attributes_and_keeps_the_rest(kind: tuple[str, ...]) -> None:
    for i in range(20):
        edit = random_edit(generator(1, i), kind)
        assert edit.changed == kind
        assert replace(edit.after, **{n: getattr(edit.before, n) for n in kind}) == edit.before
        assert edit.after.colour != edit.after.background


def test_the_instruction_names_every_change_in_plain_words() -> None:
    before = Scene("circle", "red", "blue")
    assert instruction(before, replace(before, colour="green")) == "make it green"
    assert instruction(before, replace(before, shape="arrow", background="white")) == (
        "turn the circle into an arrow and change the background to white"
    )


def test_drawn_targets_score_full_and_untouched_pictures_nothing() -> None:
    edits = [random_edit(generator(2, i), KINDS[i % len(KINDS)]) for i in range(28)]
    drawn = score_edits([draw(edit.after) for edit in edits], edits)
    assert (drawn.num, drawn.right, drawn.changed, drawn.kept) == (28, 1.0, 1.0, 1.0)
    assert drawn.by_kind == {"+".join(kind): 1.0 for kind in KINDS}
    untouched = score_edits([draw(edit.before) for edit in edits], edits)
    assert (untouched.right, untouched.changed, untouched.kept) == (0.0, 0.0, 1.0)


def test_a_change_that_was_not_asked_for_is_not_right() -> None:
    before = Scene("circle", "red", "blue")
    edit = Edit(before, replace(before, colour="green"), "make it green")
    too_much = score_edits([draw(replace(edit.after, background="white"))], [edit])
    assert (too_much.right, too_much.changed, too_much.kept) == (0.0, 1.0, 0.0)
    assert too_much.by_kind == {"colour": 0.0}
