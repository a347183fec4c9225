"""What ``--load-model`` means: a name, a folder, a file or a hub id becomes one Model, with the reason.

Importing this loads no model library; torch is asked for a card only where no model was named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.models import runs
from sdlab.models.bases import (
    ALIASES,
    BUILTIN_CAPTIONER,
    BUILTINS,
    CAPTIONERS,
    base_of,
    builtin_folder,
    flux2_base_of,
    safe_name,
)
from sdlab.models.files import read_json
from sdlab.models.runs import newest_run
from sdlab.options import did_you_mean

if TYPE_CHECKING:
    from sdlab.models.files import Header

__all__ = ["Model", "newest_run", "resolve"]

WAYS_ON = "Give a local folder, a single file (.safetensors) or a built-in model (mini-sd, mini-flux2)"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
DEFAULTS = {"sd": ("sd15", "mini-sd"), "flux2": ("flux2-klein-base-4b", "mini-flux2")}  # with a card, without
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_BASE = re.compile(r"\w[\w.-]{0,79}")
_MAX_NESTED = 8  # LoRA runs on runs on runs


@dataclass(frozen=True)
class Model:
    """A model that was found; nothing of it is loaded yet."""

    name: str  # short: mini-sd, sd15, the run's, folder's or file's name
    kind: str  # builtin, run, folder, file or hub; of a LoRA's run its base model's kind
    path: Path  # folder or file; for a hub id its local snapshot; of a LoRA's run its base model's
    family: str  # which file of models/ loads it: sd or flux2
    base: str  # sd15, mini-sd, flux2-klein-base-4b ... or the name: what default folder and settings go by
    why: str  # one line: what was chosen and why
    source: str  # what was asked for; empty when nothing was
    lora: Path | None = None  # a LoRA to put on it
    rest: Path | None = (
        None  # the folder with all other parts, where `path` is a file with a transformer alone
    )
    unet: str = ""  # what a LoRA's run was trained on instead of the model's own UNet or transformer
    vae: str = ""  # and instead of its VAE


def resolve(
    load_model: str,
    *,
    training: bool,
    family: str = "sd",
    tuned: Path = Path("tuned"),
    allow_pickle: bool = False,
) -> Model:
    """The model meant by `load_model`, or the default for training or making pictures when it is empty.

    `family`, sd or flux2, chooses among the defaults and nothing else.
    Raises SdlabError, saying what would work, when nothing fits, a file is not a model, or the hub is needed
    and cannot be reached.
    """
    asked = load_model.strip()
    if not asked:
        return _default(training=training, family=family, tuned=tuned, allow_pickle=allow_pickle)
    found = (
        _by_name(asked, tuned, allow_pickle=allow_pickle)
        or _by_path(asked, tuned, allow_pickle=allow_pickle)
        or _from_hub(asked)
    )
    if training and runs.is_checkpoint(Path(asked).expanduser()):
        way_on = "Go on from it with --resume, or give the folder of its run"
        raise SdlabError("is a training checkpoint, not a model", where=asked, next_step=way_on)
    return replace(found, source=load_model)


def _default(*, training: bool, family: str, tuned: Path, allow_pickle: bool) -> Model:
    if not training:
        run = newest_run(tuned)
        if run is not None:
            why = f"{run.as_posix()}: the newest finished run, as no --load-model was given"
            return _folder(run, why, allow_pickle=allow_pickle)
    import torch

    large, small = DEFAULTS[family]
    if torch.cuda.is_available():
        why = "the default model, as no --load-model was given and there is a CUDA card"
        return replace(_alias(large, why), source="")
    no_runs = "" if training else f", no finished run in {tuned.as_posix()}/"
    return _builtin(
        small, f"{small}: the built-in small model, as no --load-model was given{no_runs} and no CUDA card"
    )


def _by_name(asked: str, tuned: Path, *, allow_pickle: bool) -> Model | None:
    """An alias, a built-in or a run by its bare name; None for anything with a slash or a suffix."""
    if re.search(r"[/\\]|^[.~]", asked) or asked.lower().endswith(SUFFIXES):
        return None
    word = asked.lower()
    run = tuned / asked
    beside = (
        f" ({run.as_posix()} is a run of that name: give it with the slash)"
        if (run / "run.json").exists()
        else ""
    )
    if word in BUILTINS:
        return _builtin(word, f"{word}: the built-in model{beside}")
    if word in ALIASES:
        return _alias(word, f"{ALIASES[word]}{beside}")
    if run.is_dir():
        return _folder(run, f"{asked}: the run {run.as_posix()}", allow_pickle=allow_pickle)
    if word in CAPTIONERS or word == BUILTIN_CAPTIONER:
        raise _describes(asked)
    if Path(asked).exists():
        return None
    known = [*ALIASES, *BUILTINS, *sorted(p.parent.name for p in tuned.glob("*/run.json"))]
    near = did_you_mean(word, known)
    raise SdlabError(
        f"no model of that name{near or ' (known: ' + ', '.join(known[:12]) + ')'}",
        where=asked,
        next_step=WAYS_ON,
    )


def _by_path(asked: str, tuned: Path, *, allow_pickle: bool) -> Model | None:
    """A folder or file that exists; None for what may be a hub id. Raises SdlabError for a missing path."""
    path = Path(asked).expanduser()
    if path.is_dir():
        return _folder(path, f"{asked}: a folder", allow_pickle=allow_pickle)
    if path.exists():
        return _file(path, allow_pickle=allow_pickle)
    looks_local = asked.lower().endswith(SUFFIXES) or asked.startswith(("/", ".", "~")) or "\\" in asked
    first = path.parts[0] if path.parts else ""
    if looks_local or not _HUB_ID.fullmatch(asked) or first == tuned.name or Path(first).is_dir():
        siblings = sorted(p.as_posix() for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = did_you_mean(path.as_posix(), siblings)
        raise SdlabError(f"there is no such file or folder{near}", where=asked, next_step=WAYS_ON)
    return None


def _describes(asked: str) -> SdlabError:
    return SdlabError(
        "describes pictures and does not make them",
        where=asked,
        next_step=f"It is for: sdlab categorize --load-model {asked}",
    )


def _builtin(name: str, why: str) -> Model:
    folder = builtin_folder(name)
    if not (folder / "model_index.json").is_file():
        raise SdlabError(
            "this installation lacks the built-in model", where=name, next_step="Install sdlab again"
        )
    return Model(name, "builtin", folder, BUILTINS[name], name, why, name)


def _folder(folder: Path, why: str, *, allow_pickle: bool, depth: int = 0) -> Model:
    """A pipeline folder, a run's or any other. Raises SdlabError when it holds no model we load."""
    is_run = (folder / "run.json").is_file()
    if not (folder / "model_index.json").is_file():
        lora = runs.lora_of(folder)
        if lora is not None:
            return _lora_run(folder, lora, why, allow_pickle=allow_pickle, depth=depth)
        if runs.is_checkpoint(folder):
            return _checkpoint(folder, why, allow_pickle=allow_pickle, depth=depth)
        _not_a_pipeline(folder, is_run=is_run)
    name = safe_name(folder.resolve().name)
    family, base = _family_and_base(folder, name)
    return Model(name, "run" if is_run else "folder", folder, family, base, why, str(folder))


