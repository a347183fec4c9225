"""A model that was found becomes the Family that loads it, with the settings that suit it.

The only place that tells families apart. Importing this loads no model library.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError
from sdlab.models.bases import DISTILLED, RECOMMENDED, FlowObjective, Objective, Recommended, recommended_for
from sdlab.models.files import read_json
from sdlab.models.resolve import Model, denoiser_config, is_distilled, resolve

if TYPE_CHECKING:
    from sdlab.models.base import Family
    from sdlab.models.flux2 import Flux2
    from sdlab.models.flux2_folder import Flux2Parts
    from sdlab.models.folder import SdParts
    from sdlab.models.sd import StableDiffusion
    from sdlab.models.window import PromptWindow


def open_family(
    model: Model,
    *,
    unet: str = "",
    vae: str = "",
    allow_pickle: bool = False,
    objective: Objective | FlowObjective | None = None,
) -> Family:
    """The Family that loads `model`, its files checked; `unet` and `vae` swap those parts for what is found there.

    The only place that tells families apart. Raises SdlabError, naming file and tensor, where something does
    not fit.
    """
    unet, vae = unet.strip() or model.unet, vae.strip() or model.vae
    if model.family == "flux2":
        return _open_flux2(model, unet=unet, vae=vae, allow_pickle=allow_pickle, objective=objective)
    return _open_sd(model, unet=unet, vae=vae, allow_pickle=allow_pickle, objective=objective)


def _open_sd(
    model: Model, *, unet: str, vae: str, allow_pickle: bool, objective: Objective | FlowObjective | None
) -> StableDiffusion:
    from sdlab.models import swap
    from sdlab.models.sd import StableDiffusion

    assert not isinstance(objective, FlowObjective), "an objective of FLUX.2"
    find = partial(_folder_of, family="sd")
    parts = _sd_parts(model, allow_pickle=allow_pickle)
    if unet:
        parts = swap.swap_unet(parts, unet, find=find, allow_pickle=allow_pickle)
    if vae:
        parts = swap.swap_sd_vae(parts, vae, find=find, allow_pickle=allow_pickle)
    if not parts.vae.weights:
        raise SdlabError("holds no VAE", where=str(parts.vae.where), next_step="Give one with --vae FILE")
    return StableDiffusion(parts, objective=objective)


def _open_flux2(
    model: Model, *, unet: str, vae: str, allow_pickle: bool, objective: Objective | FlowObjective | None
) -> Flux2:
    from sdlab.models import swap
    from sdlab.models.flux2 import Flux2

    assert not isinstance(objective, Objective), "an objective of Stable Diffusion"
    find = partial(_folder_of, family="flux2")
    parts = _flux2_parts(model, allow_pickle=allow_pickle)
    if unet:
        parts = swap.swap_transformer(parts, unet, find=find, allow_pickle=allow_pickle)
    if vae:
        parts = swap.swap_flux2_vae(parts, vae, find=find, allow_pickle=allow_pickle)
    return Flux2(parts, objective=objective)


def _sd_parts(model: Model, *, allow_pickle: bool) -> SdParts:
    from sdlab.models.folder import read_folder
    from sdlab.models.single_file import read_single_file

    read = read_folder if model.path.is_dir() else read_single_file
    return read(model.path, allow_pickle=allow_pickle)


def _flux2_parts(model: Model, *, allow_pickle: bool) -> Flux2Parts:
    from sdlab.models.flux2_file import read_transformer_file
    from sdlab.models.flux2_folder import read_flux2_folder

    if model.rest is None:
        return read_flux2_folder(model.path, allow_pickle=allow_pickle)
    config = denoiser_config(model.rest)
    transformer, _ = read_transformer_file(model.path, config, allow_pickle=allow_pickle)
    parts = read_flux2_folder(model.rest, allow_pickle=allow_pickle, transformer=transformer)
    return replace(parts, is_distilled=model.base in DISTILLED)


def _folder_of(asked: str, *, family: str) -> Path:
    """The pipeline folder of the model that a part is to come from; SdlabError for one of another family."""
    other = resolve(asked, training=False)
    if other.lora or other.unet:
        weights = other.unet or other.lora
        raise SdlabError(
            "is no whole model of its own", where=asked, next_step=f"Its weights are in {weights}"
        )
    if other.family != family or not other.path.is_dir():
        word = {"sd": "Stable Diffusion", "flux2": "FLUX.2"}[family]
        raise SdlabError(f"is no {word} model", where=asked, next_step="Give a part of the same family")
    return other.path


def prompt_window(model: Model) -> PromptWindow:
    """How many tokens the model's text encoder reads, and what it cuts off a prompt. Loads no weights."""
    if model.family == "flux2":
        from sdlab.models import flux2_text

        return flux2_text.prompt_window(_flux2_parts(model, allow_pickle=True))
    from sdlab.models import sd

    return sd.prompt_window(_sd_parts(model, allow_pickle=True))


def recommended(model: Model, adapter: str = "full") -> Recommended:
    """Settings for `model` where the user gave none; the picture size of an unknown model is read from it.

    `adapter` is full or lora. A FLUX.2 model of a shape that we do not know is taken for a large one, or for one like
    mini-flux2 where its transformer is less than 1024 wide.
    """
    if model.family == "sd":
        return recommended_for(model.base, _image_size(model), adapter=adapter)
    folder = model.rest or model.path
    config = denoiser_config(folder)
    width = int(config.get("num_attention_heads", 48)) * int(config.get("attention_head_dim", 128))
    like = "mini-flux2" if width < 1024 else "flux2-klein-base-4b"
    found = recommended_for(model.base, _flux2_size(folder), like=like, adapter=adapter)
    few_steps = model.base in DISTILLED if model.rest else is_distilled(folder)
    return replace(found, guidance=1.0, steps=4) if few_steps else found


def _image_size(model: Model) -> int:
    if model.path.is_dir():
        size = denoiser_config(model.path).get("sample_size")
        vae = read_json(model.path / "vae" / "config.json").get("block_out_channels")
    elif model.base in RECOMMENDED:
        return 512  # which is not looked at
    else:
        parts = _sd_parts(model, allow_pickle=True)
        size = parts.unet.config.get("sample_size")
        vae = parts.vae.config.get("block_out_channels")
    if type(size) is not int or not isinstance(vae, list) or not 1 <= size <= 1024:
        return 512
    return size * int(2 ** (min(len(vae), 8) - 1))


def _flux2_size(folder: Path) -> int:
    size = read_json(folder / "vae" / "config.json").get("sample_size")
    return size if type(size) is int and 64 <= size <= 1024 and size % 16 == 0 else 1024
