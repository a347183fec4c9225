"""One pass over the pictures or two: the second makes them anew from the first's, enlarged and noised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from sdlab.inference.engines.checks import Made
from sdlab.inference.engines.masks import Masked
from sdlab.inference.spec import Shot, Spec

OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Pass:
    """Pictures to be made together, in one go."""

    shots: Sequence[Shot]
    spec: Spec
    starts: Sequence[
        Image.Image
    ] = ()  # for each shot the picture it starts from, in the spec's size; () for none
    mask: Masked | None = None
    references: Sequence[Image.Image] = ()
    on_step: OnStep | None = None
    last: bool = True  # its pictures are given out, so they are checked for more than finite numbers

    @property
    def strength(self) -> float:
        """How much of the start is noised away; 1 where that is not said."""
        return 1.0 if self.spec.strength is None else self.spec.strength

    @property
    def num_steps(self) -> int:
        """Steps that are made: of a start picture the last ones, at least one where anything is to change."""
        if not self.starts:
            return self.spec.steps
        return min(max(int(self.spec.steps * self.strength), int(self.strength > 0)), self.spec.steps)

    def noise(self, shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
        """Each shot's own noise (B, *shape) in float32 on the CPU, and its generator, for what is drawn later."""
        generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in self.shots]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators

    def encoded(self, encode: Callable[[Image.Image], Tensor]) -> Tensor:
        """The latents of the start pictures (B, C, h, w); what several shots start from is encoded once."""
        known = {id(start): start for start in self.starts}
        latents = {name: encode(start) for name, start in known.items()}
        # a VAE gives them channels last, and a UNet on the CPU is slower in that order and has other last digits
        return torch.cat([latents[id(start)] for start in self.starts]).contiguous()


def first_pass(
    shots: Sequence[Shot],
    spec: Spec,
    *,
    init: Image.Image | None,
    mask: tuple[Image.Image, int] | None,
    references: Sequence[Image.Image],
    on_step: OnStep | None,
) -> Pass:
    """What `sample` of an engine is asked for. A mask is nothing without a picture to start from."""
    assert mask is None or init is not None
    return Pass(
        shots,
        spec,
        starts=[init] * len(shots) if init is not None else (),
        mask=Masked(init.convert("RGB"), *mask) if init is not None and mask is not None else None,
        references=references,
        on_step=on_step,
    )


def in_passes(make: Callable[[Pass], list[Made]], whole: Pass) -> list[Made]:
    """The pictures of `whole`, with the second pass that its spec asks for.

    Both passes use a shot's own seed, so a picture is the same whoever shares its batch. What comes to nothing in
    the first pass is not in the second.
    """
    hires = whole.spec.hires
    if hires is None:
        return make(whole)
    spec = replace(whole.spec, hires=None)
    first = make(replace(whole, spec=spec, on_step=_part(whole.on_step, 0), last=False))
    good = {place: made.image for place, made in enumerate(first) if made.image is not None}
    if not good:
        return first
    size = hires.width, hires.height
    second = make(
        replace(
            whole,
            shots=[whole.shots[place] for place in good],
            spec=replace(spec, width=size[0], height=size[1], steps=hires.steps, strength=hires.strength),
            starts=[image.resize(size, Image.Resampling.LANCZOS) for image in good.values()],
            mask=whole.mask.enlarged(size) if whole.mask else None,
            on_step=_part(whole.on_step, 1),
        )
    )
    again = dict(zip(good, second, strict=True))
    return [
        replace(again[place], vae_float32=made.vae_float32 or again[place].vae_float32)
        if place in again
        else made
        for place, made in enumerate(first)
    ]


def _part(on_step: OnStep | None, before: int) -> OnStep | None:
    """For pass `before` of two: how far both are, each counted as half of the work."""
    if on_step is None:
        return None
    return lambda done, total: on_step(before * total + done, 2 * total)
