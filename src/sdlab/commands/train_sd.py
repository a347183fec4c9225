"""``sdlab train-sd``: train the UNet of a Stable Diffusion 1.x model, or a new one, on a folder of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated

from sdlab.commands.training import frozen_bytes, places_of, refuse_own_source, start
from sdlab.errors import SdlabError
from sdlab.options import opt
from sdlab.training.config import TrainConfig, parse_range

PREVIEW_STEPS = 20


@dataclass(frozen=True)
class TrainSdConfig(TrainConfig):
    """Options of ``sdlab train-sd``."""

    unet: Annotated[
        str, opt("Take the UNet from here: a single file, a diffusers folder or a unet/ folder.")
    ] = ""
    init: Annotated[
        str, opt("Train a new UNet instead, from nothing: small, sd, or a config.json.", after="unet")
    ] = ""
    vae: Annotated[str, opt("Take the VAE from here: a single file, a folder or a train-vae run.")] = ""
    text_encoder: Annotated[
        str, opt("Take text encoder and tokenizer from here: a model, or a folder of both.")
    ] = ""
    snr_gamma: Annotated[
        float | None, opt("Min-SNR weighting of the loss (5 is usual; 0: off).", min=0.0, group="Training")
    ] = None
    noise_offset: Annotated[
        float, opt("Offset noise for darker and lighter pictures.", min=0.0, group="Training")
    ] = 0.0
    timestep_range: Annotated[str | None, opt("Timesteps to train, as 0-700.", group="Training")] = None


def train_sd(config: TrainSdConfig, given: frozenset[str]) -> None:
    """Train the UNet of Stable Diffusion on a folder of pictures whose folder names are the prompts.

    sdlab train-sd --images images/            (the model is then in tuned/, see also: sdlab check images/)

    sdlab train-sd --init small --images images/            (a UNet from nothing, beside --load-model's other parts)
    """
    if config.init and config.unet:
        raise SdlabError(
            "--init trains a new UNet, --unet takes one that is there", next_step="Give one of the two"
        )
    if config.text_encoder and config.adapter == "lora":
        raise SdlabError(
            "a LoRA is saved without a text encoder, and would be used with the model's own",
            where="--text-encoder",
            next_step="Leave it out, or train all weights",
        )
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
        config = replace(config, timestep_range=f"{low}-{high}")

    from sdlab.models.bases import Objective
    from sdlab.models.export import save_pipeline
    from sdlab.models.opening import open_family
    from sdlab.models.sd import StableDiffusion
    from sdlab.training.record import settle
    from sdlab.training.run import Plan, train

    found = start(config, given, family="sd", command="train-sd", init_of=lambda config: config.init)
    config, model, folder = found.config, found.model, found.folder
    low, high = found.advice.timestep_range
    if config.timestep_range is not None:
        low, high = parse_range(config.timestep_range, where="--timestep-range")
    settled = settle(replace(config, timestep_range=f"{low}-{high}"), found.advice)
    objective = Objective(
        timestep_range=(low, high), snr_gamma=settled.snr_gamma or 0.0, noise_offset=settled.noise_offset
    )
    family = open_family(
        model,
        unet=config.unet,
        vae=config.vae,
        text_encoder=config.text_encoder,
        init=found.init,
        allow_pickle=config.allow_pickle,
        objective=objective,
    )
    assert isinstance(family, StableDiffusion)
    refuse_own_source(folder, (model.path, *places_of(family.parts)))
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
