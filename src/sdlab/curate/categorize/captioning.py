"""What a model says of each picture, asked once for each content and kept on disk.

    <folder>/files.json                         content hashes of picture files, by path, size and times
    <folder>/captions/<captioner>-<key>.jsonl   key = hash(model, number type, background, way of decoding)
    <folder>/decoded.jsonl                      pictures that were found good where no model looks at them

The last two hold a line a picture. Lines are only ever added, a batch at a time, and a torn one is passed over: a run
that is killed loses one batch at most.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, get_type_hints

from sdlab.dataset.cache import ahead, content_hashes
from sdlab.dataset.picture import Unusable, open_picture, read_size
from sdlab.models.bases import safe_name
from sdlab.models.captioner import Caption, Captioner, fingerprint_of
from sdlab.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor

    from sdlab.models.blip import Speaker
    from sdlab.models.blip_folder import Preparation

CHECKED_PX = 16  # a JPEG that is only checked is decoded at an eighth of its size, from all of its bytes
CHECKED_AT_ONCE = 128

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Captioned:
    """What is known of the pictures after `caption_pictures`, by path; a run that was stopped knows fewer."""

    captions: dict[str, Caption]
    hashes: dict[str, str]  # sha256
    faults: dict[str, str]  # why a picture cannot be used
    num_asked: int  # pictures the model looked at in this run


class Said(NamedTuple):
    """What the store knows of a picture that the model has looked at."""

    caption: str
    confidence: float
    pixels: int  # of the picture in its file, to be held against --max-pixels of a later run


class Decoded(NamedTuple):
    """What the store knows of a picture that was found good."""

    pixels: int


_Row = TypeVar("_Row", Said, Decoded)


class Look(NamedTuple):
    """A picture as the model sees it, and its number of pixels in the file."""

    pixels_3HW: Tensor
    num_pixels: int


def caption_pictures(
    paths: Sequence[str],
    *,
    captioner: Captioner,
    folder: Path,
    batch: int,
    num_workers: int,
    device: str,
    dtype: str | None,
    background: tuple[int, int, int],
    max_pixels: int,
    advance: Advance = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> Captioned:
    """The caption of every picture, from the store in `folder` or else from the model, which is opened only if needed.

    `advance` is told how many of `paths` are done; `stop` is asked after each batch. The same bytes under two names
    are asked for once. On a CPU a caption depends neither on the batch it was in nor on the order of `paths`, but for
    the third digit of its confidence at an edge between two roundings; in half types on a card two words that are
    equally likely may come out either way.
    """
    hashes, faults = content_hashes(folder, sorted(set(paths)), num_workers, lambda what, done, total: None)
    store = Store(folder / "captions" / _store_name(captioner, folder, device, dtype, background), Said)
    known = {content: it for content, it in store.rows.items() if it.pixels <= max_pixels}
    fresh = [(content, path) for content, path in _firsts(hashes) if content not in known]
    copies = Counter(hashes[path] for path in paths if path in hashes)
    num_left = sum(copies[content] for content, _ in fresh)
    advance(len(paths) - num_left)
    num_asked, bad = 0, dict[str, str]()
    look = partial(_look, background=background, max_pixels=max_pixels)
    asked = _ask(fresh, captioner, look, batch=batch, num_workers=num_workers, device=device, dtype=dtype)
    with closing(asked):
        for said, unusable in asked:
            store.add(said)
            known |= said
            bad |= unusable
            num_asked += len(said)
            num_left -= sum(copies[content] for content in (*said, *unusable))
            advance(len(paths) - num_left)
            if stop():
                break
    captions = {path: Caption(*known[content][:2]) for path, content in hashes.items() if content in known}
    faults |= {path: bad[content] for path, content in hashes.items() if content in bad}
    return Captioned(captions, hashes, faults, num_asked)


def faults_of(
    paths: Sequence[str],
    *,
    hashes: Mapping[str, str],
    folder: Path,
    num_workers: int,
    max_pixels: int,
    advance: Advance = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Why pictures that no model looks at cannot be used, by path: each content is decoded once, and known again later.

    `hashes` as content_hashes gives them; a path that is not in there is not looked at.
    """
    store = Store(folder / "decoded.jsonl", Decoded)
    wanted = {path: hashes[path] for path in sorted(set(paths)) if path in hashes}
    good = {content for content, it in store.rows.items() if it.pixels <= max_pixels}
    fresh = [(content, path) for content, path in _firsts(wanted) if content not in good]
    bad: dict[str, str] = {}
    advance(len(paths) - len(fresh))
    check = partial(_check, max_pixels=max_pixels)
    for done, (items, found) in enumerate(_in_batches(check, fresh, CHECKED_AT_ONCE, num_workers), start=1):
        named = {content: it for (content, _), it in zip(items, found, strict=True)}
        bad |= {content: it for content, it in named.items() if isinstance(it, str)}
        store.add({content: Decoded(it) for content, it in named.items() if isinstance(it, int)})
        advance(len(paths) - max(0, len(fresh) - done * CHECKED_AT_ONCE))
        if stop():
            break
    return {path: bad[content] for path, content in wanted.items() if content in bad}


