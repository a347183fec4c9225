"""What a single file is made of: its tensors under the names other tools expect, and where each one's bytes lie."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdlab.models import bfl, ldm
from sdlab.models.files import FLOATS, ITEM_BYTES, Stored

if TYPE_CHECKING:
    from sdlab.models.flux2_folder import Flux2Parts
    from sdlab.models.folder import SdParts


@dataclass(frozen=True)
class Output:
    """One tensor of the file to be written: its sources one after the other, cast to `dtype`."""

    name: str
    dtype: str  # a safetensors word: F32, F16, BF16 ...
    shape: tuple[int, ...]
    sources: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in the file."""
        return sum(s.nbytes // ITEM_BYTES[s.dtype] for s in self.sources) * ITEM_BYTES[self.dtype]


def checkpoint(parts: SdParts, *, dtype: str | None, without: Collection[str] = ()) -> list[Output]:
    """A Stable Diffusion 1.x model in the original layout, less the parts in `without`.

    `dtype` is for what are floating-point numbers; None keeps what each tensor has.
    """
    return [
        _output(ldm.single_file_name(part.name, name, part.config), stored, dtype)
        for part in (parts.unet, parts.vae, parts.text_encoder)
        if part.name not in without
        for name, stored in part.weights.items()
        if not name.endswith("position_ids")  # an index of 0, 1, 2 …, not a weight: no reader needs it
    ]


def transformer(parts: Flux2Parts, *, dtype: str | None) -> list[Output]:
    """A FLUX.2 transformer in Black Forest Labs' layout: q, k and v are one tensor, shift stands before scale."""
    whole, thirds = [], dict[str, dict[int, Stored]]()
    for name, stored in parts.transformer.weights.items():
        place = bfl.place_of(name)
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = stored
        else:
            swapped = replace(stored, halves_swapped=not stored.halves_swapped)
            whole.append(_output(place.name, swapped if place.halves_swapped else stored, dtype))
    return whole + [_output(name, [by[i] for i in range(3)], dtype) for name, by in thirds.items()]


def _output(name: str, stored: Stored | list[Stored], dtype: str | None) -> Output:
    sources = stored if isinstance(stored, list) else [stored]
    first = sources[0]
    shape = (sum(s.shape[0] for s in sources), *first.shape[1:]) if len(sources) > 1 else first.shape
    if ".mid.attn_1." in name and len(shape) == 2:
        shape = (*shape, 1, 1)  # the original VAE has 1x1 convolutions where diffusers has matrices
    kind = dtype if dtype is not None and first.dtype in FLOATS else first.dtype
    return Output(name, kind, shape, tuple(sources))
