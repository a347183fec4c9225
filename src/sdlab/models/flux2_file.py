"""A FLUX.2 transformer from one file, with Black Forest Labs' names or diffusers'.

Such a file has no VAE, no text encoder and no configuration; those come from the model it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import bfl, ldm
from sdlab.models.bases import FLUX2_SIGNATURE, flux2_base_of
from sdlab.models.files import Header, Stored, read_weights
from sdlab.models.parts import Part, expected_of
from sdlab.models.sniff import flux2_prefix, flux2_shape, recognise, states_distilled
from sdlab.models.vae_file import no_strangers

_TRANSFORMER_ROOTS = (
    *("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "guidance_in.", "final_layer."),
    *("double_stream_modulation_", "single_stream_modulation.", "vector_in."),
    *("transformer_blocks.", "single_transformer_blocks.", "x_embedder.", "context_embedder."),
    *("time_guidance_embed.", "norm_out.", "proj_out."),
)


def read_transformer_file(
    path: Path, config: Mapping[str, Any], *, allow_pickle: bool = False
) -> tuple[Part, bool | None]:
    """The transformer in the file, `config` being that of the model it belongs to, and whether it says to be distilled.

    Headers only. Raises SdlabError, one line, for other models and other sizes.
    """
    header = read_weights(path, allow_pickle=allow_pickle)
    if recognise(header) != "flux2":
        raise SdlabError("holds no FLUX.2 transformer", where=str(path), next_step="Give a FLUX.2 model")
    return transformer_in(header, config), states_distilled(header)


def transformer_in(header: Header, config: Mapping[str, Any]) -> Part:
    """The transformer in a file that `sniff.look` has found one in; as `read_transformer_file`."""
    _same_size(header, config)
    prefix = flux2_prefix(header.tensors.keys()) or ""
    part = Part("transformer", "Flux2Transformer2DModel", dict(config), {}, header.path)
    original = prefix + bfl.MARK in header.tensors
    find = _original if original else _plain
    found = {name: stored for name in expected_of(part) if (stored := find(header, prefix, name))}
    no_strangers(header, prefix, _TRANSFORMER_ROOTS, found.values(), "transformer")
    return replace(part, weights=found)


def _same_size(header: Header, config: Mapping[str, Any]) -> None:
    wanted = tuple(config.get(key) for key in FLUX2_SIGNATURE)
    found = flux2_shape(header)
    if found != wanted:
        mine, theirs = (
            flux2_base_of(dict(zip(FLUX2_SIGNATURE, shape, strict=True)), False, "")
            for shape in (found, wanted)
        )
        raise SdlabError(
            f"is a transformer of {_told(mine, found)}, the model around it is {_told(theirs, wanted)}",
            where=str(header.path),
            next_step="Give both of the same size",
        )


def _told(base: str, shape: tuple[Any, ...]) -> str:
    size = f"{shape[0]}+{shape[1]} blocks, {shape[2]} heads, {shape[3]}-wide prompts"
    return size if base == "model" else f"the size of {base} ({size})"


def _original(header: Header, prefix: str, name: str) -> Stored | None:
    place = bfl.place_of(name)
    stored = header.tensors.get(prefix + place.name)
    if stored is None and place.name.endswith(".scale"):
        stored = header.tensors.get(f"{prefix}{place.name.removesuffix('scale')}weight")
    return ldm.taken(stored, place) if stored is not None else None


def _plain(header: Header, prefix: str, name: str) -> Stored | None:
    return header.tensors.get(prefix + name)
