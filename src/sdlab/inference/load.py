"""Which model, which files of it, and the engine around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import __version__, show
from sdlab.errors import SdlabError
from sdlab.inference import identity
from sdlab.inference.identity import Hasher

if TYPE_CHECKING:
    import torch

    from sdlab.inference.engines.kinds import Engine, Sampler
    from sdlab.models.base import Cond, Family
    from sdlab.models.resolve import Model

SAID_BYTES = 4e9  # a wait of seconds
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
class Asked:
    """What was typed to say which model."""

    load_model: str = ""
    unet: str = ""
    vae: str = ""
    loras: tuple[tuple[Path, float], ...] = ()  # files with their weights
    allow_pickle: bool = False


@dataclass(frozen=True)
class Chosen:
    """The model that will be used; nothing is loaded yet."""

    model: Model
    source: Source
    unet: Source | None
    vae: Source | None
    loras: tuple[tuple[Source, float], ...]  # with their weights
    own_lora: Source | None  # of a run that trained one; its weight is 1
    rest: Source | None  # all other parts, where the model is a file with a transformer alone
    allow_pickle: bool


@dataclass(frozen=True)
class Opened:
    """The model's family, its headers checked, and what it can be asked for; no weights yet."""

    chosen: Chosen
    family: Family
    engine: Engine


@dataclass(frozen=True)
class Loaded:
    """The engine, and what a recipe says about it."""

    sampler: Sampler
    chosen: Chosen
    device: torch.device
    dtype: torch.dtype


def choose(asked: Asked, *, tuned: Path, hasher: Hasher) -> Chosen:
    """Find the model, say on stderr which and why, and hash the files it consists of.

    Raises SdlabError when there is no such model or file.
    """
    from sdlab.models.resolve import resolve

    model = resolve(asked.load_model, training=False, tuned=tuned, allow_pickle=asked.allow_pickle)
    show.note(model.why)
    loras = tuple((_lora(path, hasher), weight) for path, weight in asked.loras)
    unet, vae = asked.unet or model.unet, asked.vae or model.vae
    left_out = [f"{part}/" for part in identity.DENOISERS if unet] + ["vae/"] * bool(vae)
    return Chosen(
        model,
        _model(model, asked.load_model, left_out, hasher),
        _swap(unet, ("scheduler", *identity.DENOISERS), hasher) if unet else None,
        _swap(vae, ("vae",), hasher) if vae else None,
        loras,
        _lora(model.lora, hasher) if model.lora else None,
        _rest(model.rest, ["transformer/", *left_out], hasher) if model.rest else None,
        asked.allow_pickle,
    )


def _model(model: Model, load_model: str, left_out: list[str], hasher: Hasher) -> Source:
    """The model's own files. A run that trained a LoRA goes by its own folder."""
    by_name = model.kind in BY_NAME and model.lora is None
    kind = "run" if model.lora else model.kind
    path = model.lora.parent if model.lora else model.path
    asked = (load_model or model.name) if by_name else identity.portable(path, base=Path.cwd())
    return Source(model.name, asked, model.path, _files(model.path, left_out, hasher), kind)


def _rest(folder: Path, left_out: list[str], hasher: Hasher) -> Source:
    # found again from the model's own file, so its place, which may be a home folder's cache, is not told
    return Source(folder.name, folder.name, folder, _files(folder, left_out, hasher), "folder")


def _files(path: Path, left_out: list[str], hasher: Hasher) -> dict[str, str]:
    """Hashes of a model's files but for the parts that are taken from elsewhere."""
    names = [name for name in identity.model_files(path) if not name.startswith(tuple(left_out))]
    return _hashes(hasher, path, names)


def _lora(path: Path, hasher: Hasher) -> Source:
    from sdlab.models.lora import LORA_FILE

    name = path.absolute().parent.name if path.name == LORA_FILE else path.stem
    return Source(name, identity.portable(path, base=Path.cwd()), path, _hashes(hasher, path, [""]), "file")


