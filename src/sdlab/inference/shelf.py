"""Where ``<lora:name:0.8>`` finds its file: the folders given, and the LoRAs trained here. No heavy imports."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.inference.below import files_below
from sdlab.models.runs import lora_of

SUFFIX = ".safetensors"
NUM_NEAR = 3


class LoraShelf:
    """LoRA files by name. The folders are looked through once, when the first name is asked for.

    Raises SdlabError, at once, for a folder that is not there.
    """

    def __init__(self, folders: Sequence[Path], tuned: Path) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise SdlabError(
                    "is no folder", where=f"--lora-dir {folder}", next_step="Give a folder that is there"
                )
        self._folders, self._tuned = tuple(folders), tuned
        self._found: dict[str, Path] = {}

    def find(self, name: str) -> Path:
        """The file that a tag means: ``name.safetensors`` in or below a folder, or a LoRA run in tuned/.

        "dir/name" is counted from a folder. Upper and lower case count first; where nothing is spelled so, they do
        not. Raises SdlabError where two files have the name, naming both, and where none has, naming the nearest.
        """
        if name not in self._found:
            self._found[name] = self._search(name)
        return self._found[name]

    def _search(self, name: str) -> Path:
        asked = name.replace("\\", "/").strip("/")
        asked = asked.removesuffix(SUFFIX)
        same = [path for known, path in self._files if known == asked]
        same = same or [path for known, path in self._files if known.casefold() == asked.casefold()]
        found = _different(same)
        if not found:
            raise self._missing(name, asked)
        if len(found) > 1:
            raise SdlabError(
                f"two LoRAs are called so: {found[0]} and {found[1]}",
                where=f"<lora:{name}>",
                next_step="Write the folder too, as <lora:folder/name:1>, or rename one",
            )
        return found[0]

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        """Every name and what it means; a file in a folder below has two names."""
        found: list[tuple[str, Path]] = []
        for folder in self._folders:
            for long, path in files_below(folder, SUFFIX, option="--lora-dir").items():
                found += [(known, path) for known in dict.fromkeys((long, path.stem))]
        if self._tuned.is_dir():
            for path in sorted(self._tuned.iterdir()):
                lora = path if path.suffix == SUFFIX and path.is_file() else lora_of(path)
                if lora is not None and not path.name.startswith("."):
                    found.append((path.stem if lora == path else path.name, lora))
        return found

    def _missing(self, name: str, asked: str) -> SdlabError:
        if "/" not in asked and asked and (self._tuned / asked / "model_index.json").is_file():
            return SdlabError(
                f"{self._tuned / asked} is a whole model, not a LoRA",
                where=f"<lora:{name}>",
                next_step=f"Give it as --load-model {self._tuned / asked}",
            )
        names = dict.fromkeys(known for known, _ in self._files)
        short = {known.casefold(): known for known in names}
        near = [short[n] for n in difflib.get_close_matches(asked.casefold(), short, n=NUM_NEAR)]
        hint = f"; the nearest are {', '.join(near)}" if len(near) > 1 else ""
        hint = f", did you mean '{near[0]}'?" if len(near) == 1 else hint
        looked = ", ".join(map(str, (*self._folders, self._tuned)))
        return SdlabError(
            f"there is no such LoRA in {looked}{hint}",
            where=f"<lora:{name}>",
            next_step="Give the folder that it is in with --lora-dir",
        )


def _different(paths: Iterable[Path]) -> list[Path]:
    """Without those that are the same file by another way."""
    found: dict[Path, Path] = {}
    for path in paths:
        found.setdefault(path.resolve(), path)
    return list(found.values())
