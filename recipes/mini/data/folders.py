"""A drawn dataset as a plain folder: parts of 500 pictures, drawn by worker processes, each there whole or not at all.

FOLDER/.drawn.json          what was asked for; another wish in the same folder is refused
FOLDER/_000/00000.png       a picture
FOLDER/_000/00000.cap       its caption
FOLDER/_000/00000.ref.png   the picture before the edit
FOLDER/.drawing-_001-…/     a part that is being drawn: hidden, so no command counts it
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlab.errors import SdlabError

PART = 500  # pictures
RECORD = ".drawn.json"


@dataclass(frozen=True)
class Drawn:
    """What belongs to one number: a picture, and where it has them its caption and the picture before an edit."""

    picture: Image.Image
    caption: str | None = None
    reference: Image.Image | None = None


@dataclass(frozen=True)
class Dataset:
    """A kind of pictures: `make(number)` draws one, a function of `seed` and the number alone."""

    name: str
    seed: int
    num: int
    make: Callable[[int], Drawn]  # of a module's top level, so that a worker process finds it
    edition: int = 1  # goes up when `make` draws something else

    @property
    def num_parts(self) -> int:
        return -(-self.num // PART)

    @property
    def record(self) -> dict[str, str | int]:
        return {"dataset": self.name, "seed": self.seed, "pictures": self.num, "edition": self.edition}


def draw_into(folder: Path, dataset: Dataset, *, workers: int = 1) -> Iterator[int]:
    """Draws the parts that are missing, gives how many pictures there are, part after part; a stopped drawing goes
    on with the next missing part. Raises SdlabError where the folder holds something else."""
    _claim(folder, dataset)
    missing = [part for part in range(dataset.num_parts) if not _place(folder, part).is_dir()]
    done = dataset.num - sum(len(_numbers(dataset, part)) for part in missing)
    yield done
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        running = {pool.submit(draw_part, folder, dataset, part): part for part in missing}
        for future in as_completed(running):
            future.result()
            done += len(_numbers(dataset, running[future]))
            yield done


def draw_part(folder: Path, dataset: Dataset, part: int) -> None:
    """One part, drawn beside its place and then renamed."""
    place = _place(folder, part)
    staged = folder / f".drawing-{place.name}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for number in _numbers(dataset, part):
        _write(dataset.make(number), staged / f"{number:05d}")
    staged.rename(place)


def _end_with_parent() -> None:
    """A worker waits for work for ever, also when the process that would send some was killed."""
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def part_folders(folder: Path) -> list[Path]:
    """The parts that are there."""
    return sorted(folder.glob("_*"))


def _write(drawn: Drawn, stem: Path) -> None:
    drawn.picture.save(stem.with_suffix(".png"))
    if drawn.caption is not None:
        stem.with_suffix(".cap").write_text(drawn.caption + "\n", encoding="utf-8")
    if drawn.reference is not None:
        drawn.reference.save(stem.with_suffix(".ref.png"))


def _place(folder: Path, part: int) -> Path:
    return folder / f"_{part:03d}"  # a leading underscore: the name adds nothing to prompts


def _numbers(dataset: Dataset, part: int) -> range:
    return range(part * PART, min((part + 1) * PART, dataset.num))


def _recorded(folder: Path) -> object:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _claim(folder: Path, dataset: Dataset) -> None:
    """Writes what the folder is for, and clears what a killed drawing left."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _recorded(folder)
    if found is None and any(folder.iterdir()):
        raise SdlabError("holds other files", where=str(folder), next_step="Name a new folder")
    if found not in (None, dataset.record):
        raise SdlabError(
            f"was drawn as {found}, not as {dataset.record}", where=str(folder), next_step="Remove it"
        )
    staged = folder / f"{RECORD}.tmp"
    staged.write_text(json.dumps(dataset.record) + "\n", encoding="utf-8")
    staged.replace(folder / RECORD)
    for left in folder.glob(".drawing-*"):
        shutil.rmtree(left)
