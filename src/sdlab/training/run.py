"""One training run from a folder of pictures to a pipeline in tuned/: the calls, in order.

scan -> buckets -> cache (encoders in and out) -> denoiser -> fit -> pipeline
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from sdlab import show
from sdlab.dataset.batches import Batches
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Cache, Pixels
from sdlab.dataset.colour import colour_of
from sdlab.dataset.tree import Refused, Scan, scan
from sdlab.errors import ItemsFailed, SdlabError, Stopped
from sdlab.models.base import Family
from sdlab.models.memory import pick_device, pick_dtype
from sdlab.models.resolve import Model
from sdlab.models.runs import LORA_FILE
from sdlab.options import as_json
from sdlab.signals import StopRequest, stop_on_signals
from sdlab.training import checkpoint
from sdlab.training.adapt import load_trained, saver
from sdlab.training.config import TrainConfig
from sdlab.training.data import (
    batches_of,
    conds_of,
    encode,
    nothing_usable,
    preview_prompts,
    tell_refused,
    visits,
)
from sdlab.training.folder import RunFolder
from sdlab.training.loop import FitConfig, fit
from sdlab.training.optim import refuse_fused
from sdlab.training.preview import previewer, shots_of
from sdlab.training.record import check_unchanged, facts_of, now


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
    config: TrainConfig,
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
    run = RunFolder(folder)
    _refuse_overlap(folder, config)
    found = scan(config.images, prompt_prefix=config.prompt_prefix, use_txt=config.txt)
    with _accelerated(config) as accelerator, stop_on_signals() as stop:
        if config.resume and (run.recorded() or {}).get("state") == "finished":
            show.note(f"{run.path} is finished; nothing to resume")
            return
        main = accelerator.is_main_process
        with run.locked() if main else nullcontext():
            if main:
                _prepare(run, config, command)
            accelerator.wait_for_everyone()
            try:
                facts = {"command": command, "objective": objective}
                _train(config, family, model, run, found, accelerator, stop, facts=facts, plan=plan)
            except (Stopped, ItemsFailed) as reason:
                if main and run.recorded():
                    run.record(state="stopped" if isinstance(reason, Stopped) else "failed")
                raise
            except SdlabError:
                if main and not run.began():
                    (run.path / "run.json").unlink(missing_ok=True)  # refused: nothing came of it
                raise
            finally:
                run.close()


def _train(
    config: TrainConfig,
    family: Family,
    model: Model,
    run: RunFolder,
    found: Scan,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    facts: dict[str, Any],
    plan: Plan,
) -> None:
    main = accelerator.is_main_process
    if config.fused_backward:
        refuse_fused(num_processes=accelerator.num_processes, accumulate=config.grad_accum)
    store = Cache(config.cache_dir or run.path.parent / ".sdlab-cache")
    items, refused = visits(found, config, family.grid, stop, references=plan.references, tell=main)
    if main:
        show.note(_dataset_line(found, items, refused))
        tell_refused(refused, found.root)
        if plan.tell_memory:
            plan.tell_memory(items, accelerator.device)
    previews = config.preview_prompt or preview_prompts([item.sample for item in items])
    filled = encode(store, items, family, config, accelerator, stop, extra_prompts=previews)
    items = [item for item in items if item in filled.latents]
    refused = [*refused, *filled.refused]
    if main:
        tell_refused(filled.refused, found.root)
    if not items:
        raise nothing_usable(config.images, refused)
    batches = batches_of(items, filled, store, family, config, accelerator)
    steps = config.steps or (config.epoch or 1) * batches.steps_per_epoch
    conds = conds_of(store, {"", *previews}, family, accelerator)
    pixels = Pixels(colour_of(config.background), config.max_pixels)
    shots = shots_of(previews, items, image_size=config.image_size or 512, pixels=pixels)
    trained = load_trained(family, config, accelerator.device, _compute_dtype(accelerator))
    denoiser = trained.denoiser
    if config.grad_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    facts |= facts_of(config, model, items, filled, refused, family, accelerator, steps, trained)
    if main:
        state = checkpoint.size_bytes(denoiser, optimizer=config.optimizer or "adamw", ema=bool(config.ema))
        run.check_space(int(((config.keep + 1) * state + trained.result_bytes(plan.frozen_bytes)) * 1.05))
        if config.overwrite:
            run.clear()  # only now, when nothing is left that could refuse the new run
        check_unchanged(run, facts, items, filled)
        run.record(**facts, state="running", started=now())
        if trained.lora:
            show.note(trained.lora.as_line())
        show.note(_settings_line(config, batches, steps, accelerator, run))
    accelerator.wait_for_everyone()  # the others read the folder only when it is what it will be
    preview = previewer(
        family,
        denoiser,
        shots,
        run.path / "samples",
        conds=conds,
        seed=config.seed,
        num_steps=plan.preview_steps,
        guidance=plan.preview_guidance,
    )
    began = time.monotonic()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the encoders are gone; what is recorded is the training's peak
    ema = fit(
        denoiser,
        family.loss,
        batches,
        _fit_config(config, steps),
        run,
        accelerator=accelerator,
        stop=stop,
        preview=preview,
    )
    if main:
        run.close()
        plain = accelerator.unwrap_model(denoiser, keep_fp32_wrapper=False)
        with ema.applied() if ema else nullcontext():
            _export(run.path, plain, saver(trained, model, plan.save))
        seconds = time.monotonic() - began
        run.record(
            state="finished",
            ended=now(),
            seconds_of_last_start=round(seconds, 1),
            seconds_a_step=run.progress.seconds_a_step() if run.progress else None,
            peak_gpu_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if torch.cuda.is_available()
            else None,
        )
        if run.num_skipped():
            show.warn(
                f"{run.num_skipped()} of {steps} steps were skipped, their loss or gradient not finite; see log.jsonl"
            )
        what = f"the LoRA is {run.path / LORA_FILE}" if trained.lora else f"the model is {run.path}"
        show.note(f"trained {steps} steps in {seconds:.0f} s; {what}, previews in {run.path / 'samples'}")


def _dataset_line(found: Scan, items: Sequence[Item], refused: Sequence[Refused]) -> str:
    samples, prompts = {item.sample.id for item in items}, {item.sample.prompt for item in items}
    edits = {item.sample.id for item in items if item.reference_sizes}
    with_references = f" ({len(edits)} with reference pictures)" if edits else ""
    return (
        f"{found.root}: {len(samples)} pictures{with_references}, {len(prompts)} prompts, "
        f"{len(refused)} files refused"
    )


def _prepare(run: RunFolder, config: TrainConfig, command: str) -> None:
    """Sweep up after a killed run, and write down how a new one starts, so that it can be resumed from anywhere.

    Raises SdlabError if the folder holds another run, or files that are not ours.
    """
    if not config.resume:
        run.refuse_strangers()
    if run.began() and not (config.resume or config.overwrite):
        raise SdlabError(
            "holds a run already",
            where=str(run.path),
            next_step="Go on with it (--resume), replace it (--overwrite), or name another folder (--save-model)",
        )
    run.sweep()
    if not run.began():
        run.record(config=as_json(config), command=command, state="encoding")


def _fit_config(config: TrainConfig, steps: int) -> FitConfig:
    assert config.lr is not None and config.lr_schedule and config.warmup is not None and config.optimizer
    return FitConfig(
        steps=steps,
        lr=config.lr,
        lr_schedule=config.lr_schedule,
        warmup=min(config.warmup, steps // 2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        ema=bool(config.ema),
        seed=config.seed,
        save_every=config.save_every,
        keep=config.keep,
        preview_every=config.preview_every,
        num_workers=config.num_workers,
        compile=config.compile,
        optimizer=config.optimizer,
        fused_backward=bool(config.fused_backward),
    )


def _settings_line(
    config: TrainConfig, batches: Batches, steps: int, accelerator: Accelerator, run: RunFolder
) -> str:
    precision = {"no": "fp32"}.get(str(accelerator.mixed_precision), str(accelerator.mixed_precision))
    return (
        f"{run.path}: {steps} steps of {batches.effective_batch}, {batches.steps_per_epoch} an epoch, "
        f"{config.image_size} px, lr {config.lr:g} {config.lr_schedule}, seed {config.seed}, "
        f"{accelerator.device.type} {precision}, {torch.get_num_threads()} threads"
    )


def _refuse_overlap(folder: Path, config: TrainConfig) -> None:
    """Raises SdlabError if the run or its cache would be written into the dataset, or the dataset lies in the run."""
    run, data = folder.resolve(), config.images.resolve()
    if run == data or data in run.parents or run in data.parents:
        raise SdlabError(
            f"lies in the dataset folder {config.images}, or around it",
            where=str(folder),
            next_step="Name another folder with --save-model: nothing is ever written into a dataset",
        )
    cached = (config.cache_dir or folder.parent / ".sdlab-cache").resolve()
    if cached == data or data in cached.parents:
        raise SdlabError(
            f"the cache would lie in the dataset folder {config.images}",
            where=str(cached),
            next_step="Name another folder with --cache-dir: nothing is ever written into a dataset",
        )


def _export(folder: Path, denoiser: nn.Module, save: Callable[..., None]) -> None:
    """Write the pipeline beside its place and move its parts in, the index that makes it one last."""
    staged = folder / f".export-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        save(denoiser, staged)
        checkpoint.sync_files(staged)
    except BaseException:  # passed on; half a pipeline must not stay, not even after Ctrl-C
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for part in sorted(staged.iterdir(), key=lambda p: (p.name == "model_index.json", p.name)):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    staged.rmdir()
    checkpoint.sync_folder(folder)


@contextmanager
def _accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """An Accelerator for the options' device and precision. Its state is process-wide, so it ends with the `with`."""
    device = pick_device(config.device)
    if device.type == "cuda" and ":" in config.device:
        torch.cuda.set_device(device)
    bf16 = pick_dtype(config.dtype, device) == torch.bfloat16  # a card without it trains in float32
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1
        ),  # ours; accelerate would divide again
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],  # encoding can take hours
    )
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
