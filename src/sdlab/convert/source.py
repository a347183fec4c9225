"""What is to be converted: a whole model, some of its parts, or a LoRA. Told from the files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.models import runs
from sdlab.models.bases import ALIASES, BUILTINS, safe_name
from sdlab.models.files import is_pickle, read_header
from sdlab.models.lora_files import PEFT_FILE, is_lora
from sdlab.models.resolve import SUFFIXES, Model, resolve


@dataclass(frozen=True)
class Source:
    """Something to convert; nothing of it but headers is read."""

    name: str  # short, fit for a file's name
    why: str  # one line: what was chosen and why
    path: Path  # a folder or file with networks, or a LoRA's file
    is_lora: bool
    is_run: bool  # of sdlab; its result is named after it
    beside: Path  # the folder where the result goes by default

    @property
    def is_file(self) -> bool:
        """A model in one file; it becomes a folder by default."""
        return self.path.is_file() and not self.is_lora


def find(asked: str, *, allow_pickle: bool) -> Source:
    """What `asked` means: a name, a path, a hub id, or for nothing the newest run as in every other command.

    Raises SdlabError, saying what would work, where there is nothing to convert.
    """
    path = Path(asked.strip()).expanduser()
    if asked.strip() and _is_path(asked.strip(), path):
        return _by_path(path, asked)
    if (run := runs.vae_run(asked.strip())) is not None:
        return Source(
            safe_name(run.resolve().name), f"{asked}: the VAE of a run", run / "vae", False, True, run.parent
        )
    model = resolve(asked, training=False, allow_pickle=allow_pickle)
    if model.lora is not None:
        return Source(model.name, model.why, model.lora, True, True, model.lora.parent.parent)
    return Source(model.name, model.why, model.path, False, model.kind == "run", _beside(model))


def lora_in(path: Path) -> Path | None:
    """The LoRA's file that a path means: the file itself, a run's, or the one of a folder that PEFT saved."""
    if path.is_file():
        if path.suffix == ".json":  # the index of shards
            return None
        return path if not is_pickle(path) and is_lora(read_header(path)) else None
    return next((path / name for name in (runs.LORA_FILE, PEFT_FILE) if (path / name).is_file()), None)


def _is_path(asked: str, path: Path) -> bool:
    """Is it a path, as a user writes one, to something that is no run? Names go before files of the same name."""
    if (path / "run.json").is_file() or not path.exists():
        return False
    written_so = bool(re.search(r"[/\\]|^[.~]", asked)) or asked.lower().endswith(SUFFIXES)
    known = asked.lower() in (*ALIASES, *BUILTINS) or (Path("tuned") / asked).is_dir()
    return written_so or not known


def _by_path(path: Path, asked: str) -> Source:
    whole = (path / "model_index.json").is_file()
    lora = None if whole else lora_in(path)
    if path.is_dir() and not (whole or lora or any(path.glob("*.safetensors*")) or any(path.glob("*.bin"))):
        raise SdlabError(
            "holds no model", where=asked, next_step="Give a model's folder or file with --model-path"
        )
    what = "a LoRA" if lora else "a folder" if path.is_dir() else "a file"
    name, beside = _named(path)
    return Source(name, f"{asked}: {what}", lora or path, lora is not None, False, beside)


def _named(path: Path) -> tuple[str, Path]:
    """A name for the result, and the folder it goes to by default: never into a model's own."""
    if path.is_file():
        return safe_name(path.name.split(".")[0] if path.suffix == ".json" else path.stem), path.parent
    whole = path.resolve()
    beside = path.parent if path.name not in ("", "..") else whole.parent
    if (whole.parent / "model_index.json").is_file():  # a part of a model: unet/, vae/
        return safe_name(f"{whole.parent.name}-{whole.name}"), whole.parent.parent
    return safe_name(whole.name), beside


def _beside(model: Model) -> Path:
    return model.path.parent if model.kind in ("run", "folder", "file") else Path()
