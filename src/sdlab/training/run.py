"""One training run of a denoiser, from a folder of pictures to a pipeline in tuned/: the calls, in order.

scan -> buckets -> cache (encoders in and out) -> denoiser -> fit -> pipeline
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlab import show
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Pixels
from sdlab.dataset.colour import colour_of
from sdlab.dataset.report import num_of
from sdlab.dataset.tree import Refused, Scan, scan
from sdlab.models.base import Family
from sdlab.models.resolve import Model
from sdlab.models.runs import LORA_FILE
from sdlab.training.adapt import load_trained, saver
from sdlab.training.config import PromptedConfig
from sdlab.training.data import (
    batches_of,
    conds_of,
    encode,
    nothing_usable,
    preview_prompts,
    tell_refused,
    visits,
)
from sdlab.training.preview import previewer, shots_of
from sdlab.training.record import cached_dataset, model_facts
from sdlab.training.session import Job, Session, carry_out, in_session, refuse_overlap


@dataclass(frozen=True)
class Plan:
    """What a family's command knows and a run is told."""

    save: Callable[[nn.Module, Path], None]  # writes the whole pipeline into a new folder
    frozen_bytes: int  # of the parts that are saved beside the denoiser
    references: bool  # does the model learn edits?
    preview_guidance: float
    preview_steps: int
    tell_memory: Callable[[Sequence[Item], torch.device], None] | None = None  # before anything is loaded


def train(
    config: PromptedConfig,
    family: Family,
    model: Model,
    *,
    folder: Path,
    command: str,
    objective: dict[str, Any],
    plan: Plan,
) -> None:
    """Train as the settled `config` says, and leave a diffusers pipeline, or a LoRA, in `folder`.

    `objective` is what else determines the loss, for run.json: a continued run must agree with it. Raises SdlabError
    before the first costly second where it can.
    """
    refuse_overlap(folder, config)
    found = scan(config.images, prompt_prefix=config.prompt_prefix, use_txt=config.txt)
    facts = {**model_facts(model), "command": command, "objective": objective, "encoders": family.fingerprint}
    work = partial(_train, family=family, model=model, found=found, facts=facts, plan=plan)
    in_session(config, folder, command=command, work=work)


def _train(
    session: Session[PromptedConfig],
    *,
    family: Family,
    model: Model,
    found: Scan,
    facts: Mapping[str, Any],
    plan: Plan,
) -> None:
    config, accelerator, store = session.config, session.accelerator, session.store
    items, refused = visits(
        found, config, family.grid, session.stop, references=plan.references, tell=session.is_main
    )
    if session.is_main:
        show.note(_dataset_line(found, items, refused))
        tell_refused(refused, found.root)
        if plan.tell_memory:
            plan.tell_memory(items, accelerator.device)
    previews = config.preview_prompt or preview_prompts([item.sample for item in items])
    filled = encode(store, items, family, config, accelerator, session.stop, extra_prompts=previews)
    items = [item for item in items if item in filled.latents]
    refused = [*refused, *filled.refused]
    if session.is_main:
        tell_refused(filled.refused, found.root)
    if not items:
        raise nothing_usable(config.images, refused)
    trained = load_trained(family, config, accelerator.device, session.dtype)
    job = Job(
        module=trained.denoiser,
        loss=family.loss,
        batches=batches_of(items, filled, store, family, config, accelerator),
        dataset=cached_dataset(items, filled, refused),
        facts={**facts, "adapter": trained.facts()},
        preview=_preview(session, family, trained.denoiser, items, previews, plan),
        save=_save(saver(trained, model, plan.save)),
        result_bytes=trained.result_bytes(plan.frozen_bytes),
        result=f"the LoRA is {session.run.path / LORA_FILE}"
        if trained.lora
        else f"the model is {session.run.path}",
        note=trained.note,
    )
    carry_out(session, job)


def _preview(
    session: Session[PromptedConfig],
    family: Family,
    denoiser: nn.Module,
    items: Sequence[Item],
    prompts: Sequence[str],
    plan: Plan,
) -> Callable[[int], None]:
    config = session.config
    pixels = Pixels(colour_of(config.background), config.max_pixels)
    return previewer(
        family,
        denoiser,
        shots_of(prompts, items, image_size=config.image_size or 512, pixels=pixels),
        session.run.path / "samples",
        conds=conds_of(session.store, {"", *prompts}, family, session.accelerator),
        seed=config.seed,
        num_steps=plan.preview_steps,
        guidance=plan.preview_guidance,
    )


def _save(write: Callable[[nn.Module, Path], None]) -> Callable[[nn.Module, Path], Mapping[str, Any]]:
    """As a job saves: with no more to tell."""

    def save(denoiser: nn.Module, into: Path) -> Mapping[str, Any]:
        write(denoiser, into)
        return {}

    return save


def _dataset_line(found: Scan, items: Sequence[Item], refused: Sequence[Refused]) -> str:
    samples, prompts = {item.sample.id for item in items}, {item.sample.prompt for item in items}
    edits = {item.sample.id for item in items if item.reference_sizes}
    with_references = f" ({len(edits)} with reference pictures)" if edits else ""
    return (
        f"{found.root}: {num_of(len(samples), 'picture')}{with_references}, {num_of(len(prompts), 'prompt')}, "
        f"{num_of(len(refused), 'file')} refused"
    )
