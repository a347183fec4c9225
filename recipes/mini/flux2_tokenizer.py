"""Makes mini-flux2's tokenizer: Qwen's byte-level BPE with a vocabulary of its own, and its chat template.

python -m recipes.mini.flux2_tokenizer FOLDER      leaves FOLDER/flux2_tokenizer
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.mini.flux2_language import sentence_words
from recipes.mini.pictures import words
from recipes.mini.tokenizer import byte_symbols, merge_all
from transformers import Qwen2Tokenizer

from sdlab.testing.scenes import SILHOUETTES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WINDOW = 64  # tokens of a prompt with its template; FLUX.2's own is 512
BLANK, LINE_END = "Ġ", "Ċ"  # how byte-level BPE spells a blank and a line's end
TEMPLATE = (  # renders what Qwen3's own template renders for FLUX.2 klein's prompts
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def write(folder: Path) -> Qwen2Tokenizer:
    """Writes the tokenizer's folder and gives it back as transformers reads it.

    Every word is one token at a text's start and after a blank, in small letters and with a capital. The merges
    with the blank come last, so that they need one token a word and none in between.
    """
    small = {*words(), *sentence_words(), *SILHOUETTES, "user", "assistant"}
    all_words = sorted({*small, *(word.capitalize() for word in small)})
    merges = merge_all([*all_words, LINE_END * 2])
    merges += [(BLANK, word) for word in all_words]
    vocabulary = [*byte_symbols(), *dict.fromkeys(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate([*vocabulary, *SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=ids,
        merges=merges,
        extra_special_tokens=SPECIAL[1:],
        model_max_length=WINDOW,
        padding_side="right",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def templated(text: str) -> str:
    """The text inside the chat template, as FLUX.2 klein's pipeline writes it."""
    user, assistant = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    return f"{user}{text}{assistant}<think>\n\n</think>\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    made = write(parser.parse_args().folder / "flux2_tokenizer")
    print(f"{len(made)} tokens")