def _swap(text: str, folders: tuple[str, ...], hasher: Hasher) -> Source:
    """A part of the model that is taken from elsewhere; `folders` are what is read where that is a whole model."""
    path = Path(text).expanduser()
    kind = "folder" if path.is_dir() else "file"
    if not path.exists():
        from sdlab.models.resolve import resolve

        other = resolve(text, training=False)
        path, kind = other.path, other.kind
    named = path.absolute().parent if path.name in folders else path.absolute()
    name = named.stem if path.is_file() else named.name
    asked = identity.portable(path, base=Path.cwd())
    if kind in BY_NAME:
        name = asked = text
    return Source(name, asked, path, _hashes(hasher, path, identity.swapped_files(path, folders)), kind)


def _hashes(hasher: Hasher, path: Path, names: list[str]) -> dict[str, str]:
    try:
        unknown = hasher.unknown_bytes(path, names)
        if unknown > SAID_BYTES:
            show.note(f"reading {unknown / 1e9:.0f} GB to record what pictures are made with")
        return hasher.table(path, names)
    except OSError as reason:
        raise SdlabError(
            f"cannot be read ({reason.strerror})", where=str(reason.filename or path)
        ) from reason


def open_chosen(chosen: Chosen) -> Opened:
    """Read the headers. Raises SdlabError, naming file and tensor, where something does not fit."""
    from sdlab.models.opening import open_family
    from sdlab.models.quiet import hush

    hush()
    from sdlab.inference.engines.kinds import engine_of

    family: Any = open_family(
        chosen.model,
        unet=_text(chosen.unet),
        vae=_text(chosen.vae),
        allow_pickle=chosen.allow_pickle,
    )
    if loras := _loras(chosen):
        from sdlab.models.lora import check_loras
        from sdlab.models.parts import Part

        check_loras([part for part in vars(family.parts).values() if isinstance(part, Part)], loras)
    return Opened(chosen, family, engine_of(chosen.model.family, family))


def _loras(chosen: Chosen) -> list[tuple[Path, float]]:
    """Files with their weights, that of a run first."""
    own = [(chosen.own_lora.path, 1.0)] if chosen.own_lora else []
    return own + [(source.path, weight) for source, weight in chosen.loras]


def _text(source: Source | None) -> str:
    """What the models' side takes for a swapped part."""
    if source is None:
        return ""
    return source.asked if source.kind in BY_NAME else str(source.path)


def load(opened: Opened, *, device: str, dtype: str, prompts: Iterable[str]) -> Loaded:
    """Load the weights, with the device and number type meant by the two words (see models/memory.py).

    `prompts` are all that will be sent, negative ones too: where the text encoder is large, it reads them and is
    gone before the denoiser is loaded, so that a card has to hold one of the two.
    """
    from sdlab.models.memory import pick_device, pick_dtype

    picked = pick_device(device)
    number = pick_dtype(dtype, picked)
    family, engine, chosen = opened.family, opened.engine, opened.chosen
    conds, loras = None, _loras(chosen)
    if engine.encodes_first:
        conds = _encoded(family, picked, number, list(dict.fromkeys(prompts)))
    pipeline = family.pipeline(family.load_denoiser(picked, number), conds)
    if loras:
        from sdlab.models.lora import apply_loras

        apply_loras(pipeline, loras)
    return Loaded(engine.sampler(pipeline), chosen, picked, number)


def _encoded(
    family: Family, device: torch.device, dtype: torch.dtype, prompts: Sequence[str]
) -> Mapping[str, Cond]:
    """What the denoiser is told for each prompt, kept on the CPU. One at a time: who is beside it changes no bit."""
    import torch

    with torch.no_grad(), family.load_encoders(device, dtype) as encoders:
        made = {prompt: encoders.encode_prompts([prompt])[0] for prompt in prompts}
        return {prompt: {key: t.cpu() for key, t in cond.items()} for prompt, cond in made.items()}


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
