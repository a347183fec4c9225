"""`fit`, the only training loop. It knows tensors, steps and a run's folder; not what a model or a picture is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdlab import show
from sdlab.dataset.batches import Batch, Batches
from sdlab.errors import ItemsFailed, OutOfResources, SdlabError, Stopped
from sdlab.keyed import Draws
from sdlab.signals import StopRequest
from sdlab.training import checkpoint
from sdlab.training.checkpoint import State
from sdlab.training.folder import RunFolder
from sdlab.training.optim import Ema, Updater, lr_at, make_optimizer, refuse_fused
from sdlab.training.report import Progress, ThreadAdvice

MAX_SKIPPED_IN_A_ROW = 3

Loss = Callable[[nn.Module, Batch, Draws], Tensor]


@dataclass(frozen=True)
class FitConfig:
    """The numbers of a run, all of them settled."""

    steps: int  # optimizer steps in all, a resumed run's earlier ones included
    lr: float
    lr_schedule: str
    warmup: int  # steps
    weight_decay: float
    max_grad_norm: float  # 0: not clipped
    ema: bool
    seed: int
    save_every: int  # steps; 0: only at the end
    keep: int  # checkpoints
    preview_every: int  # steps; 0: only at the start and the end
    num_workers: int
    compile: bool
    optimizer: str  # adamw, adamw8bit, adafactor or muon
    fused_backward: bool  # update inside backward; max_grad_norm is each tensor's then


def fit(
    module: nn.Module,
    loss_fn: Loss,
    batches: Batches,
    config: FitConfig,
    run: RunFolder,
    *,
    accelerator: Accelerator,
    stop: StopRequest,
    preview: Callable[[int], None],
    validate: Callable[[int], dict[str, float]] | None = None,
    validate_every: int = 0,
) -> Ema | None:
    """Train `module` in place from where `run` stands to `config.steps`, and return the average if one is kept.

    Every step minimises the sum of weight * loss over its samples divided by the effective batch, so that a
    sample weighs the same in a full batch and in a short one, on one process and on several.
    Every `validate_every` steps (0: never) and at the end the numbers of `validate`, which sees the weights that would
    be saved, join the step's line in the log.

    Raises Stopped after a signal, with a checkpoint saved; ItemsFailed after three non-finite steps in a row,
    with the last good state saved; SdlabError for a fused backward where it cannot work. An SdlabError of `batches`,
    `preview` or `validate`, such as of a picture that is gone, is passed on with the steps before it saved.
    """
    if config.fused_backward:
        refuse_fused(num_processes=accelerator.num_processes, accumulate=batches.accumulate)
    named = checkpoint.trainable(module)
    updater = make_optimizer(
        named, kind=config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, seed=config.seed, fused_backward=config.fused_backward,
    )  # fmt: skip
    ema = Ema(named) if config.ema else None
    state = run.restore(module, updater, ema)
    prepared: Any = accelerator.prepare_model(module)
    if (
        config.compile
    ):  # every (size, batch) is a graph of its own; past the limit torch would go on uncompiled
        torch._dynamo.config.recompile_limit = 4 * len(batches.shapes())
    forward = torch.compile(prepared, dynamic=False) if config.compile else prepared
    save = _Saver(run, module, updater, ema, config, accelerator, state)

    def shown(step: int) -> None:
        if accelerator.is_main_process:
            run.write_loss_plot()
            with save.before_errors(), _as_saved(module, ema, f"step {step}: no memory for a preview"):
                preview(step)

    if accelerator.is_main_process:
        run.open_log(state.log_bytes)
    if state.step == 0:
        shown(0)
    module.train()
    if accelerator.is_main_process:
        advice = ThreadAdvice() if accelerator.device.type == "cpu" else None
        run.progress = Progress(
            state.step, config.steps, steps_per_epoch=batches.steps_per_epoch, advice=advice
        )
    for step, parts in save.steps_of(batches):
        lr = lr_at(
            step, peak=config.lr, warmup=config.warmup, total=config.steps, schedule=config.lr_schedule
        )
        updater.begin(step, lr)
        draws = Draws(config.seed, step)
        loss = _backward(
            forward, loss_fn, parts, batches, draws, accelerator, only_finite=config.fused_backward
        )
        norm, finite = updater.end(loss)
        if ema and finite:
            ema.update(step + 1)
        save.stands_after(step + 1, finite=finite)
        done, samples = step + 1, [entry.id for chunk in batches.plan(step) for entry in chunk]
        record: dict[str, Any] = {"step": done, "epoch": batches.epoch_of(step), "lr": lr}
        record |= {"loss": loss, "grad_norm": norm} if finite else _skipped(done, samples)
        with save.before_errors():
            try:
                if validate and accelerator.is_main_process and _due(done, validate_every, of=config.steps):
                    with _as_saved(module, ema, f"step {done}: no memory to validate"):
                        record |= _finite(validate(done))
            finally:  # the step has been done, whatever becomes of its measurement
                run.log(record, num_pictures=len(samples))
        ending = _agreed(stop, accelerator)
        failed = save.skipped >= MAX_SKIPPED_IN_A_ROW
        if failed or ending or _due(done, config.save_every, of=config.steps):
            save()
        if failed:
            raise ItemsFailed(
                f"{save.skipped} steps in a row had a non-finite loss; the last good weights are saved",
                where=f"step {done}",
                next_step="Look at the pictures named above, or start another run with a lower --lr or --dtype fp32",
            )
        if ending:
            raise Stopped(
                ending, f"stopped at step {done} of {config.steps}; saved", next_step="--resume goes on"
            )
        if done < config.steps and _due(done, config.preview_every):
            shown(done)
    shown(config.steps)
    return ema


@contextmanager
def _as_saved(module: nn.Module, ema: Ema | None, lacking: str) -> Iterator[None]:
    """The module as it would be saved, not training, in the `with`; what finds no memory there is left out."""
    module.eval()
    try:
        with ema.applied() if ema else nullcontext():
            yield
    except torch.OutOfMemoryError:
        show.warn(f"{lacking} beside the training; it is left out")
    finally:
        module.train()


def _due(done: int, every: int, *, of: int = 0) -> bool:
    """Every so many steps, 0 for never, and at the last one of `of`."""
    return done == of or (bool(every) and done % every == 0)


def _finite(measured: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is not a number, as JSON has none such."""
    return {name: value if math.isfinite(value) else None for name, value in measured.items()}


