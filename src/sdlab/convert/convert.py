"""A model becomes one file that other tools open."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import __version__
from sdlab.convert.plan import SD_PARTS, Output, checkpoint, parts_of, transformer
from sdlab.convert.stream import Written, write
from sdlab.errors import SdlabError
from sdlab.models.files import read_header
from sdlab.models.resolve import open_family

if TYPE_CHECKING:
    from sdlab.models.base import Family
    from sdlab.models.flux2_folder import Flux2Parts
    from sdlab.models.folder import SdParts
    from sdlab.models.resolve import Model

WORDS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
ARCHITECTURES = {"sd": "stable-diffusion-v1", "flux2": "flux-2"}
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
    family = open_family(model, allow_pickle=allow_pickle)
    parts = _parts(family)
    _check_complete(family, without)
    word = WORDS[dtype] if dtype else None
    if model.family == "flux2":
        return transformer(parts, dtype=word)  # type: ignore[arg-type]
    return checkpoint(parts, dtype=word, without=without)  # type: ignore[arg-type]


def convert(
    model: Model,
    path: Path,
    outputs: list[Output],
    *,
    dtype: str | None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Converted:
    """Write the file, read it back and compare it with the model. Raises SdlabError, leaving no file, if it differs."""
    written = write(path, outputs, metadata=metadata_of(model, outputs), advance=advance)
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


def is_made(path: Path, model: Model, outputs: list[Output]) -> bool:
    """Whether the file there is what `convert` would write, going by its header. False for any other file."""
    try:
        header = read_header(path)
    except SdlabError:
        return False
    there = {stored.name: (stored.dtype, stored.shape) for stored in header.tensors.values()}
    wanted = {output.name: (output.dtype, output.shape) for output in outputs}
    return there == wanted and header.metadata == {"format": "pt", **metadata_of(model, outputs)}


def _parts(family: Family) -> SdParts | Flux2Parts:
    parts: SdParts | Flux2Parts = family.parts  # type: ignore[attr-defined]
    return parts


def _check_complete(family: Family, without: Collection[str]) -> None:
    """Compare names and shapes of all tensors with the model's classes. Raises SdlabError at the first fault."""
    from sdlab.models.parts import check_tensors

    for part in parts_of(_parts(family)):
        if part.name not in without and part.name in (*SD_PARTS, "transformer"):
            check_tensors(part)


def _source_hash(outputs: list[Output]) -> str:
    """A hash over the names, types and bytes of all that goes in."""
    digest = hashlib.sha256()
    for output in sorted(outputs, key=lambda output: output.name):
        for source in output.sources:
            digest.update(f"{source.name}\0{source.dtype}\0{source.shape}\0".encode())
            for piece in source.pieces():
                digest.update(piece)
    return digest.hexdigest()
