"""Which model, and which files of it and beside it. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.inference import identity
from sdlab.inference.identity import Hasher
from sdlab.models.runs import vae_run

if TYPE_CHECKING:
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
    autov3: str = ""  # of a LoRA in safetensors: the name it has in Civitai's lists

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
    embeddings: tuple[Path, ...] = ()  # textual inversions, files or folders of them
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
    embeddings: tuple[Source, ...] = ()  # by name, sorted; those that no prompt names are not read


def choose(asked: Asked, *, tuned: Path, hasher: Hasher) -> Chosen:
    """Find the model, say on stderr which and why, and hash the files it consists of.

    Raises SdlabError when there is no such model or file.
    """
    from sdlab.models.resolve import resolve

    model = resolve(asked.load_model, training=False, tuned=tuned, allow_pickle=asked.allow_pickle)
    show.note(model.why)
    loras = tuple((lora_source(path, hasher), weight) for path, weight in asked.loras)
    unet, vae = asked.unet or model.unet, asked.vae or model.vae
    left_out = [f"{part}/" for part in identity.DENOISERS if unet] + ["vae/"] * bool(vae)
    return Chosen(
        model,
        _model(model, asked.load_model, left_out, hasher),
        _swap(unet, ("scheduler", *identity.DENOISERS), hasher) if unet else None,
        _swap(vae, ("vae",), hasher) if vae else None,
        loras,
        lora_source(model.lora, hasher) if model.lora else None,
        _rest(model.rest, ["transformer/", *left_out], hasher) if model.rest else None,
        asked.allow_pickle,
        _embeddings(asked.embeddings, hasher),
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


def lora_source(path: Path, hasher: Hasher) -> Source:
    """A LoRA's file, hashed; its name is the file's, or that of the run that trained it. SdlabError if unreadable."""
    from sdlab.models.lora import LORA_FILE

    name = path.absolute().parent.name if path.name == LORA_FILE else path.stem
    source = _file(name, path, hasher)
    return replace(source, autov3=hasher.autov3(path)) if path.suffix == ".safetensors" else source


def _embeddings(paths: Sequence[Path], hasher: Hasher) -> tuple[Source, ...]:
    if not paths:
        return ()
    from sdlab.inference.prompts.embeddings import on_the_shelf

    return tuple(_file(name, path, hasher) for name, path in sorted(on_the_shelf(paths).items()))


def _file(name: str, path: Path, hasher: Hasher) -> Source:
    return Source(name, identity.portable(path, base=Path.cwd()), path, _hashes(hasher, path, [""]), "file")


def _swap(text: str, folders: tuple[str, ...], hasher: Hasher) -> Source:
    """A part of the model that is taken from elsewhere; `folders` are what is read where that is a whole model."""
    path = Path(text).expanduser()
    kind = "folder" if path.is_dir() else "file"
    if not path.exists() and (run := vae_run(text)) is not None:
        path, kind = run, "folder"
    elif not path.exists():
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
