"""A VAE alone in one file, to take the place of a model's own; the original names or diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import bfl, ldm
from sdlab.models.files import Header, Stored, read_weights
from sdlab.models.flux2_folder import with_batch_count
from sdlab.models.folder import vae_module_name
from sdlab.models.parts import Part, expected_of
from sdlab.models.sniff import vae_prefix

_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")


def read_vae_file(path: Path, base: Part, *, allow_pickle: bool = False) -> Part:
    """The VAE in the file, to take the place of `base`. Headers only; SdlabError for anything else."""
    return vae_in(read_weights(path, allow_pickle=allow_pickle), base)


def vae_in(header: Header, base: Part) -> Part:
    """The VAE in a file, alone or beside other parts, for the configuration of `base`; as `read_vae_file`."""
    prefix = vae_prefix(header.tensors.keys())
    if prefix is None:
        what = "holds no VAE"
        raise SdlabError(what, where=str(header.path), next_step="Give a VAE of the same family")
    is_flux2 = base.class_name == "AutoencoderKLFlux2"
    original: Callable[[str, Mapping[str, Any]], str] = bfl.vae_name if is_flux2 else ldm.vae_name
    inner = {n.removeprefix(prefix): s for n, s in header.tensors.items() if n.startswith(prefix)}
    named = {vae_module_name(name): stored for name, stored in inner.items()}
    found: dict[str, Stored] = {}
    for name, shape in expected_of(base).items():
        stored = named.get(name)
        if stored is None and name != "bn.num_batches_tracked":
            stored = inner.get(original(name, base.config))
        if stored is not None:
            found[name] = squeezed(stored, shape)
    no_strangers(header, prefix, _ROOTS, found.values(), "VAE")
    return replace(
        base, weights=with_batch_count(found, header.path) if is_flux2 else found, where=header.path
    )


def squeezed(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """The original VAE's attention is made of 1x1 convolutions; the same numbers are a matrix here."""
    if stored.shape == (*shape, 1, 1):
        tensor = stored.tensor.reshape(shape) if stored.tensor is not None else None
        return replace(stored, shape=shape, tensor=tensor)
    return stored


def no_strangers(
    header: Header, prefix: str, roots: tuple[str, ...], used: Iterable[Stored], part: str
) -> None:
    """Raise SdlabError for tensors of the part that its configuration has no place for."""
    known = {stored.name for stored in used}
    for name in sorted(header.tensors):
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and inner.startswith(roots) and name not in known:
            if not inner.endswith("num_batches_tracked"):
                raise SdlabError(
                    f"tensor {name!r} has no place in the {part} of this kind of model",
                    where=str(header.path),
                    next_step="Give a part that was made for a model of this kind and size",
                )
