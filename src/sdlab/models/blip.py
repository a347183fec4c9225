"""BLIP (Li et al. 2022, arXiv:2201.12086) says what a picture shows: one sentence, and how sure it is of it.

The model's library starts half-loaded weights at random and lets a model stutter ("a bald bald bald man"); here
names and shapes are compared before a byte of a weight is read, and the words are chosen by a loop of our own.

Shapes: B pictures, H W pixels, L places the picture is seen at, D width, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.models.blip_folder import load_tokenizer, read_captioner
from sdlab.models.captioner import CLASS, Caption, Captioner
from sdlab.models.memory import pick_device, pick_dtype
from sdlab.models.parts import Part, load

DECODING = "greedy 1"  # part of the key of cached captions; count up when the words come out otherwise
MAX_TOKENS = 30  # of a caption; BLIP's own sentences have about 10
NO_REPEAT = 3  # tokens in a row that may not come twice


@contextmanager
def opened(captioner: Captioner, *, device: str, dtype: str | None) -> Iterator[Speaker]:
    """The model on `device`, until the block ends; bf16 on CUDA and fp32 elsewhere unless `dtype` says so.

    Raises SdlabError, naming file and tensor, where something does not fit.
    """
    place = pick_device(device)
    number_type = pick_dtype(dtype or "auto", place)
    part = read_captioner(captioner)
    tokenizer = load_tokenizer(captioner.folder, part.config["text_config"]["vocab_size"])
    speaker = Speaker(load(part, place, number_type, build), part, tokenizer)
    try:
        yield speaker
    finally:
        speaker.close()


class Speaker:
    """A captioner that is loaded. Alive only in its `with`."""

    def __init__(self, model: nn.Module, part: Part, tokenizer: Any) -> None:
        self._where, self._model, self._tokenizer = str(part.where), cast(Any, model), tokenizer
        first = next(model.parameters())
        self._device, self._dtype = first.device, first.dtype
        text = part.config["text_config"]
        self._start, self._end = text["bos_token_id"], text["sep_token_id"]
        self._max_tokens = max_tokens_of(part)
        special = {self._start, text["pad_token_id"], *tokenizer.all_special_ids}
        self._never = tuple(sorted(special - {self._end}))

    @torch.inference_mode()
    def captions(self, pixels_B3HW: Tensor) -> list[Caption]:
        """A caption a picture: one line, the likeliest word each time, a word at least before it ends.

        `pixels_B3HW` as Preparation.prepare makes them. The confidence is the geometric mean of the tokens'
        probabilities, the end included, as the model gave them before repetitions were ruled out; to 3 digits, as the
        size of a batch changes the seventh (at an edge between two roundings that still shows). Raises SdlabError
        where the model's numbers are not finite.
        """
        pixels = pixels_B3HW.to(self._device, self._dtype)
        seen_BLD = self._model.vision_model(pixel_values=pixels).last_hidden_state
        return [self._caption(tokens, logs) for tokens, logs in self._say(seen_BLD)]

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _caption(self, tokens: list[int], logs: list[float]) -> Caption:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return Caption(plain, round(math.exp(sum(logs) / len(logs)), 3))

    def _say(self, seen_BLD: Tensor) -> list[tuple[list[int], list[float]]]:
        """Tokens of each picture and their log-probabilities, the end included where it was reached."""
        num = seen_BLD.shape[0]
        said: list[list[int]] = [[] for _ in range(num)]
        logs: list[list[float]] = [[] for _ in range(num)]
        is_open = [True] * num
        last_B1 = torch.full((num, 1), self._start, device=self._device)
        memory = None  # keys and values of what was said and seen so far
        for _ in range(self._max_tokens):
            log_BV, memory = self._next(last_B1, seen_BLD, memory)
            allowed_BV = self._ruled_out(log_BV.clone(), said)
            last_B1 = allowed_BV.argmax(-1, keepdim=True)
            chosen, likely = last_B1[:, 0].tolist(), log_BV.gather(-1, last_B1)[:, 0].tolist()
            for row in range(num):
                if is_open[row]:
                    said[row].append(chosen[row])
                    logs[row].append(likely[row])
                    is_open[row] = chosen[row] != self._end
            if not any(is_open):
                break
        return list(zip(said, logs, strict=True))

    def _next(self, last_B1: Tensor, seen_BLD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the next token, (B, V) float32. Raises SdlabError where they are not finite."""
        made = self._model.text_decoder(
            input_ids=last_B1,
            encoder_hidden_states=seen_BLD,
            past_key_values=memory,
            use_cache=True,
            is_decoder=True,
        )
        log_BV = made.logits[:, -1].float().log_softmax(-1)
        if not math.isfinite(log_BV.sum().item()):
            raise SdlabError(
                "the captioner's numbers are not finite (NaN or infinity)",
                where=self._where,
                next_step="Use --dtype fp32, or another copy of the model",
            )
        return log_BV, made.past_key_values

    def _ruled_out(self, log_BV: Tensor, said: Sequence[list[int]]) -> Tensor:
        """`log_BV` with all that may not come next at minus infinity."""
        log_BV[:, list(self._never)] = -math.inf
        for row, tokens in enumerate(said):
            if not tokens:
                log_BV[row, self._end] = -math.inf
            for token in repeats(tokens):
                log_BV[row, token] = -math.inf
        return log_BV


def max_tokens_of(part: Part) -> int:
    """How long a caption can be, its end included."""
    num_places: int = part.config["text_config"]["max_position_embeddings"]
    return min(MAX_TOKENS, num_places - 1)


def repeats(tokens: Sequence[int]) -> set[int]:
    """What would say the last token again, or `NO_REPEAT` tokens in a row a second time."""
    again = set(tokens[-1:])
    tail = list(tokens[1 - NO_REPEAT :])
    for at in range(len(tokens) - NO_REPEAT + 1):
        if list(tokens[at : at + NO_REPEAT - 1]) == tail:
            again.add(tokens[at + NO_REPEAT - 1])
    return again


def build(part: Part) -> nn.Module:
    """The module on the meta device: shapes, no memory. Raises SdlabError when it cannot be built."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    transformers.logging.set_verbosity_error()  # not quiet.hush(), which starts diffusers too: 4 s
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            module: nn.Module = transformers.BlipForConditionalGeneration(
                transformers.BlipConfig(**part.config)
            )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as reason:
        said = " ".join(str(reason).split())[:160]
        where = str(part.where / "config.json")
        raise SdlabError(f"its configuration does not describe a {CLASS} ({said})", where=where) from reason
    return module
