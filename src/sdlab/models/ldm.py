"""Names of Stable Diffusion tensors in a single file (the original "LDM" layout), from diffusers' names.

    unet          model.diffusion_model.     input_blocks, middle_block, output_blocks
    vae           first_stage_model.         encoder.down, decoder.up (counted backwards), 1x1 convolutions
    text_encoder  cond_stage_model.transformer.[text_model.]    of 1.x
                  cond_stage_model.model.                       of 2.x: OpenCLIP's names, q, k and v are one
    moving average of the unet  model_ema.   the name without its dots

Block numbers follow from the configuration, so that smaller models with the same classes work as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdlab.models import openclip

if TYPE_CHECKING:
    from sdlab.models.files import Stored

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."
EMA = "model_ema."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a UNet tensor behind ``model.diffusion_model.``; KeyError for one the layout lacks."""
    stem, leaf = name.rsplit(".", 1)
    if stem in _UNET_TOP:
        return f"{_UNET_TOP[stem]}.{leaf}"
    per_down = int(config.get("layers_per_block", 2)) + 1
    if m := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", stem):
        side, block, kind, layer, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        number = per_down * block + layer + (1 if side == "down" else 0)
        inner = f"0.{_RESNET[rest]}" if kind == "resnets" else f"1.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}.{leaf}"
    if m := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", stem):
        return f"input_blocks.{per_down * (int(m[1]) + 1)}.0.op.{leaf}"
    if m := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", stem):
        crossed = "CrossAttn" in config["up_block_types"][int(m[1])]
        return f"output_blocks.{per_down * (int(m[1]) + 1) - 1}.{2 if crossed else 1}.conv.{leaf}"
    if m := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", stem):
        return f"middle_block.1.{m[1]}.{leaf}"
    if m := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", stem):
        return f"middle_block.{2 * int(m[1])}.{_RESNET[m[2]]}.{leaf}"
    raise KeyError(name)


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a VAE tensor behind ``first_stage_model.``; KeyError for one the layout lacks."""
    stem, leaf = name.rsplit(".", 1)
    last = len(config["block_out_channels"]) - 1
    if stem in ("quant_conv", "post_quant_conv"):
        return name
    if m := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)", stem):
        return f"{m[1]}.{m[2].replace('conv_norm_out', 'norm_out')}.{leaf}"
    if m := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", stem):
        block = int(m[3]) if m[2] == "down" else last - int(m[3])
        return f"{m[1]}.{m[2]}.{block}.block.{m[4]}.{m[5].replace('conv_shortcut', 'nin_shortcut')}.{leaf}"
    if m := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv", stem):
        block = int(m[3]) if m[2] == "down" else last - int(m[3])
        return f"{m[1]}.{m[2]}.{block}.{m[4]}sample.conv.{leaf}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", stem):
        return f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3].replace('conv_shortcut', 'nin_shortcut')}.{leaf}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", stem):
        return f"{m[1]}.mid.attn_1.{_VAE_ATTENTION[m[2]]}.{leaf}"
    raise KeyError(name)


def clip_names(name: str) -> tuple[str, str]:
    """The two names a text encoder tensor may have behind ``cond_stage_model.transformer.``."""
    return f"text_model.{name}", name


def ema_name(name: str) -> str:
    """The whole name of the moving average of a UNet tensor, `name` being the one behind ``model.diffusion_model.``."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a single file."""

    name: str
    third: int | None = None  # which share of the rows it is, where q, k and v are one
    halves_swapped: bool = False


def place_of(part: str, name: str, config: Mapping[str, Any]) -> Place:
    """The place of a tensor in a single file, as every other tool writes it; KeyError for one the layout lacks.

    The text encoder's follows from its configuration: OpenCLIP's names where it is one.
    """
    if part == "unet":
        return Place(UNET + unet_name(name, config))
    if part == "vae":
        return Place(VAE + vae_name(name, config))
    assert part == "text_encoder", part
    if openclip.is_openclip(config):
        whole, third = openclip.name_of(name)
        return Place(OPENCLIP + whole, third)
    return Place(CLIP + clip_names(name)[0])


def taken(stored: Stored, place: Place) -> Stored:
    """The tensor that stands at `place`, out of what the file has under that name; all of it if it has no thirds."""
    if place.third is not None and stored.shape and stored.shape[0] % 3 == 0:
        return stored.rows(place.third, 3)
    return replace(stored, halves_swapped=True) if place.halves_swapped else stored
