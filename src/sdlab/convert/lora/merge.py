"""LoRAs merged into the weights of a model, a block of rows at a time, without a byte being written before its use.

W + sum over the LoRAs of weight scale B A (Hu et al. 2021, section 4.1), in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sdlab.errors import SdlabError
from sdlab.models.files import ITEM_BYTES, Stored, torch_type
from sdlab.models.lora import gather
from sdlab.models.parts import Part

_BLOCK_NUMBERS = 1 << 20  # of a block of rows: 4 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Merged(Stored):
    """A weight with LoRAs in it; type, shape and size are those of the sum. Each pass over it gives the same bytes."""

    base: Stored
    down_RI: Tensor = field(compare=False, repr=False)  # of all LoRAs, one below the other
    up_OR: Tensor = field(compare=False, repr=False)  # their B side by side, times scale and weight

    def pieces(self) -> Iterator[bytes]:
        """The raw little-endian bytes, a block of rows at a time. SdlabError for a sum that the type cannot hold."""
        for block in self._blocks():
            yield block.view(torch.uint8).numpy().tobytes()

    def read(self) -> Tensor:
        """The whole tensor; bit for bit what `pieces` gives."""
        return torch.cat(list(self._blocks())).reshape(self.shape)

    def rows(self, part: int, parts: int) -> Merged:
        """One of `parts` equal shares of the rows."""
        num = self.shape[0] // parts
        return replace(
            self,
            shape=(num, *self.shape[1:]),
            nbytes=self.nbytes // parts,
            base=self.base.rows(part, parts),
            up_OR=self.up_OR[part * num : (part + 1) * num],
        )

    def _blocks(self) -> Iterator[Tensor]:
        """Rows of the sum in order, each block (rows, in) in the type of the result."""
        base, up = self.base, self.up_OR
        if self.halves_swapped:
            base = replace(base, halves_swapped=not base.halves_swapped)
            up = torch.cat(up.chunk(2)[::-1])
        num = max(1, _BLOCK_NUMBERS // self.down_RI.shape[1])
        at = 0
        for rows in _row_blocks(base, num, self.down_RI.shape[1]):
            whole = rows.float() + up[at : at + len(rows)] @ self.down_RI
            at += len(rows)
            yield self._rounded(whole, rows)

    def _rounded(self, whole: Tensor, rows: Tensor) -> Tensor:
        rounded = whole.to(torch_type(self.dtype))
        if bool(torch.isfinite(rounded).all()):
            return rounded
        if not bool(torch.isfinite(rows).all()):
            raise SdlabError(
                f"tensor {self.name!r} holds values that are not finite",
                where=str(self.path),
                next_step="The model is damaged",
            )
        raise SdlabError(
            f"with the LoRAs tensor {self.name!r} grows to {float(whole.abs().max()):.3g}, too much for {self.dtype}",
            where=str(self.path),
            next_step="Give the LoRAs smaller weights, or use --dtype bf16 or fp32",
        )


def merged(
    networks: Mapping[str, Part], loras: Sequence[tuple[Path, float]], *, dtype: str | None
) -> dict[str, Part]:
    """The same networks with each LoRA (file, weight) in the weights that it adapts; nothing is computed yet.

    `dtype` is of those weights, a safetensors word; None keeps each one's own. Raises SdlabError, naming file and
    layer, where a file is no LoRA or not of these networks.
    """
    found = gather(networks.values(), loras)
    changed: dict[str, dict[str, Stored]] = {name: {} for name in networks}
    for (part, layer), pairs in found.items():
        name = f"{layer}.weight"
        changed[part][name] = _merged(networks[part].weights[name], pairs, dtype)
    return {name: replace(part, weights={**part.weights, **changed[name]}) for name, part in networks.items()}


def _merged(base: Stored, pairs: Sequence[tuple[Tensor, Tensor]], dtype: str | None) -> Merged:
    word = dtype or base.dtype
    return Merged(
        name=base.name,
        dtype=word,
        shape=base.shape,
        path=base.path,
        nbytes=base.nbytes // ITEM_BYTES[base.dtype] * ITEM_BYTES[word],
        base=base,
        down_RI=torch.cat([down.flatten(1) for down, _ in pairs]),
        up_OR=torch.cat([up.flatten(1) for _, up in pairs], dim=1),
    )


def _row_blocks(stored: Stored, num: int, width: int) -> Iterator[Tensor]:
    """The rows of a tensor, (at most `num`, width), in its own type; the blocks do not depend on how it is stored."""
    nbytes = num * width * ITEM_BYTES[stored.dtype]
    held = bytearray()
    for piece in stored.pieces():
        held += piece
        while len(held) >= nbytes:
            yield _rows(held[:nbytes], stored.dtype, width)
            del held[:nbytes]
    if held:
        yield _rows(held, stored.dtype, width)


def _rows(raw: bytearray, dtype: str, width: int) -> Tensor:
    return torch.frombuffer(raw, dtype=torch_type(dtype)).reshape(-1, width)
