"""Names of OpenCLIP's text encoder, which single files of Stable Diffusion 2.x hold, from transformers' names.

q, k and v are one tensor there. Its last layer, `text_projection`, `logit_scale` and `attn_mask` are in such files as
well; Stable Diffusion reads the layer before, so that our model ends there and these are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
ROOTS = ("token_embedding.", "positional_embedding", "ln_final.", "transformer.resblocks.")


def is_openclip(config: Mapping[str, Any]) -> bool:
    """Is it an OpenCLIP encoder, as in Stable Diffusion 2.x? Its activation is the exact GELU, CLIP's is another."""
    return config.get("hidden_act") == "gelu"


def name_of(name: str) -> tuple[str, int | None]:
    """OpenCLIP's name, and which third of the rows it is where q, k and v are one; KeyError for one it lacks."""
    if name in _TOP:
        return _TOP[name], None
    m = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if m is None:
        raise KeyError(name)
    layer, stem, leaf = f"transformer.resblocks.{m[1]}", m[2], m[3]
    if stem in _FUSED:
        return f"{layer}.attn.in_proj_{leaf}", _FUSED[stem]
    return f"{layer}.{_LAYER[stem]}.{leaf}", None


def is_last_layer(name: str, num_layers: int) -> bool:
    """Is `name`, behind the prefix, of the one layer after the `num_layers` that are read?"""
    return name.startswith(f"transformer.resblocks.{num_layers}.")
