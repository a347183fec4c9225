"""Writes a text encoder and its tokenizer: python -m recipes.mini.text clip|qwen FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.text", description=__doc__)
    parser.add_argument("encoder", choices=("clip", "qwen"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.encoder == "clip":
        from recipes.mini.text.clip import write
    else:
        from recipes.mini.text.qwen import write
    write(args.folder)
    for part in ("text_encoder", "tokenizer"):
        size = sum(path.stat().st_size for path in (args.folder / part).iterdir())
        print(f"{args.folder / part}: {size:,} bytes")


if __name__ == "__main__":
    main()
