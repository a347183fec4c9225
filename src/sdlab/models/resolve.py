"""What ``--load-model`` means: a name, a folder, a file or a hub id becomes one Model, with the reason.

Importing this loads no model library; torch is asked for a card only where no model was named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.models.bases import (
    ALIASES,
    BUILTINS,
    LATER,
    Objective,
    Recommended,
    base_of,
    builtin_folder,
    recommended_for,
    safe_name,
)
from sdlab.models.files import read_json
from sdlab.options import did_you_mean

if TYPE_CHECKING:
    from sdlab.models.base import Family
    from sdlab.models.folder import SdParts
    from sdlab.models.parts import Part

WAYS_ON = "Give a local folder, a single file (.safetensors) or a built-in model (mini-sd)"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_BASE = re.compile(r"\w[\w.-]{0,79}")


@dataclass(frozen=True)
class Model:
    """A model that was found; nothing of it is loaded yet."""

    name: str  # short: mini-sd, sd15, the run's, folder's or file's name
    kind: str  # builtin, run, folder, file or hub
    path: Path  # folder or file; for a hub id its local snapshot
    family: str  # which file of models/ loads it: sd
    base: str  # sd15, mini-sd or the name: what default output folder and settings go by
    why: str  # one line: what was chosen and why
    source: str  # what was asked for; empty when nothing was


def resolve(
    load_model: str, *, training: bool, tuned: Path = Path("tuned"), allow_pickle: bool = False
) -> Model:
    """The model meant by `load_model`, or the default for training or making pictures when it is empty.

    Raises SdlabError, saying what would work, when nothing fits, a file is not a model, or the hub is needed
    and cannot be reached.
    """
    asked = load_model.strip()
    if not asked:
        return _default(training=training, tuned=tuned, allow_pickle=allow_pickle)
    found = _by_name(asked, tuned) or _by_path(asked, tuned, allow_pickle=allow_pickle) or _from_hub(asked)
    return replace(found, source=load_model)


def _default(*, training: bool, tuned: Path, allow_pickle: bool) -> Model:
    if not training:
        run = newest_run(tuned)
        if run is not None:
            return _folder(run, f"{run.as_posix()}: the newest finished run, as no --load-model was given")
    import torch

    if torch.cuda.is_available():
        why = "the default model, as no --load-model was given and there is a CUDA card"
        return replace(_alias("sd15", why), source="")
    runs = "" if training else f", no finished run in {tuned.as_posix()}/"
    return _builtin(
        "mini-sd", f"mini-sd: the built-in small model, as no --load-model was given{runs} and no CUDA card"
    )


def newest_run(tuned: Path) -> Path | None:
    """The finished run in `tuned` that ended last; None where there is none."""
    ended = []
    for path in sorted(tuned.glob("*/run.json")):
        if path.parent.name.startswith(".") or not (path.parent / "model_index.json").is_file():
            continue
        about = _run(path.parent)
        when = _time(about.get("ended"))
        if about.get("state") == "finished" and when is not None:
            ended.append((when, path.parent))
    return max(ended)[1] if ended else None


def _time(text: Any) -> datetime | None:
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def _run(folder: Path) -> dict[str, Any]:
    """run.json of a run; empty where it cannot be read, as a half-made run must not hide the others."""
    try:
        return read_json(folder / "run.json")
    except SdlabError:
        return {}


def _by_name(asked: str, tuned: Path) -> Model | None:
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
    if word in LATER:
        raise SdlabError("FLUX.2 is not supported yet", where=asked, next_step="Use sd15 or mini-sd")
    if run.is_dir():
        return _folder(run, f"{asked}: the run {run.as_posix()}")
    if Path(asked).exists():
        return None
    known = [*ALIASES, *BUILTINS, *sorted(p.parent.name for p in tuned.glob("*/run.json"))]
    near = did_you_mean(word, known)
    raise SdlabError(
        f"no model of that name{near or ' (known: ' + ', '.join(known[:8]) + ')'}",
        where=asked,
        next_step=WAYS_ON,
    )


def _by_path(asked: str, tuned: Path, *, allow_pickle: bool) -> Model | None:
    """A folder or file that exists; None for what may be a hub id. Raises SdlabError for a missing path."""
    path = Path(asked).expanduser()
    if path.is_dir():
        return _folder(path, f"{asked}: a folder")
    if path.exists():
        return _file(path, allow_pickle=allow_pickle)
    looks_local = asked.lower().endswith(SUFFIXES) or asked.startswith(("/", ".", "~")) or "\\" in asked
    first = path.parts[0] if path.parts else ""
    if looks_local or not _HUB_ID.fullmatch(asked) or first == tuned.name or Path(first).is_dir():
        siblings = sorted(p.as_posix() for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = did_you_mean(path.as_posix(), siblings)
        raise SdlabError(f"there is no such file or folder{near}", where=asked, next_step=WAYS_ON)
    return None


def _builtin(name: str, why: str) -> Model:
    folder = builtin_folder(name)
    if not (folder / "model_index.json").is_file():
        raise SdlabError(
            "this installation lacks the built-in model", where=name, next_step="Install sdlab again"
        )
    return Model(name, "builtin", folder, "sd", name, why, name)


def _folder(folder: Path, why: str) -> Model:
    """A pipeline folder, a run's or any other. Raises SdlabError when it holds no model we load."""
    is_run = (folder / "run.json").is_file()
    if not (folder / "model_index.json").is_file():
        _not_a_pipeline(folder, is_run=is_run)
    from_run = str(_run(folder).get("base", "")) if is_run else ""
    _check_family(folder)
    name = safe_name(folder.resolve().name)
    base = from_run if _BASE.fullmatch(from_run) else base_of(_unet_config(folder), name)
    return Model(name, "run" if is_run else "folder", folder, "sd", base, why, str(folder))


