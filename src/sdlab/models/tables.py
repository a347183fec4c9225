"""Which tensors the models we know have, as data: so that looking at a file needs no model library.

Building a network to ask it takes seconds and 350 MB for the imports alone. ``configs/tensors.json`` is written by
``python -m recipes.tensor_tables``; a test compares all of it with the networks that the libraries build.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sdlab.models.bases import CONFIGS
from sdlab.models.files import read_json

TABLE = CONFIGS / "tensors.json"
WITHOUT_EFFECT = {  # settings that change no tensor's name or shape
    "AutoencoderKL": (
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
    ),
    "AutoencoderKLFlux2": ("sample_size", "force_upcast"),
    "UNet2DConditionModel": ("sample_size", "dropout", "upcast_attention"),
    "Flux2Transformer2DModel": ("rope_theta", "eps"),
}
CLIP_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)  # the settings of a CLIP text encoder that tensors depend on; heads must divide the width


def known_tensors(class_name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Name to shape of every tensor of the network that `config` describes; None where the table has none like it."""
    table = _table()
    wanted = signature(class_name, config, table["defaults"].get(class_name, {}))
    for entry in table["entries"]:
        if entry["class"] == class_name and entry["config"] == wanted:
            return {name: tuple(shape) for name, shape in entry["tensors"].items()}
    return None


def signature(class_name: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that tensors depend on, those that `config` leaves out at the class's `defaults`."""
    if class_name == "CLIPTextModel":
        return {key: config.get(key, defaults.get(key)) for key in CLIP_SHAPES}
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    none = WITHOUT_EFFECT.get(class_name, ())
    return {key: _plain(value) for key, value in {**defaults, **own}.items() if key not in none}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@cache
def _table() -> dict[str, Any]:
    return read_json(TABLE)
