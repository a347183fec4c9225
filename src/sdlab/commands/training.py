"""What the training commands share: from options to a model, a folder and settled options. Heavy imports inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.training.config import TrainConfig

if TYPE_CHECKING:
    from sdlab.models.bases import Recommended
    from sdlab.models.resolve import Model

Config = TypeVar("Config", bound=TrainConfig)

COMMANDS = {"sd": "train-sd", "flux2": "train-flux2"}  # by family


@dataclass(frozen=True)
class Start(Generic[Config]):
    """What a run starts from."""

    config: Config  # with a resumed run's own options
    model: Model
    folder: Path
    advice: Recommended


def start(config: Config, given: frozenset[str], *, family: str) -> Start[Config]:
    """Find the model and the run's folder, take over a resumed run's options, and say which model it is.

    Raises SdlabError for options that exclude each other, a model of another family, or no run to resume.
    """
    from sdlab.dataset.colour import colour_of
    from sdlab.models.opening import recommended
    from sdlab.models.resolve import resolve
    from sdlab.training.record import with_recorded

    colour_of(config.background)
    if config.resume and config.overwrite:
        raise SdlabError(
            "--resume goes on with a run, --overwrite replaces it", next_step="Give one of the two"
        )

    def find() -> Model:
        return resolve(config.load_model, training=True, family=family, allow_pickle=config.allow_pickle)

    folder = config.save_model or Path("tuned") / find().base
    if config.resume:
        config = with_recorded(config, given, folder)
    _check_adapter(config, given)
    model = find()
    show.note(model.why)
    if model.family != family:
        raise SdlabError(
            f"is not a model for {COMMANDS[family]}", where=config.load_model or model.name,
            next_step=f"Use sdlab {COMMANDS[model.family]}",
        )  # fmt: skip
    if model.lora:
        raise SdlabError(
            "holds a LoRA, which cannot be trained on",
            where=str(model.lora.parent),
            next_step="Go on with that run (--resume), or start from its base model",
        )
    return Start(config, model, folder, recommended(model, config.adapter))


def _check_adapter(config: TrainConfig, given: frozenset[str]) -> None:
    """Raises SdlabError where an option means nothing for what is trained."""
    alone = sorted(f"--{name}" for name in given & {"rank", "alpha"})
    if config.adapter == "full" and alone:
        raise SdlabError(
            f"{' and '.join(alone)} is of a LoRA", next_step="Add --adapter lora, or leave it out"
        )
    if config.adapter == "lora" and config.weights == "bf16" and "weights" in given:
        raise SdlabError(
            "a LoRA is trained in fp32 always; the weights beside it are in what --dtype says",
            where="--weights",
            next_step="Leave it out",
        )


def refuse_own_source(folder: Path, sources: Sequence[str]) -> None:
    """Raises SdlabError if one of the files or folders that a run starts from lies where the run would be."""
    for source in sources:
        if source and folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise SdlabError(
                f"{source} is what to start from, and would be replaced",
                where=str(folder),
                next_step="Name another folder with --save-model",
            )


def frozen_bytes(parts: Any) -> int:
    """Bytes of the parts of a model that are saved beside the denoiser, about: whole files, where they are copied."""
    from sdlab.models.parts import Part

    frozen = [part for part in vars(parts).values() if isinstance(part, Part)]
    frozen = [part for part in frozen if part.name not in ("unet", "transformer")]
    files = {stored.path for part in frozen if part.where.is_dir() for stored in part.weights.values()}
    tensors = [stored for part in frozen if not part.where.is_dir() for stored in part.weights.values()]
    return sum(path.stat().st_size for path in files if path.is_file()) + sum(t.nbytes for t in tensors)
