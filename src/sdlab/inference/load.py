"""Which model, which files of it, and the engine around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import __version__, show
from sdlab.errors import SdlabError
from sdlab.inference import identity
from sdlab.inference.identity import Hasher

if TYPE_CHECKING:
    import torch

    from sdlab.inference.sample import Sampler
    from sdlab.models.resolve import Model

BY_NAME = ("builtin", "hub")  # kinds of model that are found by name, not by path


@dataclass(frozen=True)
class Source:
    """A file or folder that pictures are made from, with the hashes of what is read of it."""

    name: str
    asked: str  # what finds it again from the same working folder
    path: Path
    files: dict[str, str]
    kind: str  # as Model.kind

    def record(self) -> dict[str, Any]:
        """For a recipe; no absolute path, unless there is no other."""
        digest = identity.combined(self.files)
        return {
            "name": self.name,
            "kind": self.kind,
            "asked": self.asked,
            "files": self.files,
            "sha256": digest,
        }


@dataclass(frozen=True)
class Chosen:
    """The model that will be used; nothing is loaded yet."""

    model: Model
    source: Source
    unet: Source | None
    allow_pickle: bool


@dataclass(frozen=True)
class Loaded:
    """The engine, and what a recipe says about it."""

    sampler: Sampler
    chosen: Chosen
    device: torch.device
    dtype: torch.dtype


def choose(load_model: str, *, unet: str, tuned: Path, allow_pickle: bool, hasher: Hasher) -> Chosen:
    """Find the model, say on stderr which and why, and hash the files it consists of.

    Raises SdlabError when there is no such model or file.
    """
    from sdlab.models.resolve import resolve

    model = resolve(load_model, training=False, tuned=tuned, allow_pickle=allow_pickle)
    show.note(model.why)
    by_name = model.kind in BY_NAME
    names = identity.model_files(model.path)
    if unet:
        names = [name for name in names if not name.startswith("unet/")]
    asked = (load_model or model.name) if by_name else identity.portable(model.path, base=Path.cwd())
    source = Source(model.name, asked, model.path, _hashes(hasher, model.path, names), model.kind)
    return Chosen(model, source, _unet(unet, hasher) if unet else None, allow_pickle)


def _unet(text: str, hasher: Hasher) -> Source:
    path = Path(text).expanduser()
    kind = "folder" if path.is_dir() else "file"
    if not path.exists():
        from sdlab.models.resolve import resolve

        other = resolve(text, training=False)
        path, kind = other.path, other.kind
    named = path.absolute().parent if path.name == "unet" else path.absolute()
    name = named.stem if path.is_file() else named.name
    asked = identity.portable(path, base=Path.cwd())
    if kind in BY_NAME:
        name = asked = text
    return Source(name, asked, path, _hashes(hasher, path, identity.unet_files(path)), kind)


def _hashes(hasher: Hasher, path: Path, names: list[str]) -> dict[str, str]:
    try:
        return hasher.table(path, names)
    except OSError as reason:
        raise SdlabError(
            f"cannot be read ({reason.strerror})", where=str(reason.filename or path)
        ) from reason


def load(chosen: Chosen, *, device: str, dtype: str) -> Loaded:
    """Load the weights, with the device and number type meant by the two words (see models/memory.py)."""
    from sdlab.models.memory import pick_device, pick_dtype
    from sdlab.models.quiet import hush
    from sdlab.models.resolve import open_family

    picked = pick_device(device)
    number = pick_dtype(dtype, picked)
    hush()
    from sdlab.inference.sample import Sampler

    unet = (
        ""
        if chosen.unet is None
        else chosen.unet.asked
        if chosen.unet.kind in BY_NAME
        else str(chosen.unet.path)
    )
    family = open_family(chosen.model, unet=unet, allow_pickle=chosen.allow_pickle)
    pipeline = family.pipeline(family.load_denoiser(picked, number))
    return Loaded(Sampler(pipeline), chosen, picked, number)


def versions() -> dict[str, str]:
    """Of everything that can change a digit or a pixel."""
    import diffusers
    import PIL
    import torch
    import transformers

    return {
        "sdlab": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
    }


def hardware(device: torch.device) -> str:
    """What does the arithmetic: the card's name, or the vector instructions that torch uses on this CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
