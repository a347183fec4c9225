"""A model that was found becomes the Family that loads it, with the settings that suit it.

The only place that tells families apart. Importing this loads no model library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError
from sdlab.models import runs
from sdlab.models.bases import (
    DISTILLED,
    FROM_SCRATCH,
    RECOMMENDED,
    FlowObjective,
    Init,
    Objective,
    Recommended,
    recommended_for,
)
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
    text_encoder: str = "",
    init: Init | None = None,
    allow_pickle: bool = False,
    objective: Objective | FlowObjective | None = None,
) -> Family:
    """The Family that loads `model`, its files checked; `unet`, `vae` and `text_encoder` swap those parts.

    They name where the part is found; `init` puts an untrained denoiser that fits all others in the place of the
    model's own. The only place that tells families apart. Raises SdlabError, naming file and tensor, where something
    does not fit.
    """
    assert not (unet and init), "a denoiser from elsewhere, and an untrained one"
    unet = "" if init else unet.strip() or model.unet
    swaps = _Swaps(unet, vae.strip() or model.vae, text_encoder.strip(), init)
    if model.family == "flux2":
        return _open_flux2(model, swaps, allow_pickle=allow_pickle, objective=objective)
    return _open_sd(model, swaps, allow_pickle=allow_pickle, objective=objective)


@dataclass(frozen=True)
class _Swaps:
    """What takes the place of a model's own parts."""

    unet: str
    vae: str
    text_encoder: str
    init: Init | None


def _open_sd(
    model: Model, swaps: _Swaps, *, allow_pickle: bool, objective: Objective | FlowObjective | None
) -> StableDiffusion:
    from sdlab.models import swap
    from sdlab.models.sd import StableDiffusion

    assert not isinstance(objective, FlowObjective), "an objective of FLUX.2"
    find = partial(_folder_of, family="sd")
    parts = _sd_parts(model, allow_pickle=allow_pickle)
    if swaps.unet:
        parts = swap.swap_unet(parts, swaps.unet, find=find, allow_pickle=allow_pickle)
    if swaps.vae:
        parts = swap.swap_sd_vae(parts, swaps.vae, find=find, allow_pickle=allow_pickle)
    if swaps.text_encoder:
        parts = swap.swap_sd_text_encoder(parts, swaps.text_encoder, find=find, allow_pickle=allow_pickle)
    if not parts.vae.weights:
        raise SdlabError("holds no VAE", where=str(parts.vae.where), next_step="Give one with --vae FILE")
    if swaps.init:
        parts = swap.with_fresh_unet(parts, swaps.init)
    return StableDiffusion(parts, objective=objective)


def _open_flux2(
    model: Model, swaps: _Swaps, *, allow_pickle: bool, objective: Objective | FlowObjective | None
) -> Flux2:
    from sdlab.models import swap
    from sdlab.models.flux2 import Flux2

    assert not isinstance(objective, Objective), "an objective of Stable Diffusion"
    find = partial(_folder_of, family="flux2")
    parts = _flux2_parts(model, allow_pickle=allow_pickle)
    if swaps.unet:
        parts = swap.swap_transformer(parts, swaps.unet, find=find, allow_pickle=allow_pickle)
    if swaps.vae:
        parts = swap.swap_flux2_vae(parts, swaps.vae, find=find, allow_pickle=allow_pickle)
    if swaps.text_encoder:
        parts = swap.swap_flux2_text_encoder(parts, swaps.text_encoder, find=find, allow_pickle=allow_pickle)
    if swaps.init:
        parts = swap.with_fresh_transformer(parts, swaps.init)
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
    mini-flux2 where its transformer is less than 1024 wide. A run that began with an untrained denoiser makes pictures
    of the size that it was trained on, and needs no words before a prompt.
    """
    found = _recommended(model, adapter)
    if model.kind != "run" or not runs.swap_of(model.path, "init"):
        return found
    size = runs.about(model.path).get("image_size")
    if isinstance(size, int) and 16 <= size <= 4096:
        found = replace(found, image_size=size)
    return replace(found, prefix="")


def recommended_from_scratch(model: Model, init: str) -> Recommended:
    """Settings for the training of an untrained denoiser that is put into `model`, where the user gave none.

    Those of the known size that is meant; for a config.json those of the next smaller one, with its own picture size.
    Raises SdlabError for what is no size and no config.json.
    """
    from sdlab.models.fresh import fresh_config, known_sizes

    name = "unet" if model.family == "sd" else "transformer"
    config, _ = fresh_config(name, init)
    if init.strip() in known_sizes(name):
        return FROM_SCRATCH[f"{model.family}-{init.strip()}"]
    if model.family == "sd":
        widths, size = config.get("block_out_channels"), config.get("sample_size")
        widest = max((w for w in widths if type(w) is int), default=0) if isinstance(widths, list) else 0
        found = FROM_SCRATCH["sd-small" if widest < 320 else "sd-sd"]
        return replace(found, image_size=8 * size) if isinstance(size, int) and 8 <= size <= 512 else found
    heads, each = config.get("num_attention_heads", 48), config.get("attention_head_dim", 128)
    width = heads * each if isinstance(heads, int) and isinstance(each, int) else 0  # refused later
    found = FROM_SCRATCH["flux2-small" if width < 512 else "flux2-medium"]
    return replace(found, image_size=_flux2_size(model.rest or model.path))


def _recommended(model: Model, adapter: str) -> Recommended:
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
