"""A LoRA made of two models: of each layer's difference, the closest matrix of a given rank.

The best approximation of rank R keeps the R largest singular values (Eckart and Young 1936). They come from a
randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), as a whole SVD of a large layer takes
minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdlab.convert.lora.layout import Adapter
from sdlab.errors import SdlabError
from sdlab.keyed import keyed
from sdlab.models.files import FLOATS, Stored
from sdlab.models.parts import Part, build

_EXTRA_COLUMNS = 10  # beyond the rank: 5 to 10 are enough (Halko et al., section 4.2)
_NUM_ITERATIONS = 8  # of pure noise, the worst case, 4 catch 93 % of what can be had, 8 catch 98 %
_COARSE = ("BF16", "F16", "F32", "F64")  # types by how few digits they keep


@dataclass(frozen=True)
class Extracted:
    """What of the difference of two models a LoRA holds."""

    adapters: list[Adapter]
    kept: float  # share of the squared difference of the adapted layers, 0 to 1
    left_out: list[str]  # tensors that differ too, and cannot be in a LoRA: biases, norms, embeddings


def num_tensors(base: Mapping[str, Part]) -> int:
    """How many tensors `extract` compares."""
    return sum(len(part.weights) for part in base.values())


def extract(
    base: Mapping[str, Part],
    tuned: Mapping[str, Part],
    *,
    rank: int,
    advance: Callable[[float], None] = lambda num_done: None,
) -> Extracted:
    """The LoRA of `rank` that brings `base` closest to `tuned`, in the networks that both have.

    A layer's rank is less where the layer is smaller; scale is 1. `advance` is told how many tensors are compared by
    now. Raises SdlabError where the networks are of different shapes, do not differ, or differ only in what no LoRA
    holds.
    """
    adapters: list[Adapter] = []
    left_out: list[str] = []
    squares = kept = 0.0
    for num_done, (part, name, layer, before, after) in enumerate(_tensors(base, tuned), start=1):
        difference = _difference(before, after)
        if difference is not None and layer is None:
            left_out.append(f"{part}.{name}")
        elif difference is not None:
            adapter, energy = _adapter(part, name.removesuffix(".weight"), difference, rank)
            adapters.append(adapter)
            kept += energy
            squares += float(difference.square().sum(dtype=torch.float64))
        advance(num_done)
    if not adapters:
        raise _no_difference(base, tuned, left_out)
    return Extracted(adapters, min(1.0, kept / squares), left_out)


def _tensors(
    base: Mapping[str, Part], tuned: Mapping[str, Part]
) -> Iterator[tuple[str, str, nn.Module | None, Stored, Stored]]:
    """(part, name, the layer whose weight it is or None, tensor of one model, of the other), in the models' order."""
    pairs = [(part, tuned[name]) for name, part in base.items() if name in tuned]
    for one, other in pairs:
        _check_same_shapes(one, other)
    for one, other in pairs:
        layers = {
            f"{name}.weight": layer
            for name, layer in build(one).named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        for name, stored in one.weights.items():
            yield one.name, name, layers.get(name), stored, other.weights[name]


def _check_same_shapes(one: Part, other: Part) -> None:
    shapes, others = ({n: s.shape for n, s in part.weights.items()} for part in (one, other))
    if shapes == others:
        return
    names = sorted({*shapes, *others})
    name = next(n for n in names if shapes.get(n) != others.get(n))
    raise SdlabError(
        f"its {one.name} has another shape than that of {other.where}: {name} is "
        f"{list(shapes.get(name, ()))} there, {list(others.get(name, ()))} here",
        where=str(one.where),
        next_step="Give two models of the same kind",
    )


def _difference(before: Stored, after: Stored) -> Tensor | None:
    """after - before in float32; None where they are equal as far as the coarser of their types can tell."""
    one, other = before.read(), after.read()
    if before.dtype in FLOATS and after.dtype in FLOATS:
        coarse = one.dtype if _COARSE.index(before.dtype) < _COARSE.index(after.dtype) else other.dtype
        if torch.equal(one.to(coarse), other.to(coarse)):
            return None
    elif torch.equal(one, other):
        return None
    difference = other.float() - one.float()
    if not bool(torch.isfinite(difference).all()):
        worse = before if not bool(torch.isfinite(one).all()) else after
        raise SdlabError(
            f"tensor {worse.name!r} holds values that are not finite",
            where=str(worse.path),
            next_step="The model is damaged",
        )
    return difference


def _adapter(part: str, layer: str, difference: Tensor, rank: int) -> tuple[Adapter, float]:
    """The layer's LoRA, and the square of its product's Frobenius norm. The singular values go to A and B alike."""
    left_OR, values_R, right_RI = _largest(difference.flatten(1), rank, part, layer)
    roots = values_R.sqrt()
    down = (roots[:, None] * right_RI).reshape(-1, *difference.shape[1:])
    up = (left_OR * roots).reshape(difference.shape[0], -1, *[1] * (difference.ndim - 2))
    return Adapter(part, layer, down, up), float(values_R.double().square().sum())


def _largest(matrix_OI: Tensor, rank: int, *names: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), the R largest singular values, V^T (R, I), R at most `rank`."""
    num_columns = min(rank + _EXTRA_COLUMNS, *matrix_OI.shape)
    start = torch.randn(matrix_OI.shape[1], num_columns, generator=keyed("extract", *names))
    basis_OK = _orthonormal(matrix_OI @ start)
    for _ in range(_NUM_ITERATIONS):
        basis_OK = _orthonormal(matrix_OI @ _orthonormal(matrix_OI.T @ basis_OK))
    left_KK, values, right_KI = torch.linalg.svd(basis_OK.T @ matrix_OI, full_matrices=False)
    return basis_OK @ left_KK[:, :rank], values[:rank], right_KI[:rank]


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _no_difference(base: Mapping[str, Part], tuned: Mapping[str, Part], left_out: list[str]) -> SdlabError:
    where = " and ".join(str(next(iter(networks.values())).where) for networks in (base, tuned) if networks)
    if left_out:
        return SdlabError(
            f"the models differ, but in nothing that a LoRA can hold: {left_out[0]}"
            + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""),
            where=where,
        )
    return SdlabError("the models do not differ: there is nothing to extract", where=where)
