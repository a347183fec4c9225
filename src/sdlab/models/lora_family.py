"""Which models a LoRA is for, told from the names and shapes in its header. No heavy imports.

Widths are those of what goes into a layer: prompts are 768 wide in Stable Diffusion 1.x, 1024 in 2.x and 2048 in
SDXL; a FLUX.2 block is 3072 (klein 4B), 4096 (klein 9B) or 6144 (dev) wide, a FLUX.1 block 3072.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdlab.models.bases import FLUX2_SHAPES
from sdlab.models.files import Header
from sdlab.models.lora_names import split

UNKNOWN = "a model that sdlab does not know"
SD1, SD2, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "SDXL"
SD3, FLUX1, FLUX2 = "Stable Diffusion 3", "FLUX.1", "FLUX.2"

_BY_PROMPT_WIDTH = {768: SD1, 1024: SD2, 1280: "the SDXL refiner", 2048: SDXL}
_BY_TEXT_WIDTH = {768: SD1, 1024: SD2}
_SD3_WIDTHS = (1536, 2432)
_HEAD = 128  # of FLUX.2: so many numbers an attention head
_FLUX2_WIDTHS = {
    shape[2] * _HEAD: name.replace("flux2", FLUX2).replace("-base", "").replace("-", " ").replace("b", "B")
    for name, shape in FLUX2_SHAPES.items()
}
_FLUX1_WIDTH, _FLUX1_NUM_DOUBLE = 3072, 19
_KLEIN_4B_NUM = FLUX2_SHAPES["flux2-klein-base-4b"][:2]  # its blocks of either kind; FLUX.1 has more

_TEXT = re.compile(r"(base_model_model_)?(lora_te|text_encoder)")
_UNET = re.compile(r"(^|_)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_")
_DOUBLE = re.compile(r"(?<!single_)(?:joint|double|transformer)_blocks_(\d+)_")
_SINGLE = re.compile(r"single_(?:transformer_)?blocks_(\d+)_")
_JOINT = re.compile(r"_attn_(add_[qkv]_proj|to_add_out)$|_ff_context_|_(img|txt)_")

# Which layers tell how wide a block is: by what goes in, and by what comes out
_IN = re.compile(
    r"_(qkv|linear1|mlp_0|to_[qkv]|add_[qkv]_proj|to_qkv_mlp_proj|linear_in|net_0_proj|proj_mlp)$"
)
_OUT = re.compile(r"_(attn_proj|linear2|mlp_2|to_out(_0)?|to_add_out|linear_out|net_2|proj_out)$")

_FLUX2_ALONE = re.compile(r"_to_qkv_mlp_proj$|_ff(_context)?_linear_(in|out)$|_stream_modulation_")
_FLUX1_ALONE = re.compile(
    r"single_transformer_blocks_\d+_(proj_mlp|proj_out|attn_to_[qkv]|norm_linear)$"
    r"|_(img_mod|txt_mod|modulation)_lin$|_norm1(_context)?_linear$|_ff(_context)?_net_"
)
_INSIDE = re.compile(r"_(linear[12]|mlp_[02])$")
_FLUX1_TIMES = {
    "linear1": 7,
    "linear2": 5,
    "mlp_0": 4,
    "mlp_2": 4,
}  # as wide as a block the inside of a layer is
_FLUX2_TIMES = {"linear1": 9, "linear2": 4, "mlp_0": 6, "mlp_2": 3}


@dataclass(frozen=True)
class _Layer:
    """A layer that is adapted: its name with underscores for dots, how wide what goes in and comes out is."""

    name: str
    width: int
    out: int
    is_convolution: bool


def family_of(header: Header) -> str:
    """``SDXL``, ``FLUX.2 klein 4B`` ...: the models that a LoRA is for; `UNKNOWN` where that cannot be told."""
    layers = list(_layers(header))
    denoiser = [layer for layer in layers if not _TEXT.match(layer.name)]
    if any(_UNET.search(layer.name) for layer in denoiser):
        return _unet(layers)
    if any(_DOUBLE.search(layer.name) or _SINGLE.search(layer.name) for layer in denoiser):
        return _transformer(denoiser)
    return _text_encoder(layers)


def _layers(header: Header) -> Iterator[_Layer]:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in header.tensors.items():
        half = split(name)
        if half:
            pairs.setdefault(half[0], {})[half[1]] = stored.shape
    for name, pair in pairs.items():
        down, up = pair.get("down", ()), pair.get("up", ())
        if len(down) > 1 and up:
            yield _Layer(name.replace(".", "_"), down[1], up[0], len(down) == 4)


def _unet(layers: list[_Layer]) -> str:
    """Of a UNet: by the width of its prompts, else by what only some of them have."""
    for layer in layers:
        if re.search(r"_attn2_to_[kv]$", layer.name):
            return _BY_PROMPT_WIDTH.get(layer.width, _other(layer.width))
    text = _text_encoder(layers)
    if text != UNKNOWN:
        return text
    if any(re.search(r"(?<!single)_transformer_blocks_[1-9]", layer.name) for layer in layers):
        return SDXL  # one block stands there in the others
    for layer in layers:
        if re.search(r"_attentions_\d+_proj_(in|out)$", layer.name) and layer.width == 320:
            return SD1 if layer.is_convolution else SD2
    return "Stable Diffusion 1.x, 2.x or SDXL"


def _text_encoder(layers: list[_Layer]) -> str:
    """By text encoders: SDXL has two, of FLUX.1 and SD 3 the others are T5."""
    names = [layer.name for layer in layers if _TEXT.match(layer.name)]
    if any(re.match(r"(lora_te3_|text_encoder_3_)", name) for name in names):
        return SD3
    second = [name for name in names if re.match(r"(lora_te2_|text_encoder_2_)", name)]
    if second:
        return FLUX1 if any("encoder_block_" in name for name in second) else SDXL
    for layer in layers:
        if _TEXT.match(layer.name) and re.search(r"self_attn_[qkv]_proj$|mlp_fc1$", layer.name):
            return _BY_TEXT_WIDTH.get(layer.width, _other(layer.width))
    return UNKNOWN


def _other(width: int) -> str:
    return f"a Stable Diffusion model with {width}-wide prompts"


def _transformer(layers: list[_Layer]) -> str:
    """Of a transformer: by its width, and where two have the same by what only one of them has."""
    names, width = [layer.name for layer in layers], _width(layers)
    is_joint = any(_SINGLE.search(name) or _JOINT.search(name) for name in names)
    if any("joint_blocks_" in name for name in names) or (is_joint and width in _SD3_WIDTHS):
        return SD3
    times = {found for layer in layers if (found := _times(layer, width))}
    if any(_FLUX2_ALONE.search(name) for name in names) or times & _FLUX2_TIMES.items():
        return _FLUX2_WIDTHS.get(width, f"a {FLUX2} model of width {width}" if width else FLUX2)
    num_double, num_single = _num(_DOUBLE, names), _num(_SINGLE, names)
    others = any("_img_mlp_net_" in name for name in names) or num_double > _FLUX1_NUM_DOUBLE
    if others or not is_joint or width not in _FLUX2_WIDTHS:
        return UNKNOWN
    if width != _FLUX1_WIDTH:
        return _FLUX2_WIDTHS[width]
    more = num_double > _KLEIN_4B_NUM[0] or num_single > _KLEIN_4B_NUM[1]
    if more or any(_FLUX1_ALONE.search(name) for name in names) or times & _FLUX1_TIMES.items():
        return FLUX1
    return f"{FLUX1} or {_FLUX2_WIDTHS[width]}"


def _width(layers: list[_Layer]) -> int:
    """How wide a block is; 0 where no layer says."""
    of_in = (layer.width for layer in layers if _IN.search(layer.name))
    return next(of_in, 0) or next((layer.out for layer in layers if _OUT.search(layer.name)), 0)


def _times(layer: _Layer, width: int) -> tuple[str, int] | None:
    """("linear1", 7): a layer whose inside is 7 times as wide as a block."""
    found = _INSIDE.search(layer.name)
    if not found or not width:
        return None
    inside = layer.out if found[1] in ("linear1", "mlp_0") else layer.width
    return found[1], inside // width


def _num(pattern: re.Pattern[str], names: list[str]) -> int:
    """How many blocks of a kind there are at least."""
    return max((int(found[1]) + 1 for name in names if (found := pattern.search(name))), default=0)
