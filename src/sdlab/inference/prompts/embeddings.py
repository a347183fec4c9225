"""Textual inversion (Gal et al. 2022): a word of one's own, some vectors that stand where its tokens would.

Shapes: N vectors, D width of the text encoder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError
from sdlab.inference.prompts.names import Found, Names
from sdlab.models.files import FLOATS, Header, Stored, read_weights

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".bin")  # the first is taken where a name has several
MAX_VECTORS = 1024
_PLAIN_KEYS = ("emb_params", "string_to_param.*", "string_to_param")
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL", 128: "mini-sd"}


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: `name` in a prompt stands for these vectors."""

    name: str
    vectors_ND: Tensor  # float32, on the CPU
    path: Path


def read_embedding(path: Path, *, width: int, allow_pickle: bool) -> Embedding:
    """The vectors of a file as A1111, kohya's scripts or diffusers write it; its name is the file's.

    Raises SdlabError for a file that holds none, or whose vectors are for a text encoder of another width, naming
    the family they are for.
    """
    import torch

    stored = _vectors(read_weights(path, allow_pickle=allow_pickle))
    shape = stored.shape if len(stored.shape) == 2 else (1, *stored.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_VECTORS or stored.dtype not in FLOATS:
        raise _no_embedding(path, f"{stored.name} is {stored.dtype} of shape {list(stored.shape)}")
    if shape[1] != width:
        raise SdlabError(
            f"is a textual inversion for {_family(shape[1])}; this model's prompts are {width} wide",
            where=str(path),
            next_step="Use one that was made for this kind of model",
        )
    vectors_ND = stored.read().float().reshape(shape)
    if not torch.isfinite(vectors_ND).all():
        raise SdlabError(f"{stored.name} holds numbers that are not finite", where=str(path))
    return Embedding(path.stem, vectors_ND, path)


def _vectors(header: Header) -> Stored:
    """The one tensor of the file."""
    tensors = header.tensors
    if {"clip_l", "clip_g"} & tensors.keys():
        raise SdlabError(
            "is a textual inversion for SDXL (it has vectors for two text encoders)",
            where=str(header.path),
            next_step="Use one that was made for this kind of model",
        )
    for name in _PLAIN_KEYS:
        if name in tensors:
            return tensors[name]
    if len(tensors) != 1:
        raise _no_embedding(header.path, f"it has {len(tensors)} tensors")
    return next(iter(tensors.values()))


def _family(width: int) -> str:
    return f"{_WIDTHS[width]} (width {width})" if width in _WIDTHS else f"another model (width {width})"


def _no_embedding(path: Path, reason: str) -> SdlabError:
    return SdlabError(
        f"is no textual inversion: {reason}", where=str(path), next_step="A LoRA is given as --lora"
    )


def on_the_shelf(paths: Iterable[Path]) -> dict[str, Path]:
    """Name to file, sorted by name: of the files, and of those in and below the folders. No file is opened.

    Where two have one name, that of the earlier path counts, in a folder a .safetensors first. Raises SdlabError
    where a path is not there or is no such file.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file in _in_folder(path) if path.is_dir() else [_checked(path)]:
            found.setdefault(file.stem, file)
    return {name: found[name] for name in sorted(found)}


def _checked(path: Path) -> Path:
    if not path.exists():
        raise SdlabError("there is no such file or folder", where=f"--embedding {path}")
    if path.suffix.lower() not in SUFFIXES:
        raise SdlabError(f"is none of {', '.join(SUFFIXES)}", where=f"--embedding {path}")
    return path


def _in_folder(folder: Path) -> list[Path]:
    inside = [
        Path(at) / name for at, _, names in os.walk(folder) for name in names if not name.startswith(".")
    ]
    files = [path for path in inside if path.suffix.lower() in SUFFIXES]
    return sorted(files, key=lambda path: (SUFFIXES.index(path.suffix.lower()), str(path)))


def named_in(texts: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that any of the texts uses, sorted: as a whole word in any case, or as ``embedding:NAME``."""
    known = Names(names)
    return sorted({found.name for text in texts for found in _found(text, known)})


def _found(text: str, known: Names) -> Iterator[Found]:
    yield from known.find(re.sub(r"\\([()\[\]\\])", r"\1", text))  # a name may hold brackets


def num_vectors(embeddings: Sequence[Embedding]) -> dict[str, int]:
    """Name to how many tokens it counts for."""
    return {embedding.name: int(embedding.vectors_ND.shape[0]) for embedding in embeddings}
