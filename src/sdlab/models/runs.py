"""What a run's folder says of the model in it. No heavy imports."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import read_json

LORA_FILE = "pytorch_lora_weights.safetensors"


def about(folder: Path) -> dict[str, Any]:
    """run.json of a run; empty where it cannot be read, as a half-made run must not hide the others."""
    try:
        return read_json(folder / "run.json")
    except SdlabError:
        return {}


def lora_of(folder: Path) -> Path | None:
    """The LoRA that a run has trained; None for a run of another kind, or one without a result yet."""
    path = folder / LORA_FILE
    return path if is_of_lora(folder) and path.is_file() else None


def is_of_lora(folder: Path) -> bool:
    """Does the run train a LoRA?"""
    adapter = about(folder).get("adapter")
    return isinstance(adapter, dict) and adapter.get("kind") == "lora"


def is_checkpoint(folder: Path) -> bool:
    """Is it a whole checkpoint in the folder of a run?"""
    real = folder.resolve()
    return (
        real.parent.name == "checkpoints"
        and (real / "manifest.json").is_file()
        and (real.parent.parent / "run.json").is_file()
    )


def weights_of(checkpoint: Path) -> Path:
    """The weights of a checkpoint: their moving average where there is one, as in the run's result.

    Raises SdlabError for a LoRA's that count otherwise than as they stand there.
    """
    adapter = about(checkpoint.resolve().parent.parent).get("adapter")
    scale = adapter.get("scale") if isinstance(adapter, dict) and adapter.get("kind") == "lora" else 1.0
    averaged = checkpoint / "ema.safetensors"
    path = averaged if averaged.is_file() else checkpoint / "weights.safetensors"
    if scale != 1.0:
        raise SdlabError(
            f"is a checkpoint of a LoRA that counts {scale} times (alpha/rank)",
            where=str(checkpoint),
            next_step=f"Give the base model with --load-model, and --lora {path}:{scale}",
        )
    return path


def is_vae_run(folder: Path) -> bool:
    """Is it the folder of a run of `train-vae`, finished or not? Such a run holds no other part of a model."""
    if any((folder / name).exists() for name in ("model_index.json", "unet", "transformer", "text_encoder")):
        return False
    if (folder / "run.json").is_file():
        return about(folder).get("command") == "train-vae"
    return (folder / "vae" / "config.json").is_file()


def vae_run(asked: str, tuned: Path = Path("tuned")) -> Path | None:
    """The folder of the `train-vae` run that is meant, by its path or its name in `tuned`; None for anything else.

    Raises SdlabError for a run that has no result yet.
    """
    path = Path(asked).expanduser()
    is_name = asked == path.name and asked != ".." and not path.exists()
    folder = tuned / asked if is_name else path
    if not asked or not folder.is_dir() or not is_vae_run(folder):
        return None
    if not (folder / "vae" / "config.json").is_file():
        raise SdlabError(
            "this run has no finished VAE yet",
            where=str(folder),
            next_step=f"Continue it: sdlab train-vae --save-model {folder} --resume",
        )
    return folder


def newest_run(tuned: Path) -> Path | None:
    """The finished run in `tuned` that ended last; None where there is none."""
    ended = []
    for path in sorted(tuned.glob("*/run.json")):
        folder = path.parent
        has_model = (folder / "model_index.json").is_file() or lora_of(folder) is not None
        if folder.name.startswith(".") or not has_model:
            continue
        said = about(folder)
        when = _time(said.get("ended"))
        if said.get("state") == "finished" and when is not None:
            ended.append((when, folder))
    return max(ended)[1] if ended else None


def _time(text: Any) -> datetime | None:
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def base_asked(folder: Path) -> str:
    """What names the base model of a LoRA run: a built-in's or hub model's name, else an absolute path.

    Raises SdlabError where run.json does not say, or where the base is no longer there.
    """
    said = about(folder).get("model")
    model = said if isinstance(said, dict) else {}
    kind, path = model.get("kind"), str(model.get("path") or "")
    next_step = f"Give the base model with --load-model and the LoRA with --lora {folder}"
    if kind in ("builtin", "hub"):
        asked = str(model.get("source") or model.get("name") or "")
    else:
        asked = path
        if asked and not Path(asked).exists():
            raise SdlabError(
                f"its base model is not at {path} any more", where=str(folder), next_step=next_step
            )
    if not asked:
        raise SdlabError(
            "is a LoRA, and its run.json does not say of which model", where=str(folder), next_step=next_step
        )
    return asked


def swap_of(folder: Path, option: str) -> str:
    """What the run was given as --unet or --vae; empty where nothing."""
    config = about(folder).get("config")
    value = config.get(option) if isinstance(config, dict) else None
    return value.strip() if isinstance(value, str) else ""