def _not_a_pipeline(folder: Path, *, is_run: bool) -> None:
    """Raise the SdlabError that says what the folder is instead, where we can tell."""
    if is_run:
        raise SdlabError(
            "this run has no finished model yet",
            where=str(folder),
            next_step="Continue it with --resume, or give another model",
        )
    if "checkpoints" in folder.resolve().parts[-2:]:
        raise SdlabError(
            "is a training checkpoint, not a model", where=str(folder), next_step="Give the folder of its run"
        )
    if (folder / "adapter_config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        raise SdlabError(
            "is a LoRA, an addition to a model", where=str(folder), next_step="Give a whole model"
        )


def _check_family(folder: Path) -> None:
    """Told from the files: raises SdlabError for any pipeline but Stable Diffusion's."""
    from sdlab.models.index import read_index

    read_index(folder)


def _unet_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "unet" / "config.json")


def _file(path: Path, *, allow_pickle: bool) -> Model:
    from sdlab.models.files import read_weights
    from sdlab.models.sniff import known_by_shape, recognise

    header = read_weights(path, allow_pickle=allow_pickle)
    if recognise(header) == "unet":
        raise SdlabError(
            "holds a UNet alone, no VAE and no text encoder",
            where=str(path),
            next_step=f"Give it as --unet {path}",
        )
    base, _ = known_by_shape(header)
    return Model(
        safe_name(path.stem), "file", path, "sd", base, f"{path}: a single file of {base}", str(path)
    )


def _alias(word: str, why: str) -> Model:
    return _hub(ALIASES[word], word, f"{word}: {why}", asked=f"{word} ({ALIASES[word]})")


def _from_hub(asked: str) -> Model:
    repo = asked.partition("@")[0]
    why = f"{asked}: from the Hugging Face hub"
    return _hub(asked, safe_name(repo.rpartition("/")[2]), why, asked=asked)


def _hub(repo: str, name: str, why: str, *, asked: str) -> Model:
    from sdlab.models.hub import snapshot

    folder, how = snapshot(repo, asked=asked)
    _check_family(folder)
    return Model(name, "hub", folder, "sd", base_of(_unet_config(folder), name), f"{why}, {how}", repo)


def open_family(
    model: Model, *, unet: str = "", allow_pickle: bool = False, objective: Objective | None = None
) -> Family:
    """The Family that loads `model`, its files checked; `unet` swaps the UNet for the one found there.

    The only place that tells families apart. Raises SdlabError, naming file and tensor, where something does
    not fit.
    """
    assert model.family == "sd", model.family
    from sdlab.models.sd import StableDiffusion

    parts = _parts(model.path, allow_pickle=allow_pickle)
    if unet.strip():
        parts = _swap_unet(parts, unet.strip(), allow_pickle=allow_pickle)
    return StableDiffusion(parts, objective=objective)


def _parts(path: Path, *, allow_pickle: bool) -> SdParts:
    from sdlab.models.folder import read_folder
    from sdlab.models.single_file import read_single_file

    read = read_folder if path.is_dir() else read_single_file
    return read(path, allow_pickle=allow_pickle)


def _swap_unet(parts: SdParts, asked: str, *, allow_pickle: bool) -> SdParts:
    """`--unet`: a single file, a `unet/` folder, or whatever --load-model takes as a folder."""
    from sdlab.models.folder import unet_part, with_unet
    from sdlab.models.single_file import read_single_unet

    path = Path(asked).expanduser()
    if path.is_file():
        unet: Part = read_single_unet(path, parts.unet.config, allow_pickle=allow_pickle)
        return with_unet(parts, unet, None)
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return with_unet(parts, unet_part(path, allow_pickle=allow_pickle), None)
    other = _parts(resolve(asked, training=False).path, allow_pickle=allow_pickle)
    return with_unet(parts, other.unet, other.scheduler)


def recommended(model: Model) -> Recommended:
    """Settings for `model` where the user gave none; the picture size of an unknown model is read from it."""
    return recommended_for(model.base, _image_size(model))


def _image_size(model: Model) -> int:
    if not model.path.is_dir():
        return 512
    size = _unet_config(model.path).get("sample_size")
    vae = read_json(model.path / "vae" / "config.json").get("block_out_channels")
    if type(size) is not int or not isinstance(vae, list) or not 1 <= size <= 1024:
        return 512
    return size * int(2 ** (min(len(vae), 8) - 1))
