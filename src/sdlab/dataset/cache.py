"""A store of tensors by content: each picture and each prompt is encoded once, whatever it is called.

    <folder>/files.json                 content hashes of picture files, by path, size and times
    <folder>/latents/ab/<key>.safetensors     key = hash(bytes of the picture, size, crop, flip, background, encoders)
    <folder>/prompts/cd/<key>.safetensors     key = hash(text, encoders)

A reference is a picture like any other: one that is also trained on, or goes with many, is encoded once.

Entries are written under a temporary name and renamed; one that does not open is made again. Pictures are
encoded one at a time, so that an entry does not depend on which others were missing: a run that was killed
while it encoded ends with the same bits as one that was not.

Shapes: B batch (1 here), C latent channels, H W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from sdlab.dataset.buckets import Item
from sdlab.dataset.picture import Unusable, cover, open_picture, sha256_of
from sdlab.dataset.tree import Refused, refusal
from sdlab.errors import SdlabError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from PIL import Image
    from torch import Tensor

Cond = dict[str, "Tensor"]  # conditioning of one sample, or stacked of a batch; the keys are the family's own

AGAIN = "Start the run again: what the cache lacks is encoded again"

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Encoders(Protocol):
    """The frozen models that turn pictures and prompts into what the denoiser sees. Alive only in their `with`."""

    def encode_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to latents_BCHW on the CPU in float32, normalised as the denoiser expects them."""

    def encode_prompts(self, prompts: Sequence[str]) -> list[Cond]:
        """One Cond on the CPU for each prompt."""


@dataclass(frozen=True)
class Pixels:
    """How a file becomes pixels, besides its size: part of the key of its latents."""

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 64_000_000


class Picture(NamedTuple):
    """A file as it is encoded: resized to cover a bucket, cut at the centre, mirrored or not."""

    path: str
    size_px: tuple[int, int]  # height and width
    flip: bool = False


@dataclass(frozen=True)
class Filled:
    """Where everything is after `fill`: keys of latents by item, and the samples that could not be used."""

    latents: dict[Item, str]
    refused: tuple[Refused, ...]
    num_pictures_encoded: int  # references among them
    num_prompts_encoded: int
    references: dict[Item, tuple[str, ...]] = field(default_factory=dict)  # as `latents`, in their order


