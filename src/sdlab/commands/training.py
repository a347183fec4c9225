"""What the training commands share: from options to a model, a folder and settled options. Heavy imports inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.training.config import PromptedConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from sdlab.models.bases import Init, Recommended
    from sdlab.models.resolve import Model

Config = TypeVar("Config", bound=PromptedConfig)

COMMANDS = {"sd": "train-sd", "flux2": "train-flux2"}  # by family
WORDS = {"sd": "UNet", "flux2": "transformer"}  # what a family calls its denoiser


@dataclass(frozen=True)
class Start(Generic[Config]):
    """What a run starts from."""

    config: Config  # with a resumed run's own options
    model: Model
    folder: Path
    advice: Recommended
    init: Init | None = None  # an untrained denoiser instead of the model's own


def start(
    config: Config,
    given: frozenset[str],
    *,
    family: str,
    command: str,
    init_of: Callable[[Config], str] = lambda config: "",
) -> Start[Config]:
    """Find the model and the run's folder, take over a resumed run's options, and say which model it is.

    `init_of` tells what the options say of an untrained denoiser; a run of one has a base of its own. Raises SdlabError
    for options that exclude each other, a model of another family, or no run to resume.
    """
    from sdlab.models.bases import Init
    from sdlab.models.fresh import fresh_config, fresh_name
    from sdlab.models.opening import recommended, recommended_from_scratch
    from sdlab.models.resolve import resolve
    from sdlab.training.record import with_recorded

    refuse_contradictions(config)

    def find() -> Model:
        return resolve(config.load_model, training=True, family=family, allow_pickle=config.allow_pickle)

    def fresh_base() -> str:
        return f"{family}-{fresh_name(init_of(config))}" if init_of(config).strip() else ""

    folder = config.save_model or Path("tuned") / (fresh_base() or find().base)
    if config.resume:
        config = with_recorded(config, given, folder, command=command)
    init = init_of(config).strip()
    if init:
        fresh_config(
            "unet" if family == "sd" else "transformer", init
        )  # refused before a model is looked for
    _check_adapter(config, given, init)
    model = find()
    show.note(f"{model.why}; its {WORDS[family]} is a new one ({init})" if init else model.why)
    if model.family != family:
        raise SdlabError(
            f"is not a model for {command}", where=config.load_model or model.name,
            next_step=f"Use sdlab {COMMANDS[model.family]}",
        )  # fmt: skip
    if model.lora:
        raise SdlabError(
            "holds a LoRA, which cannot be trained on",
            where=str(model.lora.parent),
            next_step="Go on with that run (--resume), or start from its base model",
        )
    if init:
        model, advice = replace(model, base=fresh_base()), recommended_from_scratch(model, init)
        return Start(config, model, folder, advice, Init(init, config.seed))
    adapter = config.adapter if isinstance(config, TrainConfig) else "full"
    return Start(config, model, folder, recommended(model, adapter))


def _check_adapter(config: PromptedConfig, given: frozenset[str], init: str) -> None:
    """Raises SdlabError where an option means nothing for what is trained."""
    if not isinstance(config, TrainConfig):
        return
    if config.adapter == "lora" and init:
        raise SdlabError(
            "a LoRA beside weights that nobody has trained is of no use",
            where="--init",
            next_step="Leave out --adapter lora, or --init",
        )
    if config.adapter == "lora" and config.optimizer == "muon":
        raise SdlabError(
            "muon is for whole matrices, not for the thin ones of a LoRA",
            where="--optimizer",
            next_step="Use adamw, adamw8bit or adafactor",
        )
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


def refuse_contradictions(config: RunConfig) -> None:
    """Raises SdlabError for --resume beside --overwrite, and for a background that is no colour."""
    from sdlab.dataset.colour import colour_of

    colour_of(config.background)
    if config.resume and config.overwrite:
        raise SdlabError(
            "--resume goes on with a run, --overwrite replaces it", next_step="Give one of the two"
        )


def refuse_own_source(folder: Path, sources: Iterable[Path]) -> None:
    """Raises SdlabError if one of the files or folders that a run starts from lies where the run would be.

    `sources` are places that were found, never what an option says: that may be the name of a run or a size.
    """
    for source in sources:
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise SdlabError(
                f"{source} is what to start from, and would be replaced",
                where=str(folder),
                next_step="Name another folder with --save-model",
            )


def places_of(parts: Any) -> list[Path]:
    """Where the opened parts of a model lie, by whatever name they were asked for: networks, weights, tokenizers."""
    from sdlab.models.parts import Part

    held = list(vars(parts).values())
    networks = [part for part in held if isinstance(part, Part)]
    files = {stored.path for part in networks for stored in part.weights.values()}
    places = [part.where for part in networks] + [place for place in held if isinstance(place, Path)]
    return [*places, *sorted(files)]


def frozen_bytes(parts: Any) -> int:
    """Bytes of the parts of a model that are saved beside the denoiser, about: whole files, where they are copied."""
    from sdlab.models.parts import Part

    frozen = [part for part in vars(parts).values() if isinstance(part, Part)]
    frozen = [part for part in frozen if part.name not in ("unet", "transformer")]
    files = {stored.path for part in frozen if part.where.is_dir() for stored in part.weights.values()}
    tensors = [stored for part in frozen if not part.where.is_dir() for stored in part.weights.values()]
    return sum(path.stat().st_size for path in files if path.is_file()) + sum(t.nbytes for t in tensors)
