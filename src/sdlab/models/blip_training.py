"""A BLIP captioner as something that can be trained: its loss, the pictures and words it learns from, and its folder.

Shapes: B pictures, H W pixels, T tokens of a caption, V words.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sdlab.dataset.batches import Batch, Entry, gone_bad
from sdlab.dataset.cache import Cond, Pixels
from sdlab.dataset.picture import Unusable, open_picture
from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models.blip import Speaker, build, max_tokens_of
from sdlab.models.blip_folder import Preparation, load_tokenizer, preparation_of, read_captioner
from sdlab.models.captioner import SETTINGS_FILES, Captioner
from sdlab.models.files import Stored, write_safetensors
from sdlab.models.parts import Part, load

TOKENS = "token_ids"  # name in Batch.cond: [DEC], the caption's tokens, [SEP] and padding, (B, T)
NOT_TOLD = -100  # of a token that is not learned to be said
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}  # the same tensor under two names, in every BLIP but one that was trained with them apart


@dataclass(frozen=True)
class TrainableCaptioner:
    """A captioner's network, words and preprocessor. Holds paths and numbers; the weights of an untrained one too."""

    part: Part
    tokenizer: Any
    preparation: Preparation
    files: Mapping[
        str, bytes
    ]  # what stands beside the weights, by name: config.json, tokenizer, preprocessor
    smoothing: float = 0.1

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and the preprocessor: what pictures and captions become."""
        words = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr((words, self.preparation)).encode("utf-8", "surrogatepass")).hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network, all of it to be trained, in freshly allocated parameters. Raises SdlabError as parts.load."""
        module = load(self.part, device, dtype, build)
        for name, owner in TIED.items():
            same = module.get_parameter(owner)
            if torch.equal(module.get_parameter(name), same):
                where, _, last = name.rpartition(".")
                setattr(module.get_submodule(where), last, same)
        blip = cast(Any, module)
        blip.text_decoder.config.use_cache = False  # keys and values of steps that never come
        blip.enable_gradient_checkpointing = blip.activation_checkpointing_enable  # under diffusers' name
        return module.requires_grad_(True)

    def loss(self, module: nn.Module, batch: Batch, rng: Draws) -> Tensor:
        """Cross-entropy of the caption's next token, the mean over its tokens and its end, (B,) float32.

        The LM loss of BLIP (Li et al. 2022, arXiv:2201.12086, section 3.2) with its label smoothing. Words that the
        tokenizer does not know are not learned.
        """
        return self._loss(*self._guesses(module, batch))

    @torch.no_grad()
    def measure(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (B,), and whether the likeliest next token is the caption's at every place of it, (B,) bool."""
        logits_BTV, told_BT = self._guesses(module, batch)
        right_BT = (logits_BTV.argmax(-1) == told_BT) | (told_BT == NOT_TOLD)
        return self._loss(logits_BTV, told_BT), right_BT.all(1)

    def _guesses(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What may come after each token (B, T - 1, V), and what does."""
        ids_BT = batch.cond[TOKENS]
        made = module(pixel_values=batch.latents_BCHW, input_ids=ids_BT[:, :-1])
        return made.logits.float(), self._told(ids_BT)

    def _loss(self, logits_BTV: Tensor, told_BT: Tensor) -> Tensor:
        loss_BT = cross_entropy(
            logits_BTV.transpose(1, 2), told_BT, reduction="none", ignore_index=NOT_TOLD,
            label_smoothing=self.smoothing,
        )  # fmt: skip
        return loss_BT.sum(1) / (told_BT != NOT_TOLD).sum(1).clamp(min=1)

    def _told(self, ids_BT: Tensor) -> Tensor:
        """What comes after each token, NOT_TOLD for padding and unknown words, (B, T - 1)."""
        after = ids_BT[:, 1:]
        left_out = (after == self.tokenizer.pad_token_id) | (after == self.tokenizer.unk_token_id)
        return after.masked_fill(left_out, NOT_TOLD)

    def speaker(self, module: nn.Module) -> Speaker:
        """What says captions with the module as it is."""
        return Speaker(module, self.part, self.tokenizer)

    def save(self, module: nn.Module, folder: Path, *, half: bool = False) -> None:
        """Write the captioner into a new folder that `categorize` and transformers open; `half`: weights in fp16."""
        folder.mkdir(parents=True)
        dtype = torch.float16 if half else next(module.parameters()).dtype
        state = module.state_dict()
        is_tied = all(module.get_parameter(a) is module.get_parameter(b) for a, b in TIED.items())
        kept = {name: tensor.to(dtype) for name, tensor in state.items() if not (is_tied and name in TIED)}
        stored = {name: Stored.of(name, tensor, folder) for name, tensor in kept.items()}
        write_safetensors(folder / "model.safetensors", stored)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        config = json.loads(self.files["config.json"])
        config.pop("torch_dtype", None)  # the former name of dtype
        config |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": is_tied}
        config["text_config"] |= {"tie_word_embeddings": is_tied}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def trainable(captioner: Captioner, *, smoothing: float = 0.1) -> TrainableCaptioner:
    """A captioner that was found, read for training; no weight is read yet. Raises SdlabError."""
    return with_files(read_captioner(captioner), captioner, smoothing=smoothing)


def with_files(part: Part, captioner: Captioner, *, smoothing: float) -> TrainableCaptioner:
    """The network with the tokenizer and the preprocessor that lie in the captioner's folder."""
    paths = [captioner.folder / name for name in SETTINGS_FILES]
    return TrainableCaptioner(
        part,
        load_tokenizer(captioner.folder, part.config["text_config"]["vocab_size"]),
        preparation_of(captioner),
        {path.name: path.read_bytes() for path in paths if path.is_file()},
        smoothing,
    )


@dataclass(frozen=True)
class Tokens:
    """The captions of a dataset as the network reads them."""

    ids: Mapping[str, Tensor]  # by caption: [DEC], its tokens, [SEP] and padding, (T,) int64, T one for all
    cut: tuple[str, ...]  # captions that are longer than the network can say
    unknown: Mapping[str, int]  # words that the tokenizer does not know, and in how many captions


def tokens_of(captioner: TrainableCaptioner, captions: Iterable[str]) -> Tokens:
    """Each caption once. One that is too long is cut, and has no end that could be learned.

    Raises SdlabError where there is no caption with a word that the tokenizer knows.
    """
    tokenizer, most = captioner.tokenizer, max_tokens_of(captioner.part)
    texts = sorted(set(captions))
    made = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
        return_attention_mask=False, return_token_type_ids=False,
    )  # fmt: skip
    text_config = captioner.part.config["text_config"]
    start, end = text_config["bos_token_id"], text_config["sep_token_id"]
    rows, cut, unknown = dict[str, list[int]](), list[str](), Counter[str]()
    for text, ids, offsets in zip(texts, made["input_ids"], made["offset_mapping"], strict=True):
        unknown.update(
            {text[a:b] for i, (a, b) in zip(ids, offsets, strict=True) if i == tokenizer.unk_token_id}
        )
        rows[text] = [start, *ids, end][: most + 1]
        cut += [text] if len(ids) + 1 > most else []
    if not any(set(row) - {start, end, tokenizer.unk_token_id} for row in rows.values()):
        raise SdlabError(
            f"the captioner knows none of the captions' words (such as '{next(iter(unknown), '')}')",
            where=str(captioner.part.where),
            next_step="Train one that learns them: --init small",
        )
    longest = max(map(len, rows.values()))
    padding = tokenizer.pad_token_id
    padded = {text: torch.tensor(row + [padding] * (longest - len(row))) for text, row in rows.items()}
    return Tokens(padded, tuple(cut), dict(unknown.most_common()))


@dataclass(frozen=True)
class CaptionedPictures:
    """A source of batches: pictures as the captioner sees them and their captions, opened anew for every visit.

    An entry's `prompt_key` is its caption.
    """

    preparation: Preparation
    tokens: Tokens
    pixels: Pixels
    flip: bool = False  # mirror half of the visits

    def __call__(self, entries: Sequence[Entry], draws: Draws) -> tuple[Tensor, Cond]:
        """Pictures (B, 3, H, W) and their tokens (B, T). Raises SdlabError for a picture that has gone bad."""
        ids = tuple(entry.id for entry in entries)
        flipped = ((draws.uniform("flip", ids) < 0.5) & self.flip).tolist()
        pictures = [self.picture(entry.path, mirrored=m) for entry, m in zip(entries, flipped, strict=True)]
        tokens = [self.tokens.ids[entry.prompt_key] for entry in entries]
        return torch.stack(pictures), {TOKENS: torch.stack(tokens)}

    def picture(self, path: str, *, mirrored: bool = False) -> Tensor:
        """A picture, whole and squashed to a square, (3, H, W); a JPEG is decoded as `categorize` does it."""
        side = (self.preparation.side_px,) * 2
        try:
            image = open_picture(
                path,
                background=self.pixels.background,
                max_pixels=self.pixels.max_pixels,
                at_least_px=side,
            )
        except Unusable as reason:
            raise gone_bad(path, reason) from reason
        pixels_3HW = self.preparation.prepare(image)
        return pixels_3HW.flip(-1) if mirrored else pixels_3HW
