"""Names of layers in LoRA files of all makes: what each stands for in a network that diffusers names.

diffusers and PEFT   ``unet.…``, ``transformer.…``, ``text_encoder.…``, ``base_model.model.…``
kohya                ``lora_unet_…``, ``lora_te_…``, with underscores for dots
ComfyUI              ``diffusion_model.…`` with the names of the original single files
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdlab.models import bfl, ldm

if TYPE_CHECKING:
    from torch import nn

_TENSOR = re.compile(r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.[A-Za-z_]\w*)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+)_lora\.(down|up)\.weight")  # diffusers before 0.22
_OLD_TEXT = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight")  # of text encoders
_PREFIX = re.compile(
    r"(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_"
    r"|lora_transformer_|lycoris_)*"
)
_TEXT_PREFIX = re.compile(r"text_encoder\.|lora_te1?_|text_encoders\.clip_[lh]\.transformer\.")


@dataclass(frozen=True)
class Place:
    """A layer that a name in a file stands for, or the part `index` of `num` equal parts of its output."""

    layer: str
    index: int = 0
    num: int = 1
    swapped: bool = False  # shift and scale stand the other way round there


def names_of(module: nn.Module) -> dict[str, list[Place]]:
    """Every name that a file may use for a layer of `module`, dotted and with underscores, and what it means."""
    from torch import nn

    found: dict[str, list[Place]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = [Place(name)]
            if other := _in_bfl(name):
                found.setdefault(other[0], []).append(other[1])
            if original := _in_ldm(name, module):
                found[original] = [Place(name)]
            if name.startswith("encoder.layers."):  # transformers before 5.6 had a `text_model` around it
                found[f"text_model.{name}"] = [Place(name)]
    return found | {name.replace(".", "_"): places for name, places in found.items()}


def _in_bfl(name: str) -> tuple[str, Place] | None:
    """Black Forest Labs' name of a layer of FLUX.2, and which part of that matrix is meant; None for other layers."""
    try:
        there = bfl.place_of(f"{name}.weight")
    except KeyError:
        return None
    index, num = (0, 1) if there.third is None else (there.third, 3)
    return there.name.removesuffix(".weight"), Place(name, index, num, there.halves_swapped)


def _in_ldm(name: str, module: nn.Module) -> str | None:
    """The original name of a layer of Stable Diffusion's UNet, as ComfyUI writes it; None for other layers."""
    if type(module).__name__ != "UNet2DConditionModel":
        return None
    try:
        return ldm.unet_name(f"{name}.weight", module.config).removesuffix(".weight")  # type: ignore[arg-type]
    except KeyError:
        return None


def split(name: str) -> tuple[str, str] | None:
    """(layer, ``down`` or ``up``) of a tensor's name; None if it is not a half of a LoRA."""
    match = _PROCESSOR.fullmatch(name)
    if match:
        layer = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{layer}", match[3]
    match = _OLD_TEXT.fullmatch(name)
    if match:
        return f"{match[1]}.{match[2]}_proj", match[3]
    match = _TENSOR.fullmatch(name)
    return (match[1], {"A": "down", "B": "up"}.get(match[2], match[2])) if match else None


def look_up(base: str, places: Mapping[str, Mapping[str, list[Place]]]) -> tuple[str, list[Place]]:
    """The part and the layers that a name means; no layers where it has no place."""
    text = _TEXT_PREFIX.match(base)
    if text:
        table = places.get("text_encoder", {})
        return "text_encoder", table.get(base[text.end() :], [])
    rest = _PREFIX.sub("", base, count=1)
    for part, table in places.items():
        if part != "text_encoder" and rest in table:
            return part, table[rest]
    if base.startswith("base_model.model."):  # PEFT says nowhere what it is a part of
        return "text_encoder", places.get("text_encoder", {}).get(rest, [])
    return "", []
