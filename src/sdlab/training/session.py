"""What every training run does, whatever is trained: lock, record, check, fit, save, and say how it went.

in_session(config, folder, command="train-…", work=work)      the folder is locked, the devices are ready
    work(session)                                             a trainer reads its data and loads its module
        carry_out(session, Job(module, loss, batches, …))     the run, to its result in the folder
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from sdlab import show
from sdlab.dataset.batches import Batches
from sdlab.dataset.cache import Cache
from sdlab.dataset.report import num_of
from sdlab.errors import ItemsFailed, SdlabError, Stopped
from sdlab.models.memory import pick_device, pick_dtype
from sdlab.models.trial import in_words, num_weights
from sdlab.options import as_json
from sdlab.signals import StopRequest, stop_on_signals
from sdlab.training import checkpoint
from sdlab.training.config import RunConfig
from sdlab.training.folder import RunFolder
from sdlab.training.loop import FitConfig, Loss, fit
from sdlab.training.optim import refuse_fused
from sdlab.training.record import Dataset, check_unchanged, facts_of, now

Config_co = TypeVar("Config_co", bound=RunConfig, covariant=True)
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Session(Generic[Config_co]):
    """A run under way in this process: its settled options, its folder and what it computes with."""

    config: Config_co
    run: RunFolder
    accelerator: Accelerator
    stop: StopRequest

    @property
    def is_main(self) -> bool:
        """True in the process that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32

    @property
    def store(self) -> Cache:
        """The cache of the run."""
        return Cache(cache_folder(self.config, self.run.path))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained and what becomes of it: all that differs from one kind of training to another."""

    module: nn.Module  # as loaded, requires_grad on what is trained
    loss: Loss
    batches: Batches
    dataset: Dataset
    facts: Mapping[str, Any]  # for run.json: "objective", which a continued run must agree with, and more
    preview: Callable[[int], None]
    save: Callable[[nn.Module, Path], Mapping[str, Any]]  # into a new folder; returns facts for run.json
    result_bytes: int  # of what `save` writes
    result: str  # for the last line: "the model is tuned/a"
    next_step: str = ""  # what to type then
    note: str = ""  # a line before the first step
    validate: Callable[[int], dict[str, float]] | None = None  # see fit
    validate_every: int = 0  # steps


def in_session(
    config: Config,
    folder: Path,
    *,
    command: str,
    work: Callable[[Session[Config]], None],
    idle_weights: bool = False,
) -> None:
    """Call `work` with the run's folder locked and its state recorded, whatever comes of it.

    A finished run that is to be resumed is left alone. Raises what `work` raises: after Stopped and ItemsFailed the
    record says so; after another SdlabError before the first step nothing is left of the run. `idle_weights` says that
    some trained weights have no gradient in some steps, which several processes must know.
    """
    run = RunFolder(folder)
    with _accelerated(config, idle_weights) as accelerator, stop_on_signals() as stop:
        if config.resume and (run.recorded() or {}).get("state") == "finished":
            show.note(f"{run.path} is finished; nothing to resume")
            return
        main = accelerator.is_main_process
        with run.locked() if main else nullcontext():
            if main:
                _prepare(run, config, command)
            accelerator.wait_for_everyone()
            try:
                if config.fused_backward:
                    refuse_fused(num_processes=accelerator.num_processes, accumulate=config.grad_accum)
                work(Session(config, run, accelerator, stop))
            except (Stopped, ItemsFailed) as reason:
                # a finished run that --overwrite has not replaced yet stays what it is
                if main and (run.has_recorded or config.resume) and run.recorded():
                    run.record(state="stopped" if isinstance(reason, Stopped) else "failed")
                raise
            except SdlabError:
                if main and not run.began():
                    (run.path / "run.json").unlink(missing_ok=True)  # refused: nothing came of it
                raise
            finally:
                run.close()


def carry_out(session: Session[RunConfig], job: Job) -> None:
    """Train `job` from where the run stands to its end, and leave the result in the run's folder.

    Raises SdlabError where the disk is too small or the run began otherwise; what `fit` raises.
    """
    config, run, accelerator = session.config, session.run, session.accelerator
    module, steps = job.module, num_steps(config, job.batches)
    if config.grad_checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    facts = {**facts_of(config, job.dataset, module, accelerator, steps), **job.facts}
    if session.is_main:
        state = checkpoint.size_bytes(module, optimizer=config.optimizer or "adamw", ema=bool(config.ema))
        run.check_space(int(((config.keep + 1) * state + job.result_bytes) * 1.05))
        if config.overwrite:
            run.clear()  # only now, when nothing is left that could refuse the new run
        check_unchanged(run, facts, job.dataset.listing)
        run.record(**facts, state="running", started=now())
        if job.note:
            show.note(job.note)
        show.note(_settings_line(config, job.batches, steps, accelerator, run, module))
    accelerator.wait_for_everyone()  # the others read the folder only when it is what it will be
    began = time.monotonic()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what encoded is gone; what is recorded is the training's peak
    ema = fit(
        module,
        job.loss,
        job.batches,
        _fit_config(config, steps),
        run,
        accelerator=accelerator,
        stop=session.stop,
        preview=job.preview,
        validate=job.validate,
        validate_every=job.validate_every,
    )
    if session.is_main:
        run.close()
        plain = accelerator.unwrap_model(module, keep_fp32_wrapper=False).eval()
        with ema.applied() if ema else nullcontext():
            said = _export(run.path, plain, job.save)
        _finish(run, job, steps, said, seconds=time.monotonic() - began)


def num_steps(config: RunConfig, batches: Batches) -> int:
    """The optimizer steps of a run, by --steps or --epoch."""
    return config.steps or (config.epoch or 1) * batches.steps_per_epoch


def _finish(run: RunFolder, job: Job, steps: int, said: Mapping[str, Any], *, seconds: float) -> None:
    """Record and tell the end."""
    run.record(
        **said,
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
    show.note(f"trained {steps} steps in {seconds:.0f} s; {job.result}, previews in {run.path / 'samples'}")
    if job.next_step:
        show.note(job.next_step)


def cache_folder(config: RunConfig, folder: Path) -> Path:
    """Where what is known of the pictures is kept."""
    return config.cache_dir or folder.parent / ".sdlab-cache"


def refuse_overlap(folder: Path, config: RunConfig) -> None:
    """Raises SdlabError if the run or its cache would be written into the dataset, or the dataset lies in the run."""
    run, data = folder.resolve(), config.images.resolve()
    if run == data or data in run.parents or run in data.parents:
        raise SdlabError(
            f"lies in the dataset folder {config.images}, or around it",
            where=str(folder),
            next_step="Name another folder with --save-model: nothing is ever written into a dataset",
        )
    cached = cache_folder(config, folder).resolve()
    if cached == data or data in cached.parents:
        raise SdlabError(
            f"the cache would lie in the dataset folder {config.images}",
            where=str(cached),
            next_step="Name another folder with --cache-dir: nothing is ever written into a dataset",
        )


def _prepare(run: RunFolder, config: RunConfig, command: str) -> None:
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


def _fit_config(config: RunConfig, steps: int) -> FitConfig:
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
    config: RunConfig,
    batches: Batches,
    steps: int,
    accelerator: Accelerator,
    run: RunFolder,
    module: nn.Module,
) -> str:
    precision = {"no": "fp32"}.get(str(accelerator.mixed_precision), str(accelerator.mixed_precision))
    return (
        f"{run.path}: {in_words(num_weights(module))}, {num_of(steps, 'step')} of {batches.effective_batch}, "
        f"{batches.steps_per_epoch} an epoch, "
        f"{config.image_size} px, lr {config.lr:g} {config.lr_schedule}, seed {config.seed}, "
        f"{accelerator.device.type} {precision}, {torch.get_num_threads()} threads"
    )


def _export(
    folder: Path, module: nn.Module, save: Callable[[nn.Module, Path], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Write the result beside its place and move its parts in, what makes the folder a model last.

    That is model_index.json of a pipeline and config.json of a captioner: before them come all weights.
    """
    staged = folder / f".export-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        facts = save(module, staged)
        checkpoint.sync_files(staged)
    except BaseException:  # passed on; half a result must not stay, not even after Ctrl-C
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for part in sorted(
        staged.iterdir(), key=lambda p: (p.name == "model_index.json", p.name == "config.json", p.name)
    ):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    staged.rmdir()
    checkpoint.sync_folder(folder)
    return facts


@contextmanager
def _accelerated(config: RunConfig, idle_weights: bool) -> Iterator[Accelerator]:
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
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=7)),  # encoding can take hours
            DistributedDataParallelKwargs(find_unused_parameters=idle_weights),
        ],
    )
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
