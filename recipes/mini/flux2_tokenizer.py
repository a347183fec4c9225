"""Makes mini-flux2's tokenizer: Qwen's byte-level BPE with a vocabulary of its own, and its chat template.

python recipes/mini/flux2_tokenizer.py WORK_FOLDER
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import pairwise
from pathlib import Path

from flux2_language import sentence_words
from pictures import words
from tokenizer import _merged, byte_symbols
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


def merge_all(words_seen: list[str]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first (ties by spelling), until every word is a single token."""
    spelled = [list(word) for word in words_seen]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def train(folder: Path) -> Qwen2Tokenizer:
    """Writes the tokenizer's folder and gives it back as transformers reads it.

    Every word is one token at a text's start and after a blank; words of the prompt language also with a capital.
    The merges with the blank come last, so that they need one token a word and none in between.
    """
    language = sorted({*sentence_words(), *SILHOUETTES, "user", "assistant"})
    all_words = sorted({*words(), *language, *(word.capitalize() for word in language)})
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
    made = train(parser.parse_args().folder / "flux2_tokenizer")
    print(f"{len(made)} tokens")
