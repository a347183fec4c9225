"""Names of FLUX.2 tensors in Black Forest Labs' single files, from diffusers' names.

transformer   [model.diffusion_model.]   double_blocks, single_blocks; q, k and v are one tensor; the last
                                         modulation has shift before scale, diffusers has scale before shift
vae                                      encoder.down, decoder.up (counted backwards), bn as it is
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdlab.models import ldm
from sdlab.models.ldm import Place

__all__ = ["PREFIXES", "Place", "place_of", "vae_name"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARK = "double_stream_modulation_img.lin.weight"  # is in every such file
DIFFUSERS_MARK = "double_stream_modulation_img.linear.weight"
FINAL = "final_layer.adaLN_modulation.1.weight"

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FUSED = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def place_of(name: str) -> Place:
    """The place, without prefix, of a tensor that diffusers calls `name`; KeyError for one the layout lacks."""
    stem, leaf = name.rsplit(".", 1)
    if stem in _TOP:
        whole = f"{_TOP[stem]}.{leaf}"
        return Place(whole, halves_swapped=whole == FINAL)
    if m := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem):
        if m[2] in _FUSED:
            fused, third = _FUSED[m[2]]
            return Place(f"double_blocks.{m[1]}.{fused}.{leaf}", third)
        return Place(f"double_blocks.{m[1]}.{_DOUBLE[m[2]]}.{_norm_leaf(m[2], leaf)}")
    if m := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", stem):
        return Place(f"single_blocks.{m[1]}.{_SINGLE[m[2]]}.{_norm_leaf(m[2], leaf)}")
    raise KeyError(name)


def _norm_leaf(stem: str, leaf: str) -> str:
    return "scale" if ".norm_" in stem else leaf


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a VAE tensor in a single file; KeyError for one the layout lacks."""
    if name.startswith("bn."):
        return name
    if name.startswith("quant_conv."):
        return f"encoder.{name}"
    if name.startswith("post_quant_conv."):
        return f"decoder.{name}"
    return ldm.vae_name(name, config)
