"""Draws a dataset: python -m recipes.mini.data vae|scenes|edits|slow|captions FOLDER [--workers 2]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.mini.data.captions import CAPTIONS
from recipes.mini.data.edits import EDITS, SLOW_SHAPES
from recipes.mini.data.folders import draw_into
from recipes.mini.data.scenes import SCENES
from recipes.mini.data.vae import VAE

from sdlab.errors import SdlabError

DATASETS = {dataset.name: dataset for dataset in (VAE, SCENES, EDITS, SLOW_SHAPES, CAPTIONS)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.data", description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    dataset = DATASETS[args.dataset]
    try:
        for num in draw_into(args.folder, dataset, workers=args.workers):
            print(f"{args.folder}: {num} of {dataset.num} pictures", file=sys.stderr, flush=True)
    except SdlabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
