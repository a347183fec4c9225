"""Write CLIP's vocab.json and merges.txt from OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

The list is inside the open-clip-torch wheel (MIT):

    pip download --no-deps open-clip-torch
    unzip -j open_clip_torch-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz
    python recipes/clip_tokenizer.py bpe_simple_vocab_16e6.txt.gz src/sdlab/models/configs/sd15/tokenizer

The vocabulary is 256 bytes, the same 256 at the end of a word, 48,894 merges and two marks: 49,408 tokens.
The result equals the tokenizer of Stable Diffusion 1.x: "a photo of a cat" is 320 1125 539 320 2368.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

NUM_MERGES = 49152 - 256 - 2  # the list is longer than what CLIP uses


def byte_letters() -> list[str]:
    """One printable letter for each byte, in CLIP's order: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(spare))]


def main(source: Path, folder: Path) -> None:
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 1 + NUM_MERGES]
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == len(set(words)) == 49408
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {word: i for i, word in enumerate(words)}
    vocabulary = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8", newline="\n")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
