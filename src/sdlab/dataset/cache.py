"""A store of tensors by content: each picture and each prompt is encoded once, whatever it is called.

    <folder>/files.json                 content hashes of picture files, by path, size and times
    <folder>/latents/ab/<key>.safetensors     key = hash(bytes of the picture, size, crop, flip, background, encoders)
    <folder>/prompts/cd/<key>.safetensors     key = hash(text, encoders)

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from sdlab.dataset.buckets import Item
from sdlab.dataset.picture import Unusable, cover, open_picture, sha256_of
from sdlab.dataset.tree import Refused
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


@dataclass(frozen=True)
class Filled:
    """Where everything is after `fill`: keys of latents by item, and the pictures that could not be used."""

    latents: dict[Item, str]
    refused: tuple[Refused, ...]
    num_pictures_encoded: int
    num_prompts_encoded: int


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
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
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


def fill(
    cache: Cache,
    items: Sequence[Item],
    prompts: Iterable[str],
    *,
    fingerprint: str,
    encoders: Callable[[], AbstractContextManager[Encoders]],
    pixels: Pixels,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Filled:
    """Encode what the cache lacks, and say where everything is.

    The encoders are opened only if something is missing, and are gone when this returns. Of the missing, process
    `share[0]` of `share[1]` encodes the keys that fall to it: call it once more, with the whole share, after
    the processes have met. A picture that cannot be read is refused.
    """
    hashes, unreadable = _content_hashes(cache.folder, items, num_workers, progress)
    keys = {
        item: _latent_key(hashes[item.sample.path], item, pixels, fingerprint)
        for item in items
        if item.sample.path in hashes
    }
    refused = [
        Refused(item.sample.id, unreadable[item.sample.path])
        for item in items
        if item.repeat == 0 and item.sample.path in unreadable
    ]
    missing = _first_of_each(keys, lambda key: _is_mine(key, share) and not cache.has("latents", key))
    wanted = {prompt_key(fingerprint, prompt): prompt for prompt in sorted(set(prompts))}
    lacking = [key for key in wanted if _is_mine(key, share) and not cache.has("prompts", key)]
    bad: dict[str, str] = {}
    if missing or lacking:
        with encoders() as opened:
            bad = _encode_pictures(cache, opened, missing, keys, pixels, num_workers, progress)
            for done, key in enumerate(lacking, start=1):
                cache.put("prompts", key, opened.encode_prompts([wanted[key]])[0])
                progress("prompts encoded", done, len(lacking))
    for item, key in list(keys.items()):
        if key in bad:
            refused.append(Refused(item.sample.id, bad[key]))
            del keys[item]
    unique = tuple(sorted(set(refused), key=lambda r: r.id))
    return Filled(keys, unique, len(missing) - len(bad), len(lacking))


def _encode_pictures(
    cache: Cache,
    encoders: Encoders,
    items: list[Item],
    keys: dict[Item, str],
    pixels: Pixels,
    num_workers: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Encode the items into the cache; the reasons of those that could not be, by key."""
    bad = {}

    def decode(item: Item) -> Image.Image | str:
        try:
            return load_picture(item, pixels)
        except Unusable as reason:
            return str(reason)

    for done, (item, image) in enumerate(ahead(decode, items, num_workers), start=1):
        if isinstance(image, str):
            bad[keys[item]] = image
        else:
            latents_1CHW = encoders.encode_pictures(to_pixels(image)[None])
            cache.put("latents", keys[item], {"latents": latents_1CHW[0]})
        progress("pictures encoded", done, len(items))
    return bad


def load_picture(item: Item, pixels: Pixels) -> Image.Image:
    """The item's picture at its bucket's size, cut, never stretched. Raises Unusable."""
    from PIL import ImageOps

    image = open_picture(
        item.sample.path, background=pixels.background, max_pixels=pixels.max_pixels, at_least_px=item.size_px
    )
    image = cover(image, item.size_px)
    return ImageOps.mirror(image) if item.flip else image


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


def _first_of_each(keys: dict[Item, str], wanted: Callable[[str], bool]) -> list[Item]:
    """The first item of each key that is wanted: copies of a picture are encoded once."""
    firsts: dict[str, Item] = {}
    for item, key in keys.items():
        firsts.setdefault(key, item)
    return [item for key, item in firsts.items() if wanted(key)]


def _is_mine(key: str, share: tuple[int, int]) -> bool:
    return int(key[:8], 16) % share[1] == share[0]


def _latent_key(content: str, item: Item, pixels: Pixels, fingerprint: str) -> str:
    height, width = item.size_px
    background = ",".join(map(str, pixels.background))
    return _digest(
        "latents", content, f"{height}x{width}", "cover-centre", str(item.flip), background, fingerprint
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _content_hashes(
    folder: Path, items: Sequence[Item], num_workers: int, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of every picture file by path, and why some could not be read.

    A file whose path, size, times and inode are as last time is not read again; on POSIX
    systems no program can set the time of an inode's change, so a replaced picture is seen.
    """
    index_path = folder / "files.json"
    index: dict[str, list[str | int]] = _read_index(index_path)
    paths = sorted({item.sample.path for item in items})
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
