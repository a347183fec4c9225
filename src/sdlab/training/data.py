"""What a run trains on: which pictures, in which sizes, and where their latents and prompts are cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlab import show
from sdlab.dataset import buckets, cache
from sdlab.dataset.batches import Batches, Entry
from sdlab.dataset.cache import Cache, Filled, Pixels, prompt_key
from sdlab.dataset.colour import colour_of
from sdlab.dataset.picture import Unusable, read_size
from sdlab.dataset.tree import Refused, Sample, Scan, weigh
from sdlab.errors import SdlabError, Stopped
from sdlab.models.base import Family
from sdlab.training.config import TrainConfig
from sdlab.training.report import ThreadAdvice
from sdlab.training.signals import StopRequest

NUM_PREVIEW_PROMPTS = 4
NUM_REFUSED_TOLD = 10


def visits(
    found: Scan, config: TrainConfig, grid: int, stop: StopRequest
) -> tuple[list[buckets.Item], list[Refused]]:
    """Every visit of every usable sample with its bucket, in the dataset's order, and what is refused.

    Raises Stopped between two pictures after a signal.
    """
    refused = list(found.refused)
    usable: list[Sample] = []
    sizes: list[tuple[int, int]] = []
    times: list[int] = []

    def look(sample: Sample) -> tuple[int, int] | str:
        try:
            return read_size(sample.path, max_pixels=config.max_pixels)
        except Unusable as reason:
            return str(reason)

    counts = weigh(found.samples, repeats=config.repeats, balance=config.balance)
    for (sample, size), count in zip(
        cache.ahead(look, found.samples, config.num_workers), counts, strict=True
    ):
        if stop:
            raise Stopped(stop.signum, "stopped while reading the pictures' sizes")
        if isinstance(size, str):
            refused.append(Refused(sample.id, size))
        else:
            usable.append(sample)
            sizes.append(size)
            times.append(count)
    if not usable:
        raise nothing_usable(config.images, refused)
    assert config.image_size
    return list(buckets.assign(usable, sizes, image_size=config.image_size, grid=grid, times=times)), refused


def encode(
    store: Cache,
    items: list[buckets.Item],
    family: Family,
    config: TrainConfig,
    accelerator: Accelerator,
    stop: StopRequest,
) -> Filled:
    """Encode what the cache lacks, each process its share, then agree on what there is."""
    firsts = [item for item in items if item.repeat == 0]
    wanted = firsts + ([dataclasses.replace(item, flip=True) for item in firsts] if config.flip else [])
    prompts = {item.sample.prompt for item in items} | {""}

    advice = ThreadAdvice()

    def progress(what: str, done: int, total: int) -> None:
        if accelerator.device.type == "cpu":
            advice.look()
        if stop:
            raise Stopped(stop.signum, f"stopped with {done} of {total} {what}; they are kept")
        told = done % 500 == 0 or (done == total and what != "files compared")
        if accelerator.is_main_process and told:
            show.note(f"{what}: {done}/{total}")

    def once(share: tuple[int, int]) -> Filled:
        return cache.fill(
            store,
            wanted,
            prompts,
            fingerprint=family.fingerprint,
            encoders=lambda: family.load_encoders(accelerator.device, torch.float32),
            pixels=Pixels(colour_of(config.background), config.max_pixels),
            num_workers=config.num_workers,
            share=share,
            progress=progress,
        )

    filled = once((accelerator.process_index, accelerator.num_processes))
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        filled = once((0, 1))  # nothing is missing now but what nobody could read
        accelerator.wait_for_everyone()
    latents = dict(filled.latents)
    for item in items:  # further visits share the first one's latents
        first = dataclasses.replace(item, repeat=0)
        if first in latents:
            latents[item] = latents[first]
    return dataclasses.replace(filled, latents=latents)


def batches_of(
    items: Sequence[buckets.Item],
    filled: Filled,
    store: Cache,
    family: Family,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Batches:
    def entry(item: buckets.Item) -> Entry:
        mirrored = dataclasses.replace(item, repeat=0, flip=True)
        return Entry(
            id=f"{item.sample.id}#{item.repeat}" if item.repeat else item.sample.id,
            size_px=item.size_px,
            latents_key=filled.latents[item],
            prompt_key=prompt_key(family.fingerprint, item.sample.prompt),
            flipped_key=filled.latents[mirrored] if config.flip else "",
        )

    assert config.batch
    return Batches(
        [entry(item) for item in items],
        store,
        batch=config.batch,
        accumulate=config.grad_accum,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        empty_prompt_key=prompt_key(family.fingerprint, ""),
        process=(accelerator.process_index, accelerator.num_processes),
    )


def preview_prompts(samples: Sequence[Sample]) -> tuple[str, ...]:
    prompts = sorted({sample.prompt for sample in samples})
    apart = max(1, len(prompts) // NUM_PREVIEW_PROMPTS)
    return tuple(prompts[::apart][:NUM_PREVIEW_PROMPTS])


def tell_refused(refused: Sequence[Refused], root: str | Path) -> None:
    for one in refused[:NUM_REFUSED_TOLD]:
        show.warn(f"{one.id}: {one.reason}")
    if len(refused) > NUM_REFUSED_TOLD:
        show.warn(f"{len(refused) - NUM_REFUSED_TOLD} more are refused; see: sdlab check {root} --deep")


def nothing_usable(root: Path, refused: Sequence[Refused]) -> SdlabError:
    seen = "; ".join(f"{r.id}: {r.reason}" for r in refused[:3]) or "it holds no files"
    return SdlabError(f"no usable picture ({seen})", where=str(root), next_step=f"See: sdlab check {root}")
