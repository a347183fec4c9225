"""``sdlab train-vae``: fine-tune the VAE of a model, or train one from nothing, on a folder of pictures."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.commands.training import places_of, refuse_contradictions, refuse_own_source
from sdlab.errors import SdlabError
from sdlab.options import opt
from sdlab.training.config import RunConfig

if TYPE_CHECKING:
    from sdlab.models.vae import VaeObjective
    from sdlab.models.vae_source import VaeSource


@dataclass(frozen=True)
class TrainVaeConfig(RunConfig):
    """Options of ``sdlab train-vae``."""

    images: Annotated[
        Path, opt("Folder of pictures; no captions are needed.", old=("--train-dir",), group="Data")
    ] = Path("images")
    load_model: Annotated[
        str, opt("Model whose VAE to start from (default: sd15 with a CUDA card, else mini-sd).")
    ] = ""
    init: Annotated[
        str,
        opt("Start from nothing instead: small, small-flux2, sd, flux2, or a VAE's config.json.",
            after="load_model"),
    ] = ""  # fmt: skip
    vae: Annotated[
        str,
        opt("Start from this VAE: a single file, a folder or a train-vae run.", after="init"),
    ] = ""
    decoder_only: Annotated[
        bool,
        opt("Leave the encoder as it is: latents stay valid for models that know them.",
            flag="--decoder-only", after="vae"),
    ] = False  # fmt: skip
    save_model: Annotated[
        Path | None, opt("Folder of the run (default: tuned/<base>-vae, or tuned/vae-<init>).")
    ] = None
    crop: Annotated[
        int | None,
        opt("Train on random squares of this side, in pixels (default: whole pictures).", min=8, max=4096,
            group="Data", after="image_size"),
    ] = None  # fmt: skip
    held_out: Annotated[
        float,
        opt("Share of the pictures that are measured on and never trained on, at most 64; 0: none.",
            min=0.0, max=0.9, group="Data", after="crop"),
    ] = 0.05  # fmt: skip
    cache_dir: Annotated[
        Path | None,
        opt("What is known of the pictures' files (default: .sdlab-cache beside the run).", group="Data"),
    ] = None
    l1: Annotated[float, opt("Weight of the mean absolute error.", min=0.0, group="Loss")] = 1.0
    l2: Annotated[float, opt("Weight of the mean squared error.", min=0.0, group="Loss")] = 0.0
    perceptual: Annotated[float, opt("Weight of the perceptual term.", min=0.0, group="Loss")] = 0.5
    perceptual_net: Annotated[
        str,
        opt("What it sees: edges and structure, or LPIPS (needs the extra lpips).",
            choices=("structure", "lpips"), group="Loss"),
    ] = "structure"  # fmt: skip
    kl_weight: Annotated[
        float, opt("Weight of the latents' distance from a normal distribution.", min=0.0, group="Loss")
    ] = 1e-6
    disc_start: Annotated[
        int | None,
        opt("Train against a patch discriminator from this step on (default: never).", min=0, group="Loss"),
    ] = None
    disc_weight: Annotated[float, opt("Weight of the discriminator's term.", min=0.0, group="Loss")] = 0.5
    latent_noise: Annotated[
        float,
        opt("Noise on the latents, as a share of their spread: the decoder learns to bear a denoiser's errors.",
            min=0.0, max=1.0, group="Loss"),
    ] = 0.0  # fmt: skip
    preview_every: Annotated[
        int, opt("Steps between previews and measurements; 0: start and end.", min=0, group="Saving")
    ] = 500


def train_vae(config: TrainVaeConfig, given: frozenset[str]) -> None:
    """Train a VAE, which turns pictures into latents and back, on a folder of pictures.

    sdlab train-vae --images images/ --decoder-only            (sharper pictures from the same latents)

    sdlab train-vae --images images/ --init small              (a VAE from nothing)
    """
    from sdlab.models.vae import Autoencoder
    from sdlab.models.vae_source import run_name, vae_source
    from sdlab.training.record import settle, with_recorded
    from sdlab.training.vae import VaePlan, recommended_for_vae, train_vae

    refuse_contradictions(config)
    _refuse_contradictions(config)
    folder = config.save_model or Path("tuned") / run_name(
        config.init, config.vae, config.load_model, allow_pickle=config.allow_pickle
    )
    if config.resume:
        config = with_recorded(config, given, folder, command="train-vae")
        _refuse_contradictions(config)
    start = vae_source(
        config.init, config.vae, config.load_model, seed=config.seed, allow_pickle=config.allow_pickle
    )
    refuse_own_source(folder, (*([start.model.path] if start.model else []), *places_of(start)))
    objective = _objective(config)
    autoencoder = Autoencoder(start.part, objective, seed=config.seed)
    settled = settle(config, recommended_for_vae(start.part, is_fresh=bool(config.init)))
    _check_sizes(settled, autoencoder.grid)
    if not config.init and not config.decoder_only and not config.resume:
        show.warn(
            "the encoder is trained too: models that were trained on the old latents no longer fit this VAE. "
            "--decoder-only keeps their latents valid"
        )
    plan = VaePlan(
        facts={
            "objective": {**asdict(objective), "class": start.part.class_name, "crop": settled.crop},
            "init": config.init,
            **_facts(start),
        },
        crop_px=settled.crop,
        held_out=settled.held_out,
        keeps_latents=config.decoder_only,
        next_step=_next_step(config, folder, start, is_flux2=autoencoder.is_flux2),
    )
    train_vae(settled, autoencoder, folder=folder, plan=plan)


def _facts(start: VaeSource) -> dict[str, Any]:
    """What run.json says of what a run starts from."""
    from sdlab.training.record import model_facts

    if start.model:
        return model_facts(start.model)
    alone = {"model": {"kind": "vae", "path": str(start.place.resolve())}} if start.place else {}
    return {"base": start.base, **alone}


def _objective(config: TrainVaeConfig) -> VaeObjective:
    from sdlab.models.vae import VaeObjective

    return VaeObjective(
        l1=config.l1,
        l2=config.l2,
        perceptual=config.perceptual,
        perceptual_net=config.perceptual_net,
        kl_weight=config.kl_weight,
        disc_start=config.disc_start,
        disc_weight=config.disc_weight,
        latent_noise=config.latent_noise,
        decoder_only=config.decoder_only,
    )


def _refuse_contradictions(config: TrainVaeConfig) -> None:
    """Raises SdlabError for options that exclude each other."""
    if config.init and config.decoder_only:
        raise SdlabError(
            "a VAE from nothing has no encoder to keep", where="--decoder-only", next_step="Leave it out"
        )
    other = "--load-model" if config.load_model else "--vae" if config.vae else ""
    if config.init and other:
        raise SdlabError(
            f"--init starts from nothing, {other} from what is there", next_step="Give one of the two"
        )


def _check_sizes(config: TrainVaeConfig, grid: int) -> None:
    """Raises SdlabError for a crop that does not fit the grid or the pictures."""
    assert config.image_size
    if config.crop is None:
        return
    if config.crop % grid or config.crop > config.image_size:
        fits = min(config.image_size, max(grid, round(config.crop / grid) * grid))
        raise SdlabError(
            f"{config.crop} is not a multiple of {grid} up to --image-size {config.image_size}",
            where="--crop",
            next_step=f"Try {fits}",
        )


def _next_step(config: TrainVaeConfig, folder: Path, start: VaeSource, *, is_flux2: bool) -> str:
    """What to type with the result. The model is named: another run may be the newest by then."""
    asked = config.load_model or (start.model.name if start.model else "")
    model = f" --load-model {shlex.quote(asked)}" if asked else ""
    vae, images = shlex.quote(str(folder)), shlex.quote(str(config.images))
    if config.decoder_only:
        return f"draw with it: sdlab generate{model} --vae {vae} --prompt …"
    if not config.init:
        command = "train-flux2" if is_flux2 else "train-sd"
        return f"teach a model its latents: sdlab {command}{model} --vae {vae} --images {images}"
    command = "train-transformer" if is_flux2 else "train-sd"
    return f"train a model on it: sdlab {command} --init small --vae {vae} --images {images}"