def _firsts(hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each content with the first of its paths, in the order of the paths."""
    firsts: dict[str, str] = {}
    for path in sorted(hashes):
        firsts.setdefault(hashes[path], path)
    return list(firsts.items())


def _ask(
    fresh: Sequence[tuple[str, str]],
    captioner: Captioner,
    look: Callable[..., Look | str],
    *,
    batch: int,
    num_workers: int,
    device: str,
    dtype: str | None,
) -> Generator[tuple[dict[str, Said], dict[str, str]], None, None]:
    """What the model says of a batch of (content, path), and why some of it cannot be used; both by content.

    The model is opened at the first picture that can be used, while threads go on to open pictures.
    """
    if not fresh:
        return
    from sdlab.models import blip
    from sdlab.models.blip_folder import preparation_of

    preparation = preparation_of(captioner)
    with ExitStack() as stack:
        speaker = None
        for items, looks in _in_batches(partial(look, preparation), fresh, batch, num_workers):
            named = {content: found for (content, _), found in zip(items, looks, strict=True)}
            good = {content: found for content, found in named.items() if not isinstance(found, str)}
            if good and speaker is None:
                speaker = stack.enter_context(blip.opened(captioner, device=device, dtype=dtype))
            said = _said(speaker, good) if speaker and good else {}
            yield said, {content: reason for content, reason in named.items() if isinstance(reason, str)}


def _said(speaker: Speaker, good: Mapping[str, Look]) -> dict[str, Said]:
    import torch

    captions = speaker.captions(torch.stack([seen.pixels_3HW for seen in good.values()]))
    return {
        content: Said(*caption, seen.num_pixels)
        for (content, seen), caption in zip(good.items(), captions, strict=True)
    }


def _look(
    preparation: Preparation, path: str, *, background: tuple[int, int, int], max_pixels: int
) -> Look | str:
    """The picture as the model sees it, or why it cannot be used.

    A JPEG is decoded at an eighth, a quarter or half of its size, yet twice the model's at least: the pixels that
    mini-blip sees differ by 0.3 of 255 in the mean, and on 64 pictures of 1024 x 768 no caption did.
    """
    side_px = preparation.side_px
    try:
        height, width = read_size(path, max_pixels=max_pixels)
        image = open_picture(
            path, background=background, max_pixels=max_pixels, at_least_px=(side_px, side_px)
        )
    except Unusable as reason:
        return str(reason)
    return Look(preparation.prepare(image), height * width)


def _check(path: str, *, max_pixels: int) -> int | str:
    """The number of pixels of a picture that decodes, or why it cannot be used."""
    try:
        height, width = read_size(path, max_pixels=max_pixels)
        open_picture(path, max_pixels=max_pixels, at_least_px=(CHECKED_PX, CHECKED_PX))
    except Unusable as reason:
        return str(reason)
    return height * width


def _in_batches(
    work: Callable[[str], _Found], items: Sequence[tuple[str, str]], batch: int, num_workers: int
) -> Iterator[tuple[Sequence[tuple[str, str]], list[_Found]]]:
    """The (content, path) of each batch with what `work` finds of the paths.

    Threads are up to three batches ahead, so that they do not stand still while the model is at work.
    """
    batches = [items[at : at + batch] for at in range(0, len(items), batch)]
    if num_workers < 1:
        yield from ((some, [work(path) for _, path in some]) for some in batches)
        return
    pool = ThreadPoolExecutor(num_workers)
    try:
        yield from ahead(lambda some: list(pool.map(work, [path for _, path in some])), batches, 1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _store_name(
    captioner: Captioner, cache: Path, device: str, dtype: str | None, background: tuple[int, int, int]
) -> str:
    from sdlab.models.blip import DECODING
    from sdlab.models.memory import pick_device, pick_dtype

    number_type = str(pick_dtype(dtype or "auto", pick_device(device)))
    words = (fingerprint_of(captioner, cache), DECODING, number_type, *map(str, background))
    key = hashlib.sha256("\x1f".join(words).encode()).hexdigest()[:16]
    return f"{safe_name(captioner.name)}-{key}.jsonl"


class Store(Generic[_Row]):
    """Lines of JSON in a file that only grows: what is known by content, rows of one kind."""

    def __init__(self, path: Path, kind: type[_Row]) -> None:
        self._path = path
        self.rows: dict[str, _Row] = dict(_read(path, kind))

    def add(self, rows: Mapping[str, _Row]) -> None:
        """Write the rows behind the others; they are in the file when this returns."""
        if not rows:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"sha256": content, **row._asdict()} for content, row in rows.items()]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._path.open("ab") as file:
            # a line that a killed run left unfinished stays a line of its own
            file.write(("\n" + text if self._is_torn() else text).encode("utf-8", "surrogatepass"))
        self.rows |= rows

    def _is_torn(self) -> bool:
        with self._path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def _read(path: Path, kind: type[_Row]) -> Iterator[tuple[str, _Row]]:
    """The good lines; what is torn, or is no line of ours, is asked for again."""
    if not path.exists():
        return
    types: dict[str, type] = {"sha256": str, **get_type_hints(kind)}
    for line in path.read_bytes().split(b"\n"):
        try:
            table = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(table, dict) or {name: type(value) for name, value in table.items()} != types:
            continue
        content = table.pop("sha256")
        if 0 <= table.get("confidence", 0) <= 1:
            yield content, kind(**table)
