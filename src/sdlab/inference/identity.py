"""Which files a picture was made with: their names and sha256, and paths that are still right on another day.

Hashing four gigabytes takes seconds, so hashes of large files are remembered in a cache folder, by path, size
and the times of the last change. The cache is never needed: where it cannot be written, all still works.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

LARGE_BYTES = 64 << 20  # below, hashing (0.9 GB/s) is quicker than being wrong
SETTLED_S = 2.0  # a file changed less than this ago may change again within the clock's grain
CONFIGS = (".json", ".txt", ".model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Hasher:
    """sha256 of files, remembered in `cache` (a folder that may be missing or read-only; None for none)."""

    cache: Path | None = None

    def sha256(self, path: Path) -> str:
        """Of the file's bytes, 64 hex digits. Raises OSError if it cannot be read."""
        return self._digest(path, _sha256, os.path.realpath(path))

    def autov3(self, path: Path) -> str:
        """sha256 of a safetensors file's bytes behind its header, 64 hex digits; "" for any other file.

        Notes in the header do not change it, so LoRAs are known by it (their first 12 digits). Raises OSError.
        """
        return self._digest(path, _sha256_of_tensors, f"autov3 {os.path.realpath(path)}")

    def _digest(self, path: Path, hashed: Callable[[Path], str], key: str) -> str:
        about = path.stat()
        if about.st_size < LARGE_BYTES or self.cache is None or time.time() - about.st_mtime < SETTLED_S:
            return hashed(path)
        known = self._known(key, about)
        if known is not None:
            return known
        digest = hashed(path)
        self._remember(key, [*_stamp(about), digest])
        return digest

    def unknown_bytes(self, root: Path, names: Iterable[str]) -> int:
        """How much of these files `table` would have to read."""
        about = [(path, path.stat()) for path in (root / name for name in names)]
        return sum(one.st_size for path, one in about if self._known(os.path.realpath(path), one) is None)

    def _known(self, key: str, about: os.stat_result) -> str | None:
        if self.cache is None:
            return None
        known = self._read().get(key)
        if not isinstance(known, list) or known[:-1] != _stamp(about) or not isinstance(known[-1], str):
            return None
        return str(known[-1])

    def table(self, root: Path, names: Iterable[str]) -> dict[str, str]:
        """sha256 of each file, by its name below `root`, sorted."""
        return {name: self.sha256(root / name) for name in sorted(names)}

    def _file(self) -> Path:
        assert self.cache is not None
        return self.cache / "hashes.json"

    def _read(self) -> dict[str, Any]:
        try:
            table = json.loads(self._file().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # no cache, or one that a crash or another program damaged: hash again
        return table if isinstance(table, dict) else {}

    def _remember(self, key: str, entry: list[Any]) -> None:
        temporary = self._file().with_name(f"hashes.{os.getpid()}.tmp")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self._read(), key: entry}), encoding="utf-8")
            os.replace(temporary, self._file())
        except OSError:
            return  # a read-only home costs time at the next start, nothing else


def _stamp(about: os.stat_result) -> list[int]:
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return _rest_of(file)


def _sha256_of_tensors(path: Path) -> str:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # of the header, a JSON object
        if file.read(1) != b"{" or 8 + length > os.fstat(file.fileno()).st_size:
            return ""
        file.seek(8 + length)
        return _rest_of(file)


def _rest_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()


def combined(table: dict[str, str]) -> str:
    """One sha256 for a table of files: the file's own where it is one file."""
    if len(table) == 1:
        return next(iter(table.values()))
    return hashlib.sha256(
        "".join(f"{name}\0{digest}\n" for name, digest in sorted(table.items())).encode()
    ).hexdigest()


def model_files(path: Path) -> list[str]:
    """Names below `path` of the files a model is loaded from, sorted; [""] where `path` is itself the file.

    In a diffusers folder: model_index.json, and the settings and weights of each part, taking safetensors
    before other formats and full precision before variants, as loading does.
    """
    if not path.is_dir():
        return [""]
    index = path / "model_index.json"
    parts = [d for d in sorted(path.iterdir()) if d.is_dir() and d.name in _parts(index)]
    return ["model_index.json", *(name for part in parts for name in _part_files(path, part))]


def _parts(index: Path) -> set[str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()  # loading has its own, better error for it
    return {name for name, about in table.items() if isinstance(about, list) and about[:1] != [None]}


def _part_files(root: Path, part: Path) -> list[str]:
    files = sorted(f for f in part.iterdir() if f.is_file() and not f.name.startswith("."))
    tensors = [f for f in files if f.suffix == ".safetensors"]
    plain = [f for f in tensors if ".fp16." not in f.name and ".non_ema." not in f.name]
    weights = plain or tensors or [f for f in files if f.suffix in PICKLES]
    configs = [f for f in files if f.suffix in CONFIGS]
    return sorted(f.relative_to(root).as_posix() for f in [*configs, *weights])


def portable(path: Path, *, base: Path) -> str:
    """The path as seen from `base`, in posix style, so that a picture names no home folder it lies beside."""
    try:
        return Path(os.path.relpath(path, base)).as_posix()
    except ValueError:  # another drive on Windows
        return path.as_posix()


def found_again(asked: str, bases: Iterable[Path]) -> Path | None:
    """The recorded path as seen from the first of the bases where something is there."""
    return next((path for path in (base / asked for base in bases) if path.exists()), None)


DENOISERS = ("unet", "transformer")


def swapped_files(path: Path, folders: tuple[str, ...]) -> list[str]:
    """Names below `path` of the files a swapped-in part is loaded from; [""] where `path` is the file.

    `folders` are those of a whole model that are read; where there is none of them, `path` is itself the part.
    """
    if not path.is_dir():
        return [""]
    parts = [path / name for name in folders if (path / name).is_dir()]
    return [name for part in parts or [path] for name in _part_files(path, part)]
