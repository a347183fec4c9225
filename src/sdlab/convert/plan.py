"""What a file is made of: its tensors under the names that readers expect, and where each one's bytes lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdlab.models import bfl, ldm
from sdlab.models.bfl import Place
from sdlab.models.files import FLOATS, ITEM_BYTES, Stored

if TYPE_CHECKING:
    from sdlab.models.parts import Part

WORDS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}  # what we call the parts of a model
COMFYUI_PREFIX = "model.diffusion_model."


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


def checkpoint(networks: Mapping[str, Part], *, dtype: str | None) -> list[Output]:
    """UNet, VAE and text encoder of Stable Diffusion, those that there are, in the original layout.

    `dtype` is for what are floating-point numbers; None keeps what each tensor has.
    """
    parts = [networks[name] for name in ("unet", "vae", "text_encoder") if name in networks]
    return _joined(
        (
            (ldm.place_of(part.name, name, part.config), stored)
            for part in parts
            for name, stored in part.weights.items()
            if not name.endswith("position_ids")  # an index of 0, 1, 2 …, not a weight: no reader needs it
        ),
        dtype,
    )


def vae(part: Part, *, dtype: str | None) -> list[Output]:
    """A VAE by itself in the original layout, without the prefix that it has in a checkpoint."""
    name_of = bfl.vae_name if part.class_name == "AutoencoderKLFlux2" else ldm.vae_name
    return _joined(
        ((Place(name_of(name, part.config)), stored) for name, stored in part.weights.items()), dtype
    )


def transformer(part: Part, *, dtype: str | None, prefix: str = "") -> list[Output]:
    """A FLUX.2 transformer in Black Forest Labs' layout: q, k and v are one tensor, shift stands before scale."""
    places = ((bfl.place_of(name), stored) for name, stored in part.weights.items())
    return _joined(((replace(place, name=prefix + place.name), stored) for place, stored in places), dtype)


def part_folder(part: Part, *, dtype: str | None) -> list[Output]:
    """The weights of one part of a diffusers folder.

    Text encoders are named with ``text_model.``: transformers before 5.6 loads random weights for names without it.
    """
    return [
        _output(_folder_name(part, name, stored), [stored], dtype) for name, stored in part.weights.items()
    ]


def plain(tensors: Mapping[str, Stored], *, dtype: str | None) -> list[Output]:
    """Tensors under the names that they have."""
    return [_output(name, [stored], dtype) for name, stored in tensors.items()]


def _folder_name(part: Part, name: str, stored: Stored) -> str:
    if part.name == "text_encoder" and part.class_name == "CLIPTextModel":
        return f"text_model.{name}"
    return stored.name if part.name == "safety_checker" else name


def _joined(tensors: Iterable[tuple[Place, Stored]], dtype: str | None) -> list[Output]:
    whole, thirds = [], dict[str, dict[int, Stored]]()
    for place, stored in tensors:
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = stored
        else:
            swapped = replace(stored, halves_swapped=not stored.halves_swapped)
            whole.append(_output(place.name, [swapped if place.halves_swapped else stored], dtype))
    return whole + [_output(name, [by[i] for i in range(3)], dtype) for name, by in thirds.items()]


def _output(name: str, sources: list[Stored], dtype: str | None) -> Output:
    first = sources[0]
    shape = (sum(s.shape[0] for s in sources), *first.shape[1:]) if len(sources) > 1 else first.shape
    if ".mid.attn_1." in name and len(shape) == 2:
        shape = (*shape, 1, 1)  # the original VAE has 1x1 convolutions where diffusers has matrices
    own = _widest({source.dtype for source in sources})
    return Output(name, dtype if dtype is not None and own in FLOATS else own, shape, tuple(sources))


def _widest(dtypes: set[str]) -> str:
    """The type that holds the numbers of all: q, k and v of different types become one tensor."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    assert dtypes <= set(FLOATS), dtypes  # parts.check_tensors has seen to it
    return "F64" if "F64" in dtypes else "F32"
