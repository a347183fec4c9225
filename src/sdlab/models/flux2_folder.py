"""A FLUX.2 pipeline folder, as diffusers saves it, read as data and checked part by part.

Two kinds, told by the pipeline's class: klein has a Qwen3 text encoder, dev a Mistral 3 (of which only the language
half is read; it never sees pictures here). Only the layers that FLUX.2 looks at are kept of either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models.files import Stored, component_weights, read_json, regular_size
from sdlab.models.folder import DIFFUSERS_STEM, TRANSFORMERS_STEMS, check_tokenizer, read_config
from sdlab.models.index import read_index
from sdlab.models.parts import Part, bounded

MAX_TEMPLATE_BYTES = 1 << 18
TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja")


@dataclass(frozen=True)
class Kind:
    """What klein and dev do differently."""

    name: str  # klein or dev
    layers: tuple[int, int, int]  # hidden states that make a prompt's embedding
    text_class: str  # the half of the text encoder that is loaded
    model_type: str  # of its configuration


KINDS = {
    "Flux2KleinPipeline": Kind("klein", (9, 18, 27), "Qwen3Model", "qwen3"),
    "Flux2Pipeline": Kind("dev", (10, 20, 30), "MistralModel", "mistral"),
}


@dataclass(frozen=True)
class Flux2Parts:
    """All parts of a FLUX.2 model: configurations and places of tensors, no weights."""

    transformer: Part
    vae: Part
    text_encoder: Part  # its first layers only; its folder holds all of it
    tokenizer: Path  # a folder with its files
    scheduler: dict[str, Any]  # as in scheduler_config.json
    layers: tuple[int, int, int]
    kind: str  # klein or dev
    is_distilled: bool  # made to draw in a few steps
    folder: Path  # the pipeline folder whose frozen parts can be copied as they are


def read_flux2_folder(
    folder: Path, *, allow_pickle: bool = False, transformer: Part | None = None
) -> Flux2Parts:
    """The parts of a pipeline folder; headers only. Raises SdlabError naming the file at fault and why.

    With `transformer` the folder's own is not looked at, and may be missing but for its configuration.
    """
    index = read_index(folder)
    kind = KINDS[index["_class_name"]]
    tokenizer = folder / "tokenizer"
    check_tokenizer(tokenizer)
    _check_template(tokenizer)
    return Flux2Parts(
        transformer=transformer or transformer_part(folder / "transformer", allow_pickle=allow_pickle),
        vae=vae_part(folder / "vae", allow_pickle=allow_pickle),
        text_encoder=text_part(folder / "text_encoder", kind, allow_pickle=allow_pickle),
        tokenizer=tokenizer,
        scheduler=read_scheduler(folder / "scheduler"),
        layers=kind.layers,
        kind=kind.name,
        is_distilled=index.get("is_distilled") is True,
        folder=folder,
    )


def transformer_part(folder: Path, *, allow_pickle: bool) -> Part:
    """The transformer in a `transformer/` folder."""
    config = read_config(folder)
    _check_class(config, "Flux2Transformer2DModel", folder)
    weights = component_weights(folder, DIFFUSERS_STEM, allow_pickle=allow_pickle)
    return Part("transformer", "Flux2Transformer2DModel", config, weights, folder)


def vae_part(folder: Path, *, allow_pickle: bool) -> Part:
    """The VAE in a `vae/` folder."""
    config = read_config(folder)
    _check_class(config, "AutoencoderKLFlux2", folder)
    weights = component_weights(folder, DIFFUSERS_STEM, allow_pickle=allow_pickle)
    return Part("vae", "AutoencoderKLFlux2", config, with_batch_count(weights, folder), folder)


def own_text_part(folder: Path, kind: str, *, allow_pickle: bool) -> Part:
    """The text encoder of a folder with text_encoder/ and tokenizer/, both checked, for FLUX.2 klein or dev."""
    check_tokenizer(folder / "tokenizer")
    _check_template(folder / "tokenizer")
    wanted = next(one for one in KINDS.values() if one.name == kind)
    return text_part(folder / "text_encoder", wanted, allow_pickle=allow_pickle)


def _check_class(config: Mapping[str, Any], wanted: str, folder: Path) -> None:
    found = config.get("_class_name", wanted)
    if found != wanted:
        raise SdlabError(
            f"its class is {str(found)[:60]}, not {wanted}",
            where=str(folder),
            next_step="Give the part of a FLUX.2 model, or of a run that trained one",
        )


def with_batch_count(weights: Mapping[str, Stored], where: Path) -> dict[str, Stored]:
    """The VAE's tensors with its batch norm's count of batches: nothing reads it, and some files leave it out."""
    import torch

    count = Stored("bn.num_batches_tracked", "I64", (), where, nbytes=8, tensor=torch.tensor(0))
    return {"bn.num_batches_tracked": count, **weights}


def text_part(folder: Path, kind: Kind, *, allow_pickle: bool) -> Part:
    """The first layers of the text encoder in a `text_encoder/` folder: those that FLUX.2 of this kind reads."""
    raw = read_json(folder / "config.json")
    inner = raw.get("text_config", raw) if kind.name == "dev" else raw
    if not isinstance(inner, dict) or inner.get("model_type") != kind.model_type:
        found = str(inner.get("model_type") if isinstance(inner, dict) else inner)[:40]
        raise SdlabError(
            f"its text encoder is a {found!r}, not the {kind.model_type!r} of FLUX.2 {kind.name}",
            where=str(folder),
        )
    num_layers = max(kind.layers) + 1  # one more than is read: the last hidden state is normalised again
    stored_layers = inner.get("num_hidden_layers")
    if type(stored_layers) is not int or stored_layers < num_layers:
        raise SdlabError(
            f"its text encoder has {str(stored_layers)[:20]} layers, FLUX.2 {kind.name} reads {num_layers}",
            where=str(folder / "config.json"),
        )
    config = _text_config(inner, num_layers, folder / "config.json")
    weights = component_weights(folder, TRANSFORMERS_STEMS, allow_pickle=allow_pickle)
    return Part("text_encoder", kind.text_class, config, _read_layers(weights, num_layers), folder)


TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "pad_token_id",
)  # no other key is passed on: some make transformers fetch code


def _text_config(inner: Mapping[str, Any], num_layers: int, where: Path) -> dict[str, Any]:
    """What the first `num_layers` layers are built from, in the words of transformers 5."""
    config = {key: inner[key] for key in TEXT_KEYS if key in inner}
    config["num_hidden_layers"] = num_layers
    rope = inner.get("rope_parameters") or {**(inner.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise SdlabError(f"its rope_type is {str(kind)[:40]!r}, not 'default'", where=str(where))
    theta = rope.get("rope_theta", inner.get("rope_theta"))
    if not isinstance(
        theta, (int, float)
    ):  # the libraries' own defaults differ, and would give other embeddings
        raise SdlabError("does not say its rope_theta", where=str(where))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    kinds = inner.get("layer_types")
    if isinstance(kinds, list):
        config["layer_types"] = [str(kind) for kind in kinds[:num_layers]]
    bounded(config, where)
    return config


_TEXT_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)")
_UNREAD = re.compile(
    r"^(model\.)?(vision_tower|multi_modal_projector)\.|(^|\.)lm_head\.|\.rotary_emb\.inv_freq$"
)
_LAYER = re.compile(r"^layers\.(\d+)\.")


def _read_layers(weights: Mapping[str, Stored], num_layers: int) -> dict[str, Stored]:
    """The tensors of the language half's first layers under the names of its class."""
    kept = {}
    for name, stored in weights.items():
        plain = _TEXT_PREFIX.sub("", name)
        layer = _LAYER.match(plain)
        if not _UNREAD.search(name) and not (layer and int(layer[1]) >= num_layers):
            kept[plain] = stored
    return kept