class Cache:
    """Tensors on disk under (kind, key)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """True if the entry is there and as it was written."""
        try:
            self.get(kind, key)
        except SdlabError:
            return False
        return True

    def get(self, kind: str, key: str) -> dict[str, Tensor]:
        """The entry's tensors, freshly allocated (memory-mapped ones are aligned otherwise and give other digits).

        Raises SdlabError if the entry is missing or not as it was written.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(kind, key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                stated = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as reason:
            raise SdlabError(
                f"the cache lacks an entry ({reason})", where=str(path), next_step=AGAIN
            ) from reason
        if stated != _tensors_digest(tensors):
            raise SdlabError("a cache entry is damaged", where=str(path), next_step=AGAIN)
        return tensors

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Store the tensors whole or not at all."""
        from safetensors.torch import save

        whole = {name: t.contiguous() for name, t in tensors.items()}
        write_whole(self.path(kind, key), save(whole, metadata={"sha256": _tensors_digest(whole)}))


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def write_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a file under a temporary name beside it and rename it; readers see the old file or the new one.

    With `sync` that holds through a power cut too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{secrets.token_hex(3)}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def prompt_key(fingerprint: str, prompt: str) -> str:
    """Key of a prompt's embedding."""
    return _digest("prompt", fingerprint, prompt)


def pictures_of(item: Item) -> tuple[Picture, ...]:
    """What is encoded for the item: its picture and then its references, all mirrored or none."""
    assert len(item.reference_sizes) == len(item.sample.references), item.sample.id
    references = zip(item.sample.references, item.reference_sizes, strict=True)
    return (
        Picture(item.sample.path, item.size_px, item.flip),
        *(Picture(path, size_px, item.flip) for path, size_px in references),
    )


def fill(
    cache: Cache,
    items: Sequence[Item],
    prompts: Iterable[str],
    *,
    fingerprint: str,
    encoders: Callable[[], AbstractContextManager[Encoders]],
    pixels: Pixels,
    num_workers: int,
    text_fingerprint: str | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Filled:
    """Encode what the cache lacks, and say where everything is.

    The encoders are opened only if something is missing, and are gone when this returns. Of the missing, process
    `share[0]` of `share[1]` encodes the keys that fall to it: call it once more, with the whole share, after
    the processes have met. A picture that cannot be read is refused, and so is one with such a reference.
    Keys of prompts go by `text_fingerprint`, where that is not the `fingerprint` of the encoders.
    """
    wanted = {item: pictures_of(item) for item in items}
    paths = sorted({picture.path for pictures in wanted.values() for picture in pictures})
    hashes, faults = content_hashes(cache.folder, paths, num_workers, progress)
    keys = {
        picture: _latent_key(hashes[picture.path], picture, pixels, fingerprint)
        for pictures in wanted.values()
        for picture in pictures
        if picture.path in hashes
    }
    missing = _first_of_each(keys, lambda key: _is_mine(key, share) and not cache.has("latents", key))
    texts = {prompt_key(text_fingerprint or fingerprint, prompt): prompt for prompt in sorted(set(prompts))}
    lacking = [key for key in texts if _is_mine(key, share) and not cache.has("prompts", key)]
    bad: dict[str, str] = {}
    if missing or lacking:
        with encoders() as opened:
            bad = _encode_pictures(cache, opened, missing, keys, pixels, num_workers, progress)
            for done, key in enumerate(lacking, start=1):
                cache.put("prompts", key, opened.encode_prompts([texts[key]])[0])
                progress("prompts encoded", done, len(lacking))
    faults |= {picture.path: bad[key] for picture, key in keys.items() if key in bad}
    good = {
        item: pictures for item, pictures in wanted.items() if not any(p.path in faults for p in pictures)
    }
    refused = {Refused(item.sample.id, refusal(item.sample, faults)) for item in wanted if item not in good}
    return Filled(
        {item: keys[pictures[0]] for item, pictures in good.items()},
        tuple(sorted(refused, key=lambda r: r.id)),
        len(missing) - len(bad),
        len(lacking),
        {item: tuple(keys[picture] for picture in pictures[1:]) for item, pictures in good.items()},
    )


def _encode_pictures(
    cache: Cache,
    encoders: Encoders,
    pictures: list[Picture],
    keys: dict[Picture, str],
    pixels: Pixels,
    num_workers: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Encode the pictures into the cache; the reasons of those that could not be, by key."""
    bad = {}

    def decode(picture: Picture) -> Image.Image | str:
        try:
            return load_picture(picture, pixels)
        except Unusable as reason:
            return str(reason)

    for done, (picture, image) in enumerate(ahead(decode, pictures, num_workers), start=1):
        if isinstance(image, str):
            bad[keys[picture]] = image
        else:
            latents_1CHW = encoders.encode_pictures(to_pixels(image)[None])
            cache.put("latents", keys[picture], {"latents": latents_1CHW[0]})
        progress("pictures encoded", done, len(pictures))
    return bad


def load_picture(picture: Picture, pixels: Pixels) -> Image.Image:
    """The picture at its bucket's size, cut, never stretched. Raises Unusable."""
    from PIL import ImageOps

    image = open_picture(
        picture.path,
        background=pixels.background,
        max_pixels=pixels.max_pixels,
        at_least_px=picture.size_px,
    )
    image = cover(image, picture.size_px)
    return ImageOps.mirror(image) if picture.flip else image


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as pixels_3HW, float32 in [-1, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def ahead(work: Callable[[_In], _Out], items: Sequence[_In], num_workers: int) -> Iterator[tuple[_In, _Out]]:
    """(item, work(item)) in order, with `num_workers` threads running a few items ahead; 0 works in line."""
    if num_workers < 1:
        yield from ((item, work(item)) for item in items)
        return
    pool = ThreadPoolExecutor(num_workers)
    try:
        depth = 2 * num_workers + 1
        waiting = deque(pool.submit(work, item) for item in items[:depth])
        for index, item in enumerate(items):
            result = waiting.popleft().result()
            if index + depth < len(items):
                waiting.append(pool.submit(work, items[index + depth]))
            yield item, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _first_of_each(keys: dict[Picture, str], wanted: Callable[[str], bool]) -> list[Picture]:
    """The first picture of each key that is wanted: copies of a picture are encoded once."""
    firsts: dict[str, Picture] = {}
    for picture, key in keys.items():
        firsts.setdefault(key, picture)
    return [picture for key, picture in firsts.items() if wanted(key)]


def _is_mine(key: str, share: tuple[int, int]) -> bool:
    return int(key[:8], 16) % share[1] == share[0]


def _latent_key(content: str, picture: Picture, pixels: Pixels, fingerprint: str) -> str:
    height, width = picture.size_px
    background = ",".join(map(str, pixels.background))
    return _digest(
        "latents", content, f"{height}x{width}", "cover-centre", str(picture.flip), background, fingerprint
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_hashes(
    folder: Path, paths: Sequence[str], num_workers: int, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of every picture file by path, and why some could not be read.

    A file whose path, size, times and inode are as last time is not read again; on POSIX
    systems no program can set the time of an inode's change, so a replaced picture is seen.
    """
    index_path = folder / "files.json"
    index: dict[str, list[str | int]] = _read_index(index_path)
    hashes: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    changed = False

    def look(path: str) -> tuple[list[int], str] | str:
        try:
            stat = os.stat(path)
            mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            known = index.get(path)
            return mark, str(known[-1]) if known and known[:-1] == mark else sha256_of(path)
        except (OSError, Unusable) as reason:
            return str(reason)

    for done, (path, found) in enumerate(ahead(look, paths, num_workers), start=1):
        progress("files compared", done, len(paths))
        if isinstance(found, str):
            unreadable[path] = found
            continue
        mark, hashes[path] = found
        changed = changed or index.get(path) != [*mark, hashes[path]]
        index[path] = [*mark, hashes[path]]
    if changed:
        write_whole(index_path, json.dumps(index).encode("utf-8", "surrogatepass"))
    return hashes, unreadable


def _read_index(path: Path) -> dict[str, list[str | int]]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or torn by a power cut: hashes are computed again
        return {}
    return index if isinstance(index, dict) else {}
