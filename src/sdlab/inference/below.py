"""Files below a folder, by name: how wildcards and LoRAs are found. No heavy imports."""

from __future__ import annotations

import os
from pathlib import Path

from sdlab.errors import SdlabError


def files_below(folder: Path, suffix: str, *, option: str, inside: bool = False) -> dict[str, Path]:
    """Regular files with that suffix (in any case) by their path from `folder` without it, "dir/name"; sorted.

    Hidden files and folders and those starting with ``__`` are left out; links are followed, each folder is looked at
    once. `inside`: but for links that lead out of the folder. Raises SdlabError, naming `option`, where there is no
    such folder.
    """
    if not folder.is_dir():
        raise SdlabError("is no folder", where=f"{option} {folder}", next_step="Give a folder that is there")
    root = os.path.join(os.path.realpath(folder), "")
    found, seen = {}, set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if _is_shown(name))
        names = [] if real in seen else [name for name in names if _is_shown(name)]
        seen.add(real)
        for name in names:
            path = Path(here, name)
            leads_out = inside and not os.path.realpath(path).startswith(root)
            if path.suffix.lower() == suffix and path.is_file() and not leads_out:
                found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return dict(sorted(found.items()))


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "__"))