def _check_template(tokenizer: Path) -> None:
    """Raise SdlabError unless the tokenizer has a chat template of a sane size."""
    own = tokenizer / "chat_template.jinja"
    if own.exists():
        if regular_size(own) > MAX_TEMPLATE_BYTES:
            raise SdlabError("is too large for a chat template", where=str(own))
        return
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = tokenizer / name
        if path.exists() and read_json(path).get("chat_template"):
            return
    raise SdlabError("has no chat template", where=str(tokenizer), next_step="Copy the model again")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer folder that say how it works, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in TOKENIZER_SUFFIXES and p.is_file())


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The noise schedule; SdlabError for one with numbers that no model has."""
    path = folder / "scheduler_config.json"
    config = read_json(path)
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    bounded(plain, path)
    steps = plain.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 2 <= steps <= 10_000:
        raise SdlabError(f"num_train_timesteps is {str(steps)[:20]}, not 2 to 10000", where=str(path))
    return {**plain, "_class_name": "FlowMatchEulerDiscreteScheduler"}


def with_transformer(parts: Flux2Parts, transformer: Part, *, is_distilled: bool | None) -> Flux2Parts:
    """The same model around another transformer; None where it is not known whether that is a distilled one."""
    known = parts.is_distilled if is_distilled is None else is_distilled
    return replace(parts, transformer=transformer, is_distilled=known)
