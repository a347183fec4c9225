"""Pictures that are trained on as they are: which there are, and whether each of them opens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from sdlab import show
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Picture, Pixels, ahead, content_hashes, load_picture, write_whole
from sdlab.dataset.colour import colour_of
from sdlab.dataset.picture import Unusable
from sdlab.dataset.tree import Refused
from sdlab.errors import Stopped
from sdlab.keyed import key
from sdlab.training.config import RunConfig
from sdlab.training.session import Session

OPENED = "opened.json"  # in the cache: contents that have been decoded whole once


def pixels_of(config: RunConfig) -> Pixels:
    """How the run's files become pixels."""
    return Pixels(colour_of(config.background), config.max_pixels)


def look_through(items: Sequence[Item], session: Session[RunConfig]) -> tuple[dict[str, str], list[Refused]]:
    """sha256 of every picture that opens, by its sample's id, and the samples whose picture does not.

    Every picture is decoded once, so that a broken one is told before the first step and not in the last epoch; what
    an earlier run has decoded is known by its content. Raises Stopped between two pictures after a signal.
    """
    with _main_first(session.accelerator):  # the others find all of it in the cache
        return _look_through([item for item in items if item.repeat == 0], session)


@contextmanager
def _main_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process alone runs the `with`, then the others: also where it raises, or they would wait for days."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()


def _look_through(
    firsts: Sequence[Item], session: Session[RunConfig]
) -> tuple[dict[str, str], list[Refused]]:
    config, folder = session.config, session.store.folder
    pixels = pixels_of(config)
    opened = _read(folder / OPENED)

    def progress(what: str, done: int, total: int) -> None:
        if session.stop:
            raise Stopped(session.stop.signum, f"stopped with {done} of {total} {what}")
        if session.is_main and what == "pictures opened" and (done % 500 == 0 or done == total):
            show.note(f"{what}: {done}/{total}")

    def look(item: Item) -> str:
        try:
            load_picture(Picture(item.sample.path, item.size_px), pixels)
        except Unusable as reason:
            return str(reason)
        return ""

    paths = sorted({item.sample.path for item in firsts})
    hashes, faults = content_hashes(folder, paths, config.num_workers, progress)
    known = frozenset((*opened, ""))
    unseen = [item for item in firsts if hashes.get(item.sample.path, "") not in known]
    for done, (item, fault) in enumerate(ahead(look, unseen, config.num_workers), start=1):
        faults |= {item.sample.path: fault} if fault else {}
        opened |= set() if fault else {hashes[item.sample.path]}
        progress("pictures opened", done, len(unseen))
    if unseen:
        write_whole(folder / OPENED, json.dumps(sorted(opened)).encode())
    good = {item.sample.id: hashes[item.sample.path] for item in firsts if item.sample.path not in faults}
    refused = [Refused(i.sample.id, faults[i.sample.path]) for i in firsts if i.sample.path in faults]
    return good, refused


def held_out(contents: Mapping[str, str], share: float, *, most: int, seed: int) -> frozenset[str]:
    """Ids of the samples that are never trained on, of the sha256 of each sample's picture by its id.

    Contents are held out, `share` of all and 1 to `most` of them, so copies of a picture are on one side. None with a
    single content, or a share of 0; never all. Which they are depends on the contents and the seed.
    """
    different = sorted(set(contents.values()), key=lambda content: key(seed, "held-out", content))
    num = min(len(different) - 1, most, max(1, round(share * len(different)))) if share and different else 0
    out = frozenset(different[:num])
    return frozenset(sample for sample, content in contents.items() if content in out)


def _read(path: Path) -> set[str]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or torn by a power cut: pictures are opened again
        return set()
    return {entry for entry in found if isinstance(entry, str)} if isinstance(found, list) else set()


def seen_as(item: Item, content: str, role: str = "") -> str:
    """A digest of what a visit shows: the file's content, its size and what it is used for."""
    height, width = item.size_px
    text = "\x1f".join((content, f"{height}x{width}", role))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