def _family_and_base(folder: Path, name: str) -> tuple[str, str]:
    """Told from the files: which file of models/ loads the folder, and which known model it is or came from."""
    from sdlab.models.index import layout_of

    family = layout_of(folder).family
    if said := _stated_base(folder):
        return family, said
    if family == "flux2":
        return family, flux2_base_of(denoiser_config(folder), is_distilled(folder), name)
    return family, base_of(denoiser_config(folder), name)


def _stated_base(folder: Path) -> str:
    """What a run's record says that it began with, sd15 or another name; "" for anything else."""
    said = str(runs.about(folder).get("base", "")) if (folder / "run.json").is_file() else ""
    return said if _BASE.fullmatch(said) else ""


def denoiser_config(folder: Path) -> dict[str, Any]:
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    return read_json(folder / part / "config.json")


def is_distilled(folder: Path) -> bool:
    return read_json(folder / "model_index.json").get("is_distilled") is True


def _lora_run(folder: Path, lora: Path, why: str, *, allow_pickle: bool, depth: int) -> Model:
    """The base model of a run that has trained a LoRA, with that LoRA on it."""
    base = _base_of_run(folder, allow_pickle=allow_pickle, depth=depth)
    if base.lora is not None:
        raise SdlabError(
            f"is a LoRA on top of another one ({base.lora})",
            where=str(folder),
            next_step="Give the model itself with --load-model and each LoRA with --lora",
        )
    return replace(
        base,
        name=safe_name(folder.resolve().name),
        base=_stated_base(folder) or base.base,
        why=f"{why}, a LoRA on {base.why}",
        source=str(folder),
        lora=lora,
        unet=runs.swap_of(folder, "unet"),
        vae=runs.swap_of(folder, "vae"),
    )


def _base_of_run(folder: Path, *, allow_pickle: bool, depth: int) -> Model:
    """The model that a run began with."""
    asked = runs.base_asked(folder)
    if depth >= _MAX_NESTED:
        raise SdlabError("is a LoRA on a LoRA's run on …, more than we follow", where=str(folder))
    path = Path(asked)
    if path.is_dir():
        return _folder(path, asked, allow_pickle=allow_pickle, depth=depth + 1)
    if path.is_file():
        return _file(path, allow_pickle=allow_pickle)
    return _by_name(asked, Path("tuned"), allow_pickle=allow_pickle) or _from_hub(asked)


