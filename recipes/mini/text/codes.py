"""Codes for words: 1,024 rows of 32 signs of which no two are alike.

Row (a, b) holds (-1)^Tr(a x + b x^3) for all x of the field with 32 elements: the Gold codes (Gold 1967, "Optimal
binary sequences for spread spectrum multiplexing") with one more sign. The cosine of any two rows is 0 or 1/4 or -1/4,
so a word that was never met is as far from every other as any two that were. Signs survive every number format.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 32
_FIELD = 0b100101  # x^5 + x^2 + 1 makes the field of 32 elements


def all_codes() -> Tensor:
    """Every code, (1024, WIDTH) of -1 and 1; the first 32 rows are orthogonal, row 0 is all ones."""
    field = range(WIDTH)
    signs = [1 - 2 * _trace(x) for x in field]
    products = [[_times(a, x) for x in field] for a in field]
    cubes = [products[x][products[x][x]] for x in field]
    rows = [[signs[products[a][x] ^ products[b][cubes[x]]] for x in field] for b in field for a in field]
    return torch.tensor(rows, dtype=torch.float64)


def table(special: list[str], words: list[str], rest: list[str]) -> dict[str, Tensor]:
    """A code, (WIDTH,), for every name. At most 31 of `special` are orthogonal to each other; `special` and `words`
    have codes with cosines of at most 1/4; `rest` comes next, then takes their negatives."""
    codes = all_codes()[1:]
    codes = torch.cat([codes, -codes])
    names = [*special, *words, *rest]
    assert len(special) < WIDTH
    assert len(special) + len(words) < len(codes) // 2
    assert len(set(names)) == len(names) <= len(codes)
    places = [*range(len(special)), *range(WIDTH - 1, WIDTH - 1 + len(names) - len(special))]
    return {name: codes[place] for name, place in zip(names, places, strict=True)}


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (_FIELD if a & 16 else 0)
        b >>= 1
    return product


def _trace(a: int) -> int:
    """0 or 1: a + a^2 + a^4 + a^8 + a^16."""
    total = 0
    for _ in range(5):
        total ^= a
        a = _times(a, a)
    return total
