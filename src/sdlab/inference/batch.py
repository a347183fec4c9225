"""What a job hands to the engine at once, and where its pictures go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.inference.spec import Format, Init, Mask, Reference, Shot, Spec

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.load import Source


@dataclass(frozen=True)
class Batch:
    """Pictures that are made together, and where they go."""

    shots: list[Shot]
    spec: Spec
    folder: Path
    names: Callable[[Shot], Iterator[str]]  # of its file, the next where one is taken
    init: Init | None = None
    picture: Image.Image | None = None  # `init`, opened and in the spec's size
    mask: Mask | None = None
    mask_picture: Image.Image | None = (
        None  # `mask`, opened, grey, in the spec's size, its edge not yet softened
    )
    references: tuple[Reference, ...] = ()
    looked_at: tuple[Image.Image, ...] = ()  # `references`, opened and in their sizes
    keep: frozenset[int] | None = None  # only the pictures at these places are written
    loras: tuple[
        tuple[Source, float], ...
    ] = ()  # of <lora:name:weight> in the prompts, beside the model's own
    embeddings: tuple[Source, ...] = ()  # textual inversions that the prompts name
    format: Format = field(default_factory=Format)
    where: tuple[str, ...] = ()  # of each shot, as "prompts.txt:5"; () for what was typed on the command line

    @property
    def subject(self) -> Path | None:
        """The picture that is changed, if one is."""
        if self.init is not None:
            return self.init.path
        return self.references[0].source.path if self.references else None
