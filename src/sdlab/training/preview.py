"""Preview grids of a run: the same prompts and seeds each time, so that only the weights differ."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Cond, Pixels, load_picture, pictures_of, write_whole
from sdlab.dataset.sheet import font_for, labelled
from sdlab.keyed import key
from sdlab.models.base import Family

LOOKED_AT_PX = 64  # diffusers' FLUX.2 pipelines refuse references with a shorter side


@dataclass(frozen=True)
class Shot:
    """One picture of a preview."""

    prompt: str
    size_px: tuple[int, int]  # height and width
    references: tuple[Image.Image, ...] = ()  # what is edited


def shots_of(prompts: Sequence[str], items: Sequence[Item], *, image_size: int, pixels: Pixels) -> list[Shot]:
    """The shots for these prompts: squares, or edits where the dataset's samples of that prompt are edits.

    An edit has the references and the size of the first sample with its prompt; where all samples are edits, a prompt
    that is nobody's has those of the first.
    """
    firsts: dict[str, Item] = {}
    for item in items:
        firsts.setdefault(item.sample.prompt, item)
    only_edits = all(item.reference_sizes for item in items)
    shots = []
    for prompt in prompts:
        like = firsts.get(prompt, items[0] if only_edits else None)
        if like is None or not like.reference_sizes:
            shots.append(Shot(prompt, (image_size, image_size)))
        else:
            shots.append(Shot(prompt, like.size_px, tuple(_references(like, pixels))))
    return shots


def _references(item: Item, pixels: Pixels) -> Iterable[Image.Image]:
    """The references as training sees them; enlarged where a side is below what a pipeline takes."""
    for picture in pictures_of(item)[1:]:
        image = load_picture(picture, pixels)
        times = -(-LOOKED_AT_PX // min(image.size))
        yield image if times <= 1 else image.resize((times * image.width, times * image.height))


def previewer(
    family: Family,
    module: nn.Module,
    shots: Sequence[Shot],
    folder: Path,
    *,
    conds: Mapping[str, Cond],
    seed: int,
    num_steps: int,
    guidance: float,
) -> Callable[[int], None]:
    """A function that draws ``samples/step-NNNNNN.png`` from the module's weights as they are.

    The pipeline's other parts are loaded for the preview only and freed after it; what its prompts are encoded to is
    in `conds`. The references of an edit stand before its result.
    """
    side_px = max(side for shot in shots for side in (*shot.size_px, *_sides(shot.references)))

    def preview(step: int) -> None:
        module.eval()
        with _own_dtype(module):
            pictures = _draw(family.pipeline(module, conds), shots, seed, num_steps, guidance)
        tiles = [
            tile
            for shot, picture in zip(shots, pictures, strict=True)
            for tile in (*[(image, "reference") for image in shot.references], (picture, shot.prompt))
        ]
        write_sheet(tiles, folder / f"step-{step:06d}.png", side_px=side_px)

    return preview


def write_sheet(tiles: Sequence[tuple[Image.Image, str]], path: Path, *, side_px: int | None = None) -> None:
    """Write pictures with their texts as one, whole or not at all; with room for squares of `side_px`, or as needed."""
    sheet = labelled(
        tiles,
        num=len(tiles),
        side_px=side_px or max(image.width for image, _ in tiles),
        font=font_for([text for _, text in tiles])[0],
        height_px=side_px or max(image.height for image, _ in tiles),
    )
    out = io.BytesIO()
    sheet.save(out, "PNG")
    write_whole(path, out.getvalue())


@contextmanager
def _own_dtype(module: nn.Module) -> Iterator[None]:
    """The module's outputs have its weights' type, as outside of training: accelerate makes them float32.

    A pipeline in bf16 would hand float32 latents to its VAE.
    """
    dtype = next(module.parameters()).dtype

    def cast(_module: nn.Module, _args: Any, out: Any) -> Any:
        return tuple(tensor.to(dtype) for tensor in out) if isinstance(out, tuple) else out

    hook = module.register_forward_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def _sides(pictures: Sequence[Image.Image]) -> list[int]:
    return [side for picture in pictures for side in picture.size]


def _draw(
    pipeline: Callable[..., Any], shots: Sequence[Shot], seed: int, steps: int, guidance: float
) -> list[Image.Image]:
    pictures = []
    for index, shot in enumerate(shots):
        made = pipeline(
            prompt=shot.prompt,
            height=shot.size_px[0],
            width=shot.size_px[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(key(seed, "preview", index)),
            **({"image": list(shot.references)} if shot.references else {}),
        )
        pictures.append(made.images[0])
    return pictures
