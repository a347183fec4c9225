"""A model becomes one file that other tools open."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import __version__
from sdlab.convert.plan import Output, checkpoint, transformer
from sdlab.convert.stream import Differs, Written, compare, sweep, write
from sdlab.errors import SdlabError
from sdlab.models.files import read_header
from sdlab.models.flux2 import Flux2
from sdlab.models.resolve import open_family
from sdlab.models.sd import StableDiffusion

if TYPE_CHECKING:
    from sdlab.models.resolve import Model

WORDS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
ARCHITECTURES = {"sd": "stable-diffusion-v1", "flux2": "flux-2"}
ANOTHER = "Give another --checkpoint-path"
LAYOUTS = {
    "sd": "the original Stable Diffusion layout",
    "flux2": "Black Forest Labs' layout, the transformer alone",
}


@dataclass(frozen=True)
class Converted:
    """The file that was made of a model."""

    path: Path
    layout: str
    dtype: str  # fp16, bf16, fp32, or "as it was"
    written: Written


def target_for(model: Model, asked: Path | None) -> Path:
    """Where the file goes: `asked`, or ``NAME.safetensors`` beside a folder, in the working folder for other models.

    Raises SdlabError where that is no .safetensors, or has no folder to lie in.
    """
    beside = model.kind in ("run", "folder")
    path = asked or (model.path.parent if beside else Path()) / f"{model.name}.safetensors"
    if path.suffix.lower() != ".safetensors":
        raise SdlabError(
            "a .safetensors file is what sdlab writes",
            where=str(path),
            next_step=f"Give --checkpoint-path {path.with_suffix('.safetensors')}",
        )
    if not path.parent.is_dir():
        raise SdlabError("no such folder", where=str(path.parent), next_step="Make it first")
    return path


def outputs_of(
    model: Model, *, dtype: str | None, without: Collection[str], allow_pickle: bool
) -> list[Output]:
    """The tensors of the file; headers only are read. Raises SdlabError for a model that cannot be one file yet."""
    if model.lora is not None:
        raise SdlabError(
            f"is a LoRA on another model; merging it is not there yet, and {model.lora} is a file that tools open",
            where=model.source or model.name,
            next_step="Give a whole model with --model-path",
        )
    family = open_family(
        model, allow_pickle=allow_pickle
    )  # which compares all names and shapes with its classes
    word = WORDS[dtype] if dtype else None
    if isinstance(family, Flux2):
        return transformer(family.parts, dtype=word)
    assert isinstance(family, StableDiffusion), model.family
    return checkpoint(family.parts, dtype=word, without=without)


def convert(
    model: Model,
    path: Path,
    outputs: list[Output],
    *,
    dtype: str | None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Converted:
    """Write the file, read it back and compare it with the model. Raises SdlabError, leaving no file, if it differs.

    What killed runs left in the folder goes first.
    """
    sweep(path.parent)
    written = write(path, outputs, metadata=metadata_of(model, outputs), advance=advance)
    return Converted(path, LAYOUTS[model.family], dtype or "as it was", written)


def found(
    model: Model,
    path: Path,
    outputs: list[Output],
    *,
    dtype: str | None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Converted:
    """What is said of the file that is there, if it is what `convert` writes, byte by byte.

    Raises SdlabError if it is anything else. What killed runs left in the folder goes first.
    """
    sweep(path.parent)
    if not _has_tensors(path, outputs):
        raise SdlabError("is there already", where=str(path), next_step=ANOTHER)
    metadata = metadata_of(model, outputs)
    if not _has_metadata(path, metadata):
        what = "is there already, made of another model or by another version of sdlab"
        raise SdlabError(what, where=str(path), next_step=ANOTHER)
    try:
        written = compare(path, outputs, metadata=metadata, advance=advance)
    except Differs as where:
        raise SdlabError(
            f"is there already, says that it is made of this model, and differs from it in {where}",
            where=str(path),
            next_step="It is damaged: remove it, or give another --checkpoint-path",
        ) from where
    return Converted(path, LAYOUTS[model.family], dtype or "as it was", written)


def metadata_of(model: Model, outputs: list[Output]) -> dict[str, str]:
    """What the header says of the model. The same model gives the same."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[model.family],
        "modelspec.implementation": "original",
        "modelspec.title": model.name,
        "sdlab.version": __version__,
        "sdlab.source_sha256": _source_hash(outputs),
    }


def _has_tensors(path: Path, outputs: list[Output]) -> bool:
    """Whether a file's header names these very tensors; quick, before a model of gigabytes is read."""
    try:
        header = read_header(path)
    except SdlabError:  # not a file of tensors at all
        return False
    there = {stored.name: (stored.dtype, stored.shape) for stored in header.tensors.values()}
    return there == {output.name: (output.dtype, output.shape) for output in outputs}


def _has_metadata(path: Path, metadata: dict[str, str]) -> bool:
    return read_header(path).metadata == {"format": "pt", **metadata}


def _source_hash(outputs: list[Output]) -> str:
    """A hash over the names, types and bytes of all that goes in."""
    digest = hashlib.sha256()
    for output in sorted(outputs, key=lambda output: output.name):
        for source in output.sources:
            digest.update(f"{source.name}\0{source.dtype}\0{source.shape}\0".encode())
            for piece in source.pieces():
                digest.update(piece)
    return digest.hexdigest()
