"""What a run trains on: which pictures, in which sizes, and where their latents and prompts are cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlab import show
from sdlab.dataset import buckets, cache
from sdlab.dataset.batches import Batches, CachedSource, Entry, visit_name
from sdlab.dataset.cache import Cache, Cond, Filled, Pixels, prompt_key
from sdlab.dataset.colour import colour_of
from sdlab.dataset.picture import Unusable, read_size
from sdlab.dataset.tree import Refused, Sample, Scan, refusal, weigh
from sdlab.errors import SdlabError, Stopped
from sdlab.models.base import Family
from sdlab.signals import StopRequest
from sdlab.training.config import PromptedConfig, RunConfig
from sdlab.training.report import ThreadAdvice

NUM_PREVIEW_PROMPTS = 4
NUM_REFUSED_TOLD = 10


def visits(
    found: Scan,
    config: RunConfig,
    grid: int,
    stop: StopRequest,
    *,
    references: bool = False,
    tell: bool = True,
) -> tuple[list[buckets.Item], list[Refused]]:
    """Every visit of every usable sample with its bucket, in the dataset's order, and what is refused.

    Without `references` those of the samples are left out unopened, and with `tell` a note says how many; with
    them a sample that has a bad one is refused. Raises Stopped between two pictures after a signal.
    """
    if not references:
        num_unused = sum(len(sample.references) for sample in found.samples)
        if num_unused and tell:
            show.note(f"reference pictures are not used ({num_unused}): this model does not learn edits")
    refused = list(found.refused)
    usable: list[Sample] = []
    sizes: list[list[tuple[int, int]]] = []
    times: list[int] = []

    def look(sample: Sample) -> list[tuple[int, int]] | str:
        measured, faults = [], {}
        for path in (sample.path, *sample.references):
            try:
                measured.append(read_size(path, max_pixels=config.max_pixels))
            except Unusable as reason:
                faults[path] = str(reason)
        return refusal(sample, faults) or measured

    samples = found.samples if references else [sample._replace(references=()) for sample in found.samples]
    counts = weigh(samples, repeats=config.repeats, balance=config.balance)
    for (sample, measured), count in zip(cache.ahead(look, samples, config.num_workers), counts, strict=True):
        if stop:
            raise Stopped(stop.signum, "stopped while reading the pictures' sizes")
        if isinstance(measured, str):
            refused.append(Refused(sample.id, measured))
        else:
            usable.append(sample)
            sizes.append(measured)
            times.append(count)
    if not usable:
        raise nothing_usable(config.images, refused)
    assert config.image_size
    items = buckets.assign(
        usable,
        [own for own, *_ in sizes],
        image_size=config.image_size,
        grid=grid,
        times=times,
        reference_sizes_px=[others for _, *others in sizes],
    )
    return list(items), refused


def encode(
    store: Cache,
    items: list[buckets.Item],
    family: Family,
    config: RunConfig,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    extra_prompts: Iterable[str] = (),
) -> Filled:
    """Encode what the cache lacks, each process its share, then agree on what there is.

    The `extra_prompts` are those of previews: conds_of has them afterwards, as it has the empty prompt.
    """
    firsts = [item for item in items if item.repeat == 0]
    wanted = firsts + ([dataclasses.replace(item, flip=True) for item in firsts] if config.flip else [])
    prompts = {item.sample.prompt for item in items} | {"", *extra_prompts}
    dtype = _encoder_dtype(accelerator)

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
            text_fingerprint=_text_fingerprint(family, dtype),
            encoders=lambda: family.load_encoders(accelerator.device, dtype),
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
    latents, references = dict(filled.latents), dict(filled.references)
    for item in items:  # further visits share the first one's latents
        first = dataclasses.replace(item, repeat=0)
        if first in latents:
            latents[item], references[item] = latents[first], references[first]
    return dataclasses.replace(filled, latents=latents, references=references)


def _encoder_dtype(accelerator: Accelerator) -> torch.dtype:
    """What large text encoders compute in: the type that the denoiser will."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def _text_fingerprint(family: Family, dtype: torch.dtype) -> str:
    """What keys of prompts go by. Pictures are encoded in float32 always, so theirs go by the family's alone."""
    plain = dtype == torch.float32
    return family.fingerprint if plain else f"{family.fingerprint} {str(dtype).removeprefix('torch.')}"


def conds_of(
    store: Cache, prompts: Iterable[str], family: Family, accelerator: Accelerator
) -> dict[str, Cond]:
    """What the encoders made of prompts that `encode` has seen, by prompt."""
    by = _text_fingerprint(family, _encoder_dtype(accelerator))
    return {prompt: store.get("prompts", prompt_key(by, prompt)) for prompt in prompts}


def batches_of(
    items: Sequence[buckets.Item],
    filled: Filled,
    store: Cache,
    family: Family,
    config: PromptedConfig,
    accelerator: Accelerator,
) -> Batches:
    """The batches of samples that `encode` has encoded."""
    by = _text_fingerprint(family, _encoder_dtype(accelerator))

    def entry(item: buckets.Item) -> Entry:
        mirrored = dataclasses.replace(item, repeat=0, flip=True)
        return Entry(
            id=visit_name(item),
            size_px=item.size_px,
            latents_key=filled.latents[item],
            prompt_key=prompt_key(by, item.sample.prompt),
            flipped_key=filled.latents[mirrored] if config.flip else "",
            reference_sizes=item.reference_sizes,
            reference_keys=filled.references[item],
            flipped_reference_keys=filled.references[mirrored] if config.flip else (),
        )

    assert config.batch
    return Batches(
        [entry(item) for item in items],
        CachedSource(store, config.caption_dropout, prompt_key(by, "")),
        batch=config.batch,
        accumulate=config.grad_accum,
        seed=config.seed,
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
