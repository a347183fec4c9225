"""The recipe out of a picture, checked."""

from __future__ import annotations

import json
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.inference.record.container import found_in
from sdlab.inference.record.schema import Recipe, checked


def read(path: Path) -> Recipe:
    """The recipe in a picture made by sdlab, a PNG, JPEG or WebP.

    Raises SdlabError where the file cannot be read or has no recipe that this version understands.
    """
    found = found_in(path)
    if found.recipe is None:
        other = "" if found.parameters is None else ", only the A1111 'parameters' text of another program"
        raise SdlabError(
            f"holds no sdlab recipe{other}", where=str(path), next_step="Give a picture made by sdlab"
        )
    try:
        recipe = json.loads(found.recipe)
    except (ValueError, RecursionError) as reason:
        raise SdlabError("its sdlab recipe is damaged", where=str(path)) from reason
    return checked(recipe, str(path))


def peek(path: Path) -> Recipe | None:
    """The recipe in a picture; None where there is none that can be read."""
    try:
        return read(path)
    except SdlabError:
        return None
