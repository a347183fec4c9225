"""``sdlab train-sd``: fine-tune the UNet of a Stable Diffusion 1.x model on a folder of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated

from sdlab.commands.training import frozen_bytes, refuse_own_source, start
from sdlab.options import opt
from sdlab.training.config import TrainConfig, parse_range

PREVIEW_STEPS = 20


@dataclass(frozen=True)
class TrainSdConfig(TrainConfig):
    """Options of ``sdlab train-sd``."""

    unet: Annotated[
        str, opt("Take the UNet from here: a single file, a diffusers folder or a unet/ folder.")
    ] = ""
    vae: Annotated[str, opt("Take the VAE from here: a single file or a folder.")] = ""
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
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
        config = replace(config, timestep_range=f"{low}-{high}")

    from sdlab.models.bases import Objective
    from sdlab.models.export import save_pipeline
    from sdlab.models.opening import open_family
    from sdlab.models.sd import StableDiffusion
    from sdlab.training.record import settle
    from sdlab.training.run import Plan, train

    found = start(config, given, family="sd")
    config, model, folder = found.config, found.model, found.folder
    low, high = found.advice.timestep_range
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
    settled = settle(replace(config, timestep_range=f"{low}-{high}"), found.advice)
    refuse_own_source(folder, (str(model.path), config.unet, config.vae))
    objective = Objective(
        timestep_range=(low, high), snr_gamma=settled.snr_gamma or 0.0, noise_offset=settled.noise_offset
    )
    family = open_family(
        model, unet=config.unet, vae=config.vae, allow_pickle=config.allow_pickle, objective=objective
    )
    assert isinstance(family, StableDiffusion)
    train(
        settled,
        family,
        model,
        folder=folder,
        command="train-sd",
        objective={**asdict(objective), "timestep_range": [low, high], "scheduler": family.parts.scheduler},
        plan=Plan(
            save=lambda denoiser, into: save_pipeline(family, denoiser, into),
            frozen_bytes=frozen_bytes(family.parts),
            references=False,
            preview_guidance=found.advice.guidance,
            preview_steps=PREVIEW_STEPS,
        ),
    )
