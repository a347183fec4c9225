"""Building blocks of written-down weights: a plan of the state, and attention heads and neurons as small functions.

The state of a token is cut into named places: scalars (one number) and slices (32 numbers, a word's code). A form is a
linear function of the scalars, {name: weight}; the name "1" is the constant. An attention head is written as

    score(query token, key token) = sum over j of queries[j](query token) * keys[j](key token)
    state(query token)[to] += value(best key token)[from]

where each (query form, key form) takes one number of the head's query and key, and each pair of places that is copied
one number of its value. Scores differ by 20 and more, so that a softmax picks one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from recipes.mini.text.codes import WIDTH as CODE
from safetensors.torch import save_file
from torch import Tensor

# D width of the state, K width of a head

Form = Mapping[str, float]
Score = Sequence[tuple[Form, Form]]


@dataclass(frozen=True)
class Plan:
    """Where everything has its place in the state of `width` numbers: slices of CODE first, scalars after them."""

    width: int
    slices: tuple[str, ...]
    scalars: tuple[str, ...]
    one: float = 0.0  # what the scalar "one" holds in every state, where linear layers have no bias

    def __post_init__(self) -> None:
        assert CODE * len(self.slices) + len(self.scalars) <= self.width

    def at(self, name: str) -> int:
        """The place of a scalar."""
        return CODE * len(self.slices) + self.scalars.index(name)

    def places(self, name: str) -> list[int]:
        """The places of a slice, or of a scalar."""
        if name not in self.slices:
            return [self.at(name)]
        start = CODE * self.slices.index(name)
        return list(range(start, start + CODE))


@dataclass(frozen=True)
class Linear:
    """A linear layer, (outputs, inputs), to be filled in; without a bias, the state's "one" is the constant."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def zeros(cls, num_outputs: int, num_inputs: int, *, bias: bool) -> Linear:
        zeros = torch.zeros(num_outputs, dtype=torch.float64)
        return cls(torch.zeros(num_outputs, num_inputs, dtype=torch.float64), zeros if bias else None)

    def set(self, row: int, form: Form, plan: Plan, *, times: float = 1.0) -> None:
        """Makes an output the given form of the state."""
        for name, weight in form.items():
            if name == "1" and self.bias is not None:
                self.bias[row] += times * weight
            elif name == "1":
                self.weight[row, plan.at("one")] += times * weight / plan.one
            else:
                self.weight[row, plan.at(name)] += times * weight


@dataclass(frozen=True)
class Attention:
    """The four projections of an attention layer."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear

    @classmethod
    def zeros(cls, width: int, inner: int, *, bias: bool) -> Attention:
        q, k, v = (Linear.zeros(inner, width, bias=bias) for _ in range(3))
        return cls(q, k, v, Linear.zeros(width, inner, bias=bias))


def write_scores(
    attention: Attention, start: int, score: Score, plan: Plan, *, queries: float = 1.0, keys: float = 1.0
) -> None:
    """Writes a head's scores from row `start` on, times `queries` and `keys`: these undo what attention divides by."""
    for j, (query, key) in enumerate(score):
        attention.q.set(start + j, query, plan, times=queries)
        attention.k.set(start + j, key, plan, times=keys)


def write_copies(attention: Attention, start: int, copies: Mapping[str, str], plan: Plan) -> None:
    """Writes what a head copies, {from: to}, slices or scalars."""
    row = start
    for source, target in copies.items():
        for here, there in zip(plan.places(source), plan.places(target), strict=True):
            attention.v.weight[row, here] = 1.0
            attention.out.weight[there, row] = 1.0
            row += 1


def save(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Writes config.json and model.safetensors, the tensors by name in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {**config, "dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps(dict(sorted(said.items())), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    stored = {name: tensors[name].to(dtype).contiguous() for name in sorted(tensors)}
    assert all(cast(bool, tensor.isfinite().all().item()) for tensor in stored.values())
    path = folder / "model.safetensors"
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone
