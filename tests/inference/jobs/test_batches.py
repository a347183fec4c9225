"""Pictures that can be made together are, wherever they stand in the job."""

from __future__ import annotations

from sdlab.inference.jobs.batches import grouped


def test_groups_take_what_is_alike_from_anywhere_in_the_order_of_their_first() -> None:
    items = ["a0", "b1", "a2", "c3", "a4", "b5", "a6"]
    assert grouped(items, 2, lambda item: item[0]) == [["a0", "a2"], ["b1", "b5"], ["c3"], ["a4", "a6"]]
    assert grouped(items, 1, lambda item: item[0]) == [[item] for item in items]
    assert grouped(items, 9, lambda item: item[0]) == [["a0", "a2", "a4", "a6"], ["b1", "b5"], ["c3"]]
    assert grouped([], 4, lambda item: item) == []


def test_the_first_groups_are_the_same_whatever_follows() -> None:
    few, many = list(range(10)), list(range(40))
    assert grouped(many, 3, lambda i: i % 2)[:2] == grouped(few, 3, lambda i: i % 2)[:2]
