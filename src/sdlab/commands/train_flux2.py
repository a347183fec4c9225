"""``sdlab train-flux2``: fine-tune the transformer of a FLUX.2 model on a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, TypeVar

from sdlab import show
from sdlab.commands.training import Start, frozen_bytes, places_of, refuse_own_source, start
from sdlab.errors import SdlabError
from sdlab.options import opt
from sdlab.training.config import PromptedConfig, TrainConfig

if TYPE_CHECKING:
    import torch

    from sdlab.dataset.buckets import Item
    from sdlab.models.flux2 import DenoiserSize

Settled = TypeVar("Settled", bound=PromptedConfig)

LARGE = 10**9  # weights; the memory of smaller models is no question where there is no card

Vae = Annotated[str, opt("Take the VAE from here: a single file, a folder or a train-vae run.")]
AllowDistilled = Annotated[
    bool, opt("Train a distilled klein, which unlearns its four steps.", flag="--allow-distilled")
]
TimestepSampling = Annotated[
    str, opt("How noise levels are drawn.", choices=("logit-normal", "uniform"), group="Training")
]
Shift = Annotated[
    str | None,
    opt("More noise: auto for by size, or a number (1: no shift). Default: what suits the model.",
        group="Training"),
]  # fmt: skip


@dataclass(frozen=True)
class TrainFlux2Config(TrainConfig):
    """Options of ``sdlab train-flux2``."""

    load_model: Annotated[
        str, opt("Model to start from (default: flux2-klein-base-4b with a CUDA card, else mini-flux2).")
    ] = ""
    unet: Annotated[
        str,
        opt("Take the transformer from here: a single file or a diffusers folder.", old=("--transformer",)),
    ] = ""
    vae: Vae = ""
    allow_distilled: AllowDistilled = False
    timestep_sampling: TimestepSampling = "logit-normal"
    shift: Shift = None


def train_flux2(config: TrainFlux2Config, given: frozenset[str]) -> None:
    """Fine-tune the transformer of FLUX.2 on a folder of pictures whose folder names are the prompts.

    sdlab train-flux2 --images images/            (pictures with a.ref.png beside a.png teach edits)
    """
    if config.shift is not None:
        parse_shift(config.shift)

    from sdlab.training.record import settle

    found = start(config, given, family="flux2", command="train-flux2")
    settled = settle(found.config, found.advice)
    assert settled.shift
    train_flow(
        replace(found, config=settled),
        command="train-flux2",
        unet=settled.unet,
        vae=settled.vae,
        sampling=settled.timestep_sampling,
        shift=settled.shift,
        allow_distilled=settled.allow_distilled,
    )


def train_flow(
    found: Start[Settled],
    *,
    command: str,
    unet: str = "",
    vae: str,
    text_encoder: str = "",
    sampling: str,
    shift: str,
    allow_distilled: bool,
) -> None:
    """Train a FLUX.2 transformer, the model's own or a new one, as the settled options say, and save the pipeline."""
    from sdlab.models.bases import FlowObjective
    from sdlab.models.export import save_pipeline
    from sdlab.models.flux2 import Flux2, size_of
    from sdlab.models.flux2_text import prompt_window
    from sdlab.models.opening import open_family
    from sdlab.training.run import Plan, train

    config, model, folder = found.config, found.model, found.folder
    objective = FlowObjective(sampling, parse_shift(shift))
    family = open_family(
        model,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        init=found.init,
        allow_pickle=config.allow_pickle,
        objective=objective,
    )
    assert isinstance(family, Flux2)
    refuse_own_source(folder, (model.path, *places_of(family.parts)))
    if family.parts.is_distilled:
        _distilled(model.name, allowed=allow_distilled)
    window = prompt_window(family.parts).window
    train(
        config,
        family,
        model,
        folder=folder,
        command=command,
        objective=asdict(objective),
        plan=Plan(
            save=lambda denoiser, into: save_pipeline(family, denoiser, into),
            frozen_bytes=frozen_bytes(family.parts),
            references=True,
            preview_guidance=found.advice.guidance,
            preview_steps=found.advice.steps,
            tell_memory=memory_teller(config, size_of(family.parts), grid=family.grid, window=window),
        ),
    )


def parse_shift(text: str) -> float | None:
    """``auto`` as None, a number above 0 as it is. Raises SdlabError for anything else."""
    if text == "auto":
        return None
    try:
        shift = float(text)
    except ValueError:
        shift = 0.0
    if not 0 < shift <= 100:
        raise SdlabError(
            f"'{text}' is no shift", where="--shift", next_step="Write auto, or a number such as 3; 1 is none"
        )
    return shift


def _distilled(name: str, *, allowed: bool) -> None:
    """Refuse a step-distilled model, or warn; both say why."""
    why = (
        "is a distilled klein: it was taught to draw in four steps without guidance, and plain training on pictures "
        "unlearns that, so results get soft and generic"
    )
    ways = "Train its base model (flux2-klein-base-4b, flux2-klein-base-9b), whose LoRA works on the distilled one too"
    if not allowed:
        raise SdlabError(why, where=name, next_step=f"{ways}, or add --allow-distilled")
    show.warn(f"{name} {why}. {ways}")


def memory_teller(
    config: PromptedConfig, size: DenoiserSize, *, grid: int, window: int
) -> Callable[[Sequence[Item], torch.device], None]:
    """What says, before anything is loaded, how much memory the run's largest batch will need.

    It warns where the card has less, naming what would fit. Small models are passed over where there is no card.
    """

    def tell(items: Sequence[Item], device: torch.device) -> None:
        from sdlab.training.estimate import estimate, what_fits

        if device.type != "cuda" and size.num_parameters < LARGE:
            return
        tokens = window + max(num_tokens(item, grid) for item in items)
        adapter = config.adapter if isinstance(config, TrainConfig) else "full"
        lora = adapter == "lora"
        num_lora = size.num_lora_parameters(config.rank if isinstance(config, TrainConfig) else 16)
        assert config.optimizer and config.weights and config.batch
        needed = estimate(
            num_parameters=size.num_parameters,
            num_trained=num_lora if lora else size.num_parameters,
            optimizer=config.optimizer,
            weights=config.weights,
            fused=bool(config.fused_backward),
            width=size.width,
            num_blocks=size.num_blocks,
            tokens=tokens,
            batch=config.batch,
            grad_checkpointing=bool(config.grad_checkpointing),
            adapter=adapter,
            ema=bool(config.ema),
        )
        show.note(needed.as_line())
        has_gib = _card_gib(device)
        if has_gib is None or needed.total <= has_gib:
            return
        fits = what_fits(
            has_gib,
            num_parameters=size.num_parameters,
            num_lora=num_lora,
            width=size.width,
            num_blocks=size.num_blocks,
            tokens=tokens,
            adapter=adapter,
        )
        way = f"This fits on paper: {fits}" if fits else "Take a smaller --image-size or model"
        show.warn(f"the card has {has_gib:.1f} GiB, less than the run needs. {way}")

    return tell


def num_tokens(item: Item, grid: int) -> int:
    """Tokens of a sample's picture and its references."""
    return sum((height // grid) * (width // grid) for height, width in (item.size_px, *item.reference_sizes))


def _card_gib(device: torch.device) -> float | None:
    """Memory of the card; None for a device that is none."""
    if device.type != "cuda":
        return None
    import torch

    return float(torch.cuda.get_device_properties(device).total_memory / 2**30)
