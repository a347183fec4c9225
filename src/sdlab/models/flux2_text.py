"""How FLUX.2 reads a prompt: a chat template around it, a fixed number of tokens, three layers of a language model.

The template is what the released models' own gives (Qwen3 without thinking, Mistral 3 with a system message). That of a
model's folder is a program in Jinja and is never run: a sandbox does not keep it from running for ever.

Shapes: L tokens (the window), D width of the text encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.models.flux2_folder import Flux2Parts
from sdlab.models.quiet import hush
from sdlab.models.window import PromptWindow

WINDOW = 512  # of the released models; a tokenizer may state a smaller one
SHORTEST_WINDOW = 16
KLEIN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEV = "<s>[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]{}[/INST]"


class PromptReader:
    """The tokenizer of a FLUX.2 model and the template it puts around a prompt."""

    def __init__(self, parts: Flux2Parts) -> None:
        self._kind, self._where = parts.kind, parts.tokenizer
        self.tokenizer = load_tokenizer(parts)
        longest = self.tokenizer.model_max_length
        if not isinstance(longest, (int, float)) or not longest >= SHORTEST_WINDOW:
            raise SdlabError(
                f"model_max_length is {str(longest)[:40]}, less than the {SHORTEST_WINDOW} tokens of a prompt",
                where=str(self._where),
            )
        self.window = int(min(WINDOW, longest))

    def render(self, prompt: str) -> str:
        """The prompt within the template of its text encoder."""
        if self._kind != "dev":
            return KLEIN.format(prompt)
        system, user = (message["content"][0]["text"] for message in _dev_messages(prompt))
        return DEV.format(system, user)

    def tokens(self, prompt: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, (1, L) each, cut or filled to the window."""
        made = self.tokenizer(
            self.render(prompt),
            padding="max_length",
            max_length=self.window,
            truncation=True,
            add_special_tokens=self._kind != "dev",  # dev's template has written them
            return_tensors="pt",
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def lost(self, prompt: str) -> tuple[int, str]:
        """The number of tokens of the prompt in its template, and the end of the prompt that does not fit."""
        text = self.render(prompt)
        made = self.tokenizer(
            text, add_special_tokens=self._kind != "dev", return_offsets_mapping=True, verbose=False
        )
        offsets = made["offset_mapping"]
        if len(offsets) <= self.window:
            return len(offsets), ""
        content = prompt.replace("[IMG]", "").strip() if self._kind == "dev" else prompt.strip()
        begin = text.rindex(content) if content else len(text)
        cut = max(0, offsets[self.window][0] - begin)
        return len(offsets), content[cut:].strip()


def _dev_messages(prompt: str) -> list[dict[str, Any]]:
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    messages: list[dict[str, Any]] = format_input([prompt])[0]
    return messages


def load_tokenizer(parts: Flux2Parts) -> Any:
    """The tokenizer, filling up on the side its text encoder was trained with; SdlabError for broken files.

    dev's folder names a processor that also takes pictures and needs torchvision; the plain tokenizer in the same
    files makes the same tokens of text.
    """
    hush()
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    kind: Any = Qwen2Tokenizer if parts.kind == "klein" else PreTrainedTokenizerFast
    try:
        tokenizer = kind.from_pretrained(parts.tokenizer, local_files_only=True)
    except Exception as reason:  # the tokenizers library raises bare Exception for a broken file
        said = " ".join(str(reason).split())[:160]
        raise SdlabError(f"the tokenizer cannot be read ({said})", where=str(parts.tokenizer)) from reason
    tokenizer.padding_side = "right" if parts.kind == "klein" else "left"
    _check_tokenizer(tokenizer, parts.text_encoder.config.get("vocab_size", 0), parts.tokenizer)
    return tokenizer


def _check_tokenizer(tokenizer: Any, vocabulary: int, where: Path) -> None:
    most = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= most < vocabulary:
        raise SdlabError(
            f"has token numbers up to {most}, the text encoder knows {vocabulary}",
            where=str(where),
            next_step="Tokenizer and text encoder are of different models",
        )
    if tokenizer.pad_token_id is None:
        raise SdlabError("has no token to fill up with (pad_token)", where=str(where))
    if not tokenizer.chat_template:
        raise SdlabError("has no chat template", where=str(where), next_step="Copy the model again")


def embed(encoder: nn.Module, tokens: dict[str, Tensor], layers: tuple[int, int, int]) -> Tensor:
    """The three hidden states of a prompt side by side, (L, 3D), in the encoder's dtype and on its device.

    Filled-up places count as well: the transformer attends to all L of them.
    """
    weight = next(encoder.parameters())
    made = encoder(
        input_ids=tokens["input_ids"].to(weight.device),
        attention_mask=tokens["attention_mask"].to(weight.device),
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.cat([made.hidden_states[layer][0] for layer in layers], dim=-1)


def prompt_window(parts: Flux2Parts) -> PromptWindow:
    """The window of the text encoder, the template included."""
    reader = PromptReader(parts)
    return PromptWindow(reader.window, reader.lost)
