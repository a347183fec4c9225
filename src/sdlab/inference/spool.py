"""What prompts were encoded to: some in memory, the rest in a temporary folder. FLUX.2's take 8 MB and more each."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdlab.errors import OutOfResources

if TYPE_CHECKING:
    from sdlab.models.base import Cond

KEPT_BYTES = 2 << 30


class Spool(Mapping[str, "Cond"]):
    """Conditions by prompt, those beyond `kept_bytes` on disk until the program ends."""

    def __init__(self, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept: dict[str, Cond] = {}
        self._left_bytes = kept_bytes
        self._folder: Path | None = None
        self._files: dict[str, Path] = {}

    def add(self, prompt: str, cond: Cond) -> None:
        """Keep the prompt's tensors, which are on the CPU. Raises OutOfResources where the disk is full."""
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in cond.values())
        if num_bytes <= self._left_bytes:
            self._left_bytes -= num_bytes
            self._kept[prompt] = cond
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sdlab-prompts-"))
            weakref.finalize(
                self, shutil.rmtree, self._folder, ignore_errors=True
            )  # also when the program ends
        path = self._folder / f"{len(self._files)}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in cond.items()}, path)
        except (OSError, SafetensorError) as reason:
            raise OutOfResources(
                f"no space for what {len(self) + 1} prompts are encoded to, {num_bytes >> 20} MB each",
                where=str(self._folder),
                next_step="Give fewer prompts at once, or set TMPDIR to a larger disk",
            ) from reason
        self._files[prompt] = path

    def __getitem__(self, prompt: str) -> Cond:
        return self._kept[prompt] if prompt in self._kept else load_file(self._files[prompt])

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._files

    def __len__(self) -> int:
        return len(self._kept) + len(self._files)