def _checkpoint(folder: Path, why: str, *, allow_pickle: bool, depth: int) -> Model:
    """The model as it was at a checkpoint of its run: all else is taken from the run, or from what it began with."""
    run = folder.resolve().parent.parent
    _refuse_vae(run, folder)
    weights = runs.weights_of(folder)
    name = safe_name(f"{run.name}-{folder.resolve().name}")
    if runs.is_of_lora(run):
        base = _lora_run(run, weights, why, allow_pickle=allow_pickle, depth=depth)
        return replace(base, name=name, source=str(folder))
    if (run / "model_index.json").is_file():
        base = _folder(run, f"{run.name}: its run", allow_pickle=allow_pickle)
    elif runs.swap_of(run, "init") or runs.swap_of(run, "text_encoder"):
        raise SdlabError(
            "is a checkpoint of a run that began with --init or --text-encoder and has no finished model yet",
            where=str(folder),
            next_step="Continue the run with --resume, and look at its samples/ until then",
        )
    else:
        base = _base_of_run(run, allow_pickle=allow_pickle, depth=depth)
        base = replace(base, base=_stated_base(run) or base.base, vae=runs.swap_of(run, "vae"))
    why = f"{why}, {weights.name} of a checkpoint, all else from {base.why}"
    return replace(base, name=name, why=why, source=str(folder), unet=str(weights))


def _refuse_vae(run: Path, folder: Path) -> None:
    """Raise SdlabError where `folder` is, or is a checkpoint of, a run that has trained a VAE."""
    if runs.is_vae_run(run):
        raise SdlabError(
            "is a VAE, a part of a model",
            where=str(folder),
            next_step=f"Give it with --vae {run}, and the model it is for with --load-model",
        )


def _not_a_pipeline(folder: Path, *, is_run: bool) -> None:
    """Raise the SdlabError that says what the folder is instead, where we can tell."""
    from sdlab.models.captioner import is_blip

    _refuse_vae(folder, folder)
    if is_blip(folder):
        raise _describes(str(folder))
    if is_run:
        raise SdlabError(
            "this run has no finished model yet",
            where=str(folder),
            next_step="Continue it with --resume, or give another model",
        )
    if "checkpoints" in folder.resolve().parts[-2:]:
        raise SdlabError(
            "is not a whole checkpoint of a run",
            where=str(folder),
            next_step="Give checkpoints/step-NNNNNN of a run",
        )
    if (folder / "adapter_config.json").is_file() or (folder / runs.LORA_FILE).is_file():
        raise SdlabError(
            "is a LoRA, an addition to a model", where=str(folder), next_step="Give a whole model"
        )


def _file(path: Path, *, allow_pickle: bool) -> Model:
    from sdlab.models.files import read_weights
    from sdlab.models.single_file import told, unet_alone
    from sdlab.models.sniff import recognise

    header = read_weights(path, allow_pickle=allow_pickle)
    what = recognise(header)
    if what == "flux2":
        return _transformer_file(path, header)
    if what != "checkpoint":
        raise unet_alone(path)
    base, notes = told(header)
    why = ", ".join((f"{path}: a single file of {base}", *notes))
    return Model(safe_name(path.stem), "file", path, "sd", base, why, str(path))


def _transformer_file(path: Path, header: Header) -> Model:
    """A FLUX.2 transformer alone: everything else is taken from the known model of its size."""
    from sdlab.models.sniff import known_flux2_by_shape, states_distilled

    base, note = known_flux2_by_shape(header), ""
    if base in ALIASES and "klein" in base:
        stated = states_distilled(header)
        base = base.replace("-base", "") if stated else base
        note = (
            ""
            if stated is not None
            else " (or the distilled one: the file does not say, and their tensors are alike)"
        )
    rest = builtin_folder(base) if base in BUILTINS else _rest_of(path, base)
    why = f"{path}: the transformer of {base}{note}, all else from {base}"
    return Model(safe_name(path.stem), "file", path, "flux2", base, why, str(path), rest=rest)


def _rest_of(path: Path, base: str) -> Path:
    from sdlab.models.hub import snapshot

    try:
        return snapshot(ALIASES[base], asked=base, without="transformer")[0]
    except SdlabError as reason:
        raise SdlabError(
            f"is the transformer of {base} alone; VAE, text encoder and tokenizer would come from {ALIASES[base]} "
            f"({reason.what})",
            where=str(path),
            next_step=f"Give a folder that has them, --load-model FOLDER --unet {path}, or fetch the hub model "
            f"once: hf download {ALIASES[base]}",
        ) from reason


def _alias(word: str, why: str) -> Model:
    return _hub(ALIASES[word], word, f"{word}: {why}", asked=f"{word} ({ALIASES[word]})")


def _from_hub(asked: str) -> Model:
    repo = asked.partition("@")[0]
    if repo in CAPTIONERS.values():
        raise _describes(asked)
    why = f"{asked}: from the Hugging Face hub"
    return _hub(asked, safe_name(repo.rpartition("/")[2]), why, asked=asked)


def _hub(repo: str, name: str, why: str, *, asked: str) -> Model:
    from sdlab.models.hub import snapshot

    folder, how = snapshot(repo, asked=asked)
    family, base = _family_and_base(folder, name)
    return Model(name, "hub", folder, family, base, f"{why}, {how}", repo)
