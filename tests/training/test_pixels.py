"""Which pictures are never trained on, and in which order processes look at them."""

from __future__ import annotations

from typing import Any

import pytest

from sdlab.training.pixels import _main_first, held_out


def contents_of(num: int, *, copies: int = 1) -> dict[str, str]:
    return {f"{index:04d}-{copy}.png": f"sha of {index}" for index in range(num) for copy in range(copies)}


@pytest.mark.parametrize(
    ("num", "share", "held"),
    [
        (0, 0.5, 0),
        (1, 0.5, 0),
        (2, 0.01, 1),
        (2, 0.9, 1),
        (3, 0.9, 2),
        (100, 0.05, 5),
        (9000, 0.05, 64),
        (50, 0, 0),
    ],
)
def test_a_share_is_held_out_from_one_to_the_most_and_never_all(num: int, share: float, held: int) -> None:
    assert len(held_out(contents_of(num), share, most=64, seed=1)) == held


def test_copies_of_a_picture_are_on_one_side() -> None:
    contents = contents_of(20, copies=2)
    held = held_out(contents, 0.2, most=64, seed=3)
    sides = [
        {content for name, content in contents.items() if (name in held) is side} for side in (True, False)
    ]
    assert len(held) == 8 and not sides[0] & sides[1] and len(sides[1]) == 16


def test_which_ones_depends_on_their_contents_and_the_seed_alone() -> None:
    contents = contents_of(60)
    held = held_out(contents, 0.2, most=64, seed=1)
    assert held == held_out(dict(reversed(contents.items())), 0.2, most=64, seed=1)
    assert held != held_out(contents, 0.2, most=64, seed=2)
    more = held_out(contents_of(61), 0.2, most=64, seed=1)
    assert len(more & held) >= 11  # another picture changes one place at most


class Waiting:
    """What is known of an accelerator here."""

    def __init__(self, is_main_process: bool) -> None:
        self.is_main_process, self.order = is_main_process, list[str]()

    def wait_for_everyone(self) -> None:
        self.order.append("met")


@pytest.mark.parametrize(("is_main", "order"), [(True, ["looked", "met"]), (False, ["met", "looked"])])
def test_the_main_process_lets_the_others_go_on_even_where_it_raises(is_main: bool, order: list[str]) -> None:
    accelerator: Any = Waiting(is_main)
    with pytest.raises(RuntimeError), _main_first(accelerator):
        accelerator.order.append("looked")
        raise RuntimeError
    assert accelerator.order == order
