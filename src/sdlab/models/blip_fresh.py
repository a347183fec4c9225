"""A captioner that nobody has trained yet: of a known size or a user's config.json, with the words of the captions."""

from __future__ import annotations

import shutil
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sdlab.errors import SdlabError
from sdlab.models.blip import build
from sdlab.models.blip_folder import network_of, read_captioner
from sdlab.models.blip_training import TrainableCaptioner, with_files
from sdlab.models.captioner import (
    CLASS,
    REVIEW_BELOW_UNKNOWN,
    TOKENIZER_FILES,
    Captioner,
    other_than_captioner,
)
from sdlab.models.export import write_json
from sdlab.models.files import Stored
from sdlab.models.fresh import drawn, fresh_config
from sdlab.models.parts import Part

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
PLACES = {"pad_token_id": "[PAD]", "eos_token_id": "[SEP]", "sep_token_id": "[SEP]", "bos_token_id": "[DEC]"}
MAX_WORDS = 30_000  # about as many as BERT has; rarer ones are spelled
PROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "BlipImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "BlipProcessor", "resample": 3,
    "rescale_factor": 1 / 255,
}  # fmt: skip
MAX_LENGTH = 512  # in tokens; for other tools, which warn above it
WIDTH = 0.02  # of the random weights, as BERT's; BLIP's own for its pictures' side is nearly 0


def fresh_captioner(
    init: str,
    captions: Iterable[str],
    *,
    seed: int,
    side_px: int | None,
    like: Captioner | None = None,
    smoothing: float = 0.1,
) -> TrainableCaptioner:
    """An untrained captioner whose weights are a function of the seed.

    Its words are those of the captions, or those of the captioner it is to be `like`. `side_px` is the square that it
    sees, else what the configuration says. Raises SdlabError for a configuration that describes no captioner.
    """
    config, path = _config(init)
    with TemporaryDirectory(prefix="sdlab-") as made:
        folder = Path(made)
        words = _new_words(captions, folder) if like is None else _words_of(like, folder)
        part = _drawn(_adapted(config, words, side_px, path), path, seed=seed, folder=folder)
        found = Captioner("fresh", folder, f"{init}: untrained", REVIEW_BELOW_UNKNOWN)
        return with_files(part, found, smoothing=smoothing)


def fresh_side_px(init: str) -> int:
    """Side of the squares that a captioner of this configuration sees. Raises SdlabError where it describes none."""
    config, path = _config(init)
    side_px: int = _adapted(config, {}, None, path)["vision_config"]["image_size"]
    return side_px


def _config(init: str) -> tuple[dict[str, Any], Path]:
    config, path = fresh_config("captioner", init)
    if what := other_than_captioner(config):
        raise SdlabError(f"describes {what}, not a {CLASS}", where=str(path))
    return config, path


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All tokens in the order of their numbers: special ones, signs, signs that go on a word, words by frequency.

    Words are told apart as BERT does it. A word that is not here is spelled, so none of these captions has an unknown.
    """
    from tokenizers import normalizers, pre_tokenizers

    normal, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in captions for word, _ in split.pre_tokenize_str(normal.normalize_str(text))
    )
    signs = sorted({*string.ascii_lowercase, *string.digits, *"".join(words)})
    often = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    return [*SPECIAL, *signs, *(f"##{sign}" for sign in signs), *often[:MAX_WORDS]]


def _new_words(captions: Iterable[str], folder: Path) -> dict[str, int]:
    """What a text_config says of the words. Their tokenizer, BERT's with [DEC] in front as BLIP has it, is written."""
    from transformers import BertTokenizer

    tokens = vocabulary(captions)
    numbers = {token: number for number, token in enumerate(tokens)}
    BertTokenizer(vocab=numbers, bos_token="[DEC]", model_max_length=MAX_LENGTH).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8", newline="\n")
    return {"vocab_size": len(tokens)} | {name: SPECIAL.index(token) for name, token in PLACES.items()}


def _words_of(like: Captioner, folder: Path) -> dict[str, int]:
    for path in (like.folder / name for name in TOKENIZER_FILES):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    text = read_captioner(like).config["text_config"]
    return {name: text[name] for name in ("vocab_size", *PLACES) if name in text}


def _adapted(
    config: dict[str, Any], words: dict[str, int], side_px: int | None, path: Path
) -> dict[str, Any]:
    """What the network is built from, with the words of its tokenizer and the side of its pictures."""
    text, vision = (dict(config.get(name) or {}) for name in ("text_config", "vision_config"))
    text |= words
    vision |= {"image_size": side_px} if side_px else {}
    network = network_of({"text_config": text, "vision_config": vision}, path)
    side, patch = (network["vision_config"][name] for name in ("image_size", "patch_size"))
    if side % patch:
        raise SdlabError(
            f"{side} is not a multiple of {patch}, the side of its patches",
            where="--image-size" if side_px else str(path), next_step=f"Try {-(-side // patch) * patch}",
        )  # fmt: skip
    return network


def _drawn(network: dict[str, Any], path: Path, *, seed: int, folder: Path) -> Part:
    """The network with random weights in memory; its settings are left in the folder."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    build(Part("captioner", CLASS, network, {}, path))  # without memory first: it refuses what is no network
    settings = {name: {**inner, "initializer_range": WIDTH} for name, inner in network.items()}
    module: Any = drawn(
        lambda: BlipForConditionalGeneration(BlipConfig(**settings)), _start, seed=seed, name="captioner"
    )
    side_px = network["vision_config"]["image_size"]
    write_json(
        folder / "preprocessor_config.json", {**PROCESSOR, "size": {"height": side_px, "width": side_px}}
    )
    write_json(folder / "config.json", {**module.config.to_diff_dict(), "architectures": [CLASS]})
    weights = {name: Stored.of(name, tensor, path) for name, tensor in module.state_dict().items()}
    return Part("captioner", CLASS, network, weights, path)


@torch.no_grad()
def _start(layer: torch.nn.Module) -> None:
    """Draws a layer's matrices; biases and norms stay as the library starts them, which takes no draws."""
    for parameter in layer.parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.normal_(0, WIDTH)
    if isinstance(layer, torch.nn.Embedding) and layer.padding_idx is not None:
        layer.weight[layer.padding_idx] = 0
