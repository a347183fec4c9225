"""Makes mini-sd's tokenizer: CLIP's byte-level BPE with a vocabulary of its own.

python -m recipes.mini.tokenizer FOLDER      leaves FOLDER/tokenizer
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from recipes.mini.pictures import words
from recipes.mini.prompts import language
from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, as in GPT-2: printable Latin-1 is itself, the rest
    moves to 256 and up; in CLIP's order, the printable ones before."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def merge_all(spelled: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first (ties by spelling), until every word, given in symbols, is a single one."""
    words_left = [list(word) for word in spelled]
    counts = Counter(pair for word in words_left for pair in pairwise(word))
    holding = defaultdict(set)  # the words that have a pair, or once had it
    for i, word in enumerate(words_left):
        for pair in pairwise(word):
            holding[pair].add(i)
    merges: list[tuple[str, str]] = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for i in holding.pop(best):
            before = words_left[i]
            words_left[i] = _merged(before, best)
            counts.subtract(pairwise(before))
            counts.update(pairwise(words_left[i]))
            for pair in pairwise(words_left[i]):
                holding[pair].add(i)
            for pair in pairwise(before):
                if not counts[pair]:
                    del counts[pair]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write(folder: Path) -> CLIPTokenizer:
    """Writes the tokenizer's folder and gives it back as transformers reads it."""
    all_words = sorted({*words(), *language()})
    merges = merge_all([*word[:-1], word[-1] + WORD_END] for word in all_words)
    symbols = byte_symbols()
    vocabulary = [
        *symbols,
        *(s + WORD_END for s in symbols),
        *dict.fromkeys(a + b for a, b in merges),
        START,
        END,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    tokenizer = write(parser.parse_args().folder / "tokenizer")
    print(f"{len(tokenizer)} tokens")
