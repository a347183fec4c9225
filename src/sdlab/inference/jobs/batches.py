"""Which pictures are made together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def grouped(items: Sequence[_Item], size: int, key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """Groups of at most `size` items of equal key, neighbours or not, in the order of each group's first item."""
    assert size >= 1
    groups: list[list[_Item]] = []
    unfilled: dict[Hashable, list[_Item]] = {}
    for item in items:
        kind = key(item)
        if kind not in unfilled:
            unfilled[kind] = []
            groups.append(unfilled[kind])
        unfilled[kind].append(item)
        if len(unfilled[kind]) == size:
            del unfilled[kind]
    return groups
