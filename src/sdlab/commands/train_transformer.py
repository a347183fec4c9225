"""``sdlab train-transformer``: train a FLUX.2 transformer from nothing, or go on with one, on a folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from sdlab.commands.train_flux2 import (
    AllowDistilled,
    Shift,
    TimestepSampling,
    Vae,
    parse_shift,
    train_flow,
)
from sdlab.commands.training import start
from sdlab.options import opt
from sdlab.training.config import PromptedConfig


@dataclass(frozen=True)
class TrainTransformerConfig(PromptedConfig):
    """Options of ``sdlab train-transformer``."""

    load_model: Annotated[
        str,
        opt(
            "Model whose VAE, text encoder and, without --init, transformer to take (default: flux2-klein-base-4b with "
            "a CUDA card, else mini-flux2)."
        ),
    ] = ""
    init: Annotated[str, opt("Train a new transformer, from nothing: small, medium, or a config.json.")] = ""
    vae: Vae = ""
    text_encoder: Annotated[
        str, opt("Take text encoder and tokenizer from here: a model, or a folder of both.")
    ] = ""
    allow_distilled: AllowDistilled = False
    timestep_sampling: TimestepSampling = "logit-normal"
    shift: Shift = None


def train_transformer(config: TrainTransformerConfig, given: frozenset[str]) -> None:
    """Train a FLUX.2 transformer, a new one or the model's own with all its weights, on a folder of pictures.

    sdlab train-transformer --init small --images images/      (the model is then tuned/flux2-small)

    sdlab train-transformer --init my.json --vae tuned/my-vae --images images/
    """
    if config.shift is not None:
        parse_shift(config.shift)

    from sdlab.training.record import settle

    found = start(
        config, given, family="flux2", command="train-transformer", init_of=lambda config: config.init
    )
    settled = settle(found.config, found.advice)
    assert settled.shift
    train_flow(
        replace(found, config=settled),
        command="train-transformer",
        vae=settled.vae,
        text_encoder=settled.text_encoder,
        sampling=settled.timestep_sampling,
        shift=settled.shift,
        allow_distilled=settled.allow_distilled,
    )
