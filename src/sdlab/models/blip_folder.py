"""A folder with a BLIP model that writes captions, read as data: settings, preprocessor, tokenizer, places of weights.

Nothing in the folder is imported or run, and no key is handed on that is not listed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlab.errors import SdlabError
from sdlab.models.captioner import CLASS, PROCESSOR_FILES, STEMS, TOKENIZER_FILES, Captioner
from sdlab.models.files import component_weights, not_weights, read_json, regular_size
from sdlab.models.parts import Part, bounded

MAX_SIDE_PX = 1024  # BLIP's are 224, 384 and 480

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
)  # no other key is passed on, neither of config.json nor of generation_config.json
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes what the model looks at: squashed to a square, whatever its shape."""

    side_px: int
    resample: Image.Resampling
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB picture as pixels_3HW, float32; equal to what transformers' BlipImageProcessorPil makes."""
        squashed = np.asarray(image.resize((self.side_px, self.side_px), self.resample))
        scaled_HW3 = (squashed.astype(np.float64) * self.scale).astype(np.float32)
        pixels_HW3 = (scaled_HW3 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1)))


def preparation_of(captioner: Captioner) -> Preparation:
    """The preprocessor of the model, for a picture of its own size. Raises SdlabError for one that is not BLIP's."""
    path = next(captioner.folder / name for name in PROCESSOR_FILES if (captioner.folder / name).exists())
    table = read_json(path)
    table = table.get("image_processor", table) if path.name == PROCESSOR_FILES[1] else table
    side_px = _config_of(captioner.folder)["vision_config"]["image_size"]
    faults = [
        f"{key} is off" for key in ("do_resize", "do_rescale", "do_normalize") if table.get(key) is False
    ]
    size = table.get("size", side_px)
    stated = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    if stated != [side_px, side_px]:
        faults.append(f"it makes pictures of {str(size)[:60]}, the model takes {side_px} x {side_px}")
    scale = table.get("rescale_factor", 1 / 255)
    mean, std = table.get("image_mean") or [], table.get("image_std") or []
    if not (_three(mean) and _three(std) and _three([scale] * 3) and all(n > 0 for n in (*std, scale))):
        faults.append("image_mean, image_std or rescale_factor are not as they should be")
    resample = table.get("resample", 3)
    if resample not in list(Image.Resampling):
        faults.append(f"unknown resample {str(resample)[:20]}")
    if faults:
        raise SdlabError("; ".join(faults), where=str(path))
    return Preparation(side_px, Image.Resampling(resample), scale, tuple(mean), tuple(std))


def _three(values: Any) -> bool:
    """Three finite numbers?"""
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return network_of(read_json(path), path)


def network_of(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the network is built from, its numbers within what real models have. Raises SdlabError."""
    config: dict[str, Any] = {}
    for name, keys in (("text_config", TEXT_KEYS), ("vision_config", VISION_KEYS)):
        inner = raw.get(name)
        if not isinstance(inner, dict):
            raise SdlabError(f"has no {name}", where=str(path))
        config[name] = {key: inner[key] for key in keys if inner.get(key) is not None}
    bounded(config, path)
    _check_numbers(config, path)
    return config


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    text, vision = config["text_config"], config["vision_config"]
    vision.setdefault("image_size", 384)
    vision.setdefault("patch_size", 16)
    side_px, patch_px = vision["image_size"], vision["patch_size"]
    if type(side_px) is not int or type(patch_px) is not int or not 1 <= patch_px <= side_px <= MAX_SIDE_PX:
        said = f"{str(side_px)[:20]} px in patches of {str(patch_px)[:20]}"
        raise SdlabError(f"looks at pictures of {said}, no BLIP does", where=str(path))
    if (
        type(text.setdefault("max_position_embeddings", 512)) is not int
        or text["max_position_embeddings"] < 4
    ):
        raise SdlabError("has no room for a caption (max_position_embeddings)", where=str(path))
    num_words = text.setdefault("vocab_size", 30524)
    for key, usual in (("bos_token_id", 30522), ("sep_token_id", 102), ("pad_token_id", 0)):
        number = text.setdefault(key, usual)
        if type(number) is not int or type(num_words) is not int or not 0 <= number < num_words:
            raise SdlabError(f"{key} {str(number)[:20]} is none of its {num_words} words", where=str(path))


def read_captioner(captioner: Captioner) -> Part:
    """Configuration and places of tensors; those that are one and the same under two names are under both."""
    weights = component_weights(captioner.folder, STEMS, allow_pickle=captioner.allow_pickle)
    named = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    head = "text_decoder.cls.predictions."
    for owner, same in (
        ("text_decoder.bert.embeddings.word_embeddings.weight", f"{head}decoder.weight"),
        (f"{head}bias", f"{head}decoder.bias"),
    ):
        for there, absent in ((owner, same), (same, owner)):
            if there in named:
                named.setdefault(absent, named[there])
    return Part("captioner", CLASS, _config_of(captioner.folder), named, captioner.folder)


def load_tokenizer(folder: Path, num_words: int) -> Any:
    """The WordPiece tokenizer; SdlabError for broken files or more words than the model knows."""
    from transformers import BertTokenizer

    for path in (folder / name for name in TOKENIZER_FILES):
        if path.exists():
            regular_size(path)
            with path.open("rb") as file:
                not_weights(file.read(512), path)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as reason:  # the tokenizers library raises bare Exception for a broken file
        said = " ".join(str(reason).split())[:160]
        raise SdlabError(f"the tokenizer cannot be read ({said})", where=str(folder)) from reason
    most = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 < most < num_words:
        raise SdlabError(
            f"has token numbers up to {most}, the model knows {num_words}",
            where=str(folder),
            next_step="Tokenizer and weights are of different models",
        )
    return tokenizer