def _skipped(done: int, samples: list[str]) -> dict[str, Any]:
    """What the log says of a step that was not finite; its pictures are named on stderr too."""
    names = sorted(set(samples))
    show.warn(
        f"step {done}: the loss or a gradient is not finite; step skipped. Its pictures: {', '.join(names)}"
    )
    return {"skipped": names}


def _backward(
    forward: Any,
    loss_fn: Loss,
    parts: list[Batch],
    batches: Batches,
    draws: Draws,
    accelerator: Accelerator,
    *,
    only_finite: bool,
) -> float:
    """Accumulate the gradient of a step; the mean loss of its samples over all processes.

    DDP averages gradients over processes, hence the factor: the sum over all samples is what counts.
    With `only_finite` a loss that is not finite has no backward: a fused one would change weights by it.
    """
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(parts):
        last = index == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(forward):
            batch = on_device(batch, accelerator.device)
            with accelerator.autocast():
                loss_B = loss_fn(forward, batch, draws)
            weighted = (loss_B * batch.weight_B).sum()
            if not only_finite or weighted.isfinite():
                accelerator.backward(weighted * (accelerator.num_processes / batches.effective_batch))
            total += torch.stack([weighted.detach(), batch.weight_B.sum()]).double()
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    cond = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.cond.items()}
    return Batch(batch.latents_BCHW.to(device, non_blocking=True), cond, batch.weight_B.to(device), batch.ids)


def _agreed(stop: StopRequest, accelerator: Accelerator) -> int:
    """The signal that asked for an end, agreed on by all processes: one may have got it later, or not at all."""
    if accelerator.num_processes == 1:
        return stop.signum
    signums = accelerator.gather(torch.tensor([stop.signum], device=accelerator.device))
    return int(signums.max())


class _Saver:
    """Saves where the run stands, once a step at most; only the main process writes, the others wait for it."""

    def __init__(
        self,
        run: RunFolder,
        module: nn.Module,
        updater: Updater,
        ema: Ema | None,
        config: FitConfig,
        accelerator: Accelerator,
        state: State,
    ) -> None:
        self.run, self.module, self.updater, self.ema = run, module, updater, ema
        self.config, self.accelerator = config, accelerator
        self.step, self.skipped = state.step, state.skipped_in_a_row  # steps done; the last ones not finite

    def __call__(self) -> None:
        if self.accelerator.is_main_process:
            self._write()
        self.accelerator.wait_for_everyone()

    def stands_after(self, step: int, *, finite: bool) -> None:
        """Weights, optimizer and average are those after this many steps."""
        self.step, self.skipped = step, 0 if finite else self.skipped + 1

    def steps_of(self, batches: Batches) -> Iterator[tuple[int, list[Batch]]]:
        """The steps that are left and their batches. Raises what `batches` raises, with the steps before saved."""
        left = batches.steps(self.step, self.config.steps, num_workers=self.config.num_workers)
        while True:
            with self.before_errors():
                following = next(left, None)
            if following is None:
                return
            yield following

    @contextmanager
    def before_errors(self) -> Iterator[None]:
        """Save before an SdlabError out of the `with` is passed on, which then says so.

        Between two steps only. The main process alone saves, without waiting: the others may never come.
        """
        try:
            yield
        except SdlabError as reason:
            if not self.step or not self.accelerator.is_main_process:
                raise
            self._write()
            raise _then_resume(reason, f"step {self.step} of {self.config.steps} is saved") from reason

    def _write(self) -> None:
        state = State(self.step, self.run.log_bytes(), self.skipped)
        self.run.save_checkpoint(state, self.module, self.updater, self.ema, keep=self.config.keep)


def _then_resume(reason: SdlabError, saved: str) -> SdlabError:
    """The error with what is saved, and with how to go on where it does not say so itself."""
    on = "" if "--resume" in reason.next_step else "--resume goes on"
    next_step = "; ".join(text for text in (reason.next_step, on) if text)
    kind = OutOfResources if isinstance(reason, OutOfResources) else SdlabError
    return kind(f"{reason.what}; {saved}", where=reason.where, next_step=next_step)
