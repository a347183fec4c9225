"""Rebuilds the built-in models from nothing, with sdlab's own commands: `make mini`.

python -m recipes.mini [mini-sd mini-flux2 mini-blip] [--work FOLDER] [--device cuda|cpu] [--install]

Draws the pictures, runs the commands of each recipe (models.py) and measures what came out. Can be stopped at any
time and started again: it goes on where it was. Exits with 1 where a model is below its score; --install refuses it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from recipes.mini.data.folders import draw_into
from recipes.mini.disk import digests, size_bytes
from recipes.mini.figures import Figure, failed
from recipes.mini.journal import Journal
from recipes.mini.models import RECIPES
from recipes.mini.recipe import Recipe
from recipes.mini.running import run, say

from sdlab.dataset.disk import hold
from sdlab.errors import SdlabError
from sdlab.models.bases import builtin_folder

WORK = Path("output") / "mini"
SCORES = Path(__file__).parent / "scores"
VERSIONS = ("sdlab", "torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


def make(recipe: Recipe, work: Path, *, device: str | None, workers: int) -> Path:
    """Draws, trains and writes the model as it is shipped; its folder."""
    from recipes.mini.shipping import ship

    for dataset in recipe.datasets:
        for num in draw_into(work / dataset.name, dataset, workers=workers):
            say(f"{work / dataset.name}: {num} of {dataset.num} pictures")
    for command in recipe.commands:
        run(command, work, device=device)
    (work / "models").mkdir(exist_ok=True)
    return ship(recipe.model(work), work / "models" / recipe.name)


def measured(
    recipe: Recipe, model: Path, work: Path, *, device: str | None, anew: bool = False
) -> list[Figure]:
    """The score of a shipped model. Leaves WORK/scores/<name>.json, which is told again for the same files unless it
    is to be measured `anew`: it holds the bars of its time."""
    from sdlab.models.quiet import hush

    path, files = work / "scores" / f"{recipe.name}.json", digests(model)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not anew and kept.get("files") == files:
        say(f"as measured before ({path})")
        return [Figure(**figure) for figure in kept["figures"]]
    hush()
    began = time.monotonic()
    figures = recipe.measure(model, device=device or "cpu")
    journal = Journal(work / "commands.json")
    report = {
        "model": recipe.name,
        "date": date.today().isoformat(),
        "device": device or "cpu",
        "passes": not failed(figures),
        "figures": [asdict(figure) for figure in figures],
        "commands": {c.name: c.typed for c in recipe.commands},
        "seconds": {c.name: journal.seconds(c.name) for c in recipe.commands},
        "seconds_of_score": round(time.monotonic() - began, 1),
        "versions": versions(),
        "bytes": size_bytes(model),
        "files": files,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return figures


def versions() -> Mapping[str, str]:
    """Of Python and of the packages that a score hangs on."""
    return {
        "python": sys.version.split()[0], **{package: metadata.version(package) for package in VERSIONS},
    }  # fmt: skip


@dataclass(frozen=True)
class Package:
    """Where models that reach their score are put."""

    builtin: Path
    scores: Path


def rebuild(recipe: Recipe, work: Path, *, device: str | None, workers: int, package: Package | None) -> bool:
    """One model from nothing to its score, and into the package where one is given; whether it reached the score."""
    from recipes.mini.shipping import install

    say(f"\n{recipe.name}")
    model = make(recipe, work, device=device, workers=workers)
    figures = measured(recipe, model, work, device=device, anew=package is not None)
    say("")
    for figure in figures:
        say(f"  {figure}")
    if package:
        install(model, figures, name=recipe.name, builtin=package.builtin)
        package.scores.mkdir(exist_ok=True)
        score = package.scores / f"{recipe.name}.json"
        shutil.copyfile(work / "scores" / score.name, score)
        say(f"{recipe.name} is installed; its score is in {score}")
    else:
        say(f"{recipe.name} is in {model}")
    return not failed(figures)


@contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Hold the folder for the work: two at a time would write over each other's journal. Raises SdlabError."""
    handle = os.open(work / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        _hold(handle, work)
        yield
    finally:
        os.close(handle)


def _hold(handle: int, work: Path) -> None:
    try:
        if not hold(handle):
            say(f"{work}: this file system has no locks; start no second one on it")
    except BlockingIOError as reason:
        what = "another python -m recipes.mini is at work on this folder"
        raise SdlabError(
            what, where=str(work), next_step="Wait for it to end, or give another --work"
        ) from reason


def main(words: list[str], *, package: Package) -> int:
    """Its exit code; `--install` puts models into `package`."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(RECIPES)} (default: all)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"where all of it is made (default: {WORK})")
    parser.add_argument("--device", help="for training and the score: cpu, cuda (default: sdlab's choice)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: 2)")
    parser.add_argument("--install", action="store_true", help="put what reaches its score into the package")
    args = parser.parse_args(words)
    unknown = [name for name in args.models if name not in RECIPES]
    if unknown:
        parser.error(f"there is no recipe of {unknown[0]}; there are {', '.join(RECIPES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    reached = True
    try:
        with _alone_in(args.work):
            for name in args.models or RECIPES:
                reached &= rebuild(
                    RECIPES[name],
                    args.work,
                    device=args.device,
                    workers=args.workers,
                    package=package if args.install else None,
                )
    except SdlabError as error:
        say(f"error: {error}")
        return error.exit_code
    return int(not reached)


if __name__ == "__main__":
    # Named here and nowhere else: nothing that is imported can write into the package by itself.
    sys.exit(main(sys.argv[1:], package=Package(builtin_folder("mini-sd").parent, SCORES)))
