"""The mathematics of Muon: a matrix's step is made orthogonal, so that it moves in all its directions alike.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; sized as AdamW's steps by Liu et al. 2025, "Muon is
Scalable for LLM Training".

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

MOMENTUM = 0.95
RMS = 0.2  # of a step before the learning rate: about that of AdamW's
ROUNDS = 5
_A, _B, _C = (
    3.4445,
    -4.7750,
    2.0315,
)  # the quintic of Jordan et al.: steep at zero, singular values end in 0.7 to 1.2
_INSIDE = re.compile(r"(^|[._])(blocks?|layers?)\.")


def is_block_matrix(name: str, weight: Tensor) -> bool:
    """Is it a matrix inside a block? Embeddings, first and last layers, convolutions, norms and biases are not."""
    return weight.ndim == 2 and min(weight.shape) > 1 and bool(_INSIDE.search(name))


def rows_of(name: str, weight: Tensor) -> tuple[int, ...]:
    """The rows of each matrix that a weight stacks: queries, keys, values and the rest in FLUX.2's single blocks."""
    rows, columns = weight.shape
    if "to_qkv" in name and rows >= 3 * columns:
        parts = (columns, columns, columns, rows - 3 * columns)
        return tuple(part for part in parts if part)
    return (rows,)


def orthogonalised(matrix_RC: Tensor) -> Tensor:
    """A matrix with the singular vectors of the given one, (R, C) float32, and singular values of about 1.

    Those below a hundredth of the matrix's norm stay smaller. Newton-Schulz iterations in bf16, which they bear; a
    matrix of zeros stays one.
    """
    is_tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = (matrix_RC.T if is_tall else matrix_RC).to(torch.bfloat16)
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    orthogonal: Tensor = (x.T if is_tall else x).float()
    return orthogonal


def muon_step(matrix_RC: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The step before the learning rate, (R, C) float32: each stacked matrix orthogonal, times 0.2 sqrt(max(R, C)).

    Liu et al. 2025, equation 4. Its root mean square is about 0.2 whatever the shape.
    """
    parts = torch.split(matrix_RC, list(rows))
    return torch.cat([orthogonalised(part) * (RMS * math.sqrt(max(part.shape))) for part in parts])
