"""``sdlab train-sd``: fine-tune the UNet of a Stable Diffusion 1.x model on a folder of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.options import opt
from sdlab.training.config import TrainConfig, parse_range


@dataclass(frozen=True)
class TrainSdConfig(TrainConfig):
    """Options of ``sdlab train-sd``."""

    unet: Annotated[
        str, opt("Take the UNet from here: a single file, a diffusers folder or a unet/ folder.")
    ] = ""
    snr_gamma: Annotated[
        float | None, opt("Min-SNR weighting of the loss (5 is usual; 0: off).", min=0.0, group="Training")
    ] = None
    noise_offset: Annotated[
        float, opt("Offset noise for darker and lighter pictures.", min=0.0, group="Training")
    ] = 0.0
    timestep_range: Annotated[str | None, opt("Timesteps to train, as 0-700.", group="Training")] = None


def train_sd(config: TrainSdConfig, given: frozenset[str]) -> None:
    """Fine-tune the UNet of Stable Diffusion on a folder of pictures whose folder names are the prompts.

    sdlab train-sd --images images/            (the model is then in tuned/, see also: sdlab check images/)
    """
    from sdlab.dataset.colour import colour_of

    colour_of(config.background)
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
        config = replace(config, timestep_range=f"{low}-{high}")
    if config.resume and config.overwrite:
        raise SdlabError(
            "--resume goes on with a run, --overwrite replaces it", next_step="Give one of the two"
        )

    from sdlab.models.bases import Objective
    from sdlab.models.export import save_pipeline
    from sdlab.models.resolve import open_family, recommended, resolve
    from sdlab.models.sd import StableDiffusion
    from sdlab.training.record import settle, with_recorded
    from sdlab.training.run import train

    model = (
        None
        if config.save_model
        else resolve(config.load_model, training=True, allow_pickle=config.allow_pickle)
    )
    folder = config.save_model or Path("tuned") / (model.base if model else "")
    if config.resume:
        config = with_recorded(config, given, folder)
    model = resolve(config.load_model, training=True, allow_pickle=config.allow_pickle)
    show.note(model.why)
    advice = recommended(model)
    low, high = advice.timestep_range
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
    settled = settle(replace(config, timestep_range=f"{low}-{high}"), advice)
    for source in (str(model.path), config.unet):
        if source and folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise SdlabError(
                f"{source} is what to start from, and would be replaced",
                where=str(folder),
                next_step="Name another folder with --save-model",
            )
    objective = Objective(
        timestep_range=(low, high), snr_gamma=settled.snr_gamma or 0.0, noise_offset=settled.noise_offset
    )
    family = open_family(model, unet=config.unet, allow_pickle=config.allow_pickle, objective=objective)
    assert isinstance(family, StableDiffusion)
    train(
        settled,
        family,
        model,
        folder=folder,
        command="train-sd",
        objective={**asdict(objective), "timestep_range": [low, high], "scheduler": family.parts.scheduler},
        save=lambda denoiser, into: save_pipeline(family, denoiser, into),
    )
