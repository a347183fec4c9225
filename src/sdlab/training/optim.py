"""The optimizer as the loop sees it, the learning rate and the moving average of the weights.

An `Updater` changes the trained parameters by their gradients, in one of three ways:

    WholeAdamW      torch's fused AdamW over all float32 parameters at once
    AfterBackward   our rules (rules.py) one parameter after the other: 8-bit states, Adafactor, Muon, bf16 weights
    FusedBackward   the same rules, each as soon as backward has the parameter's gradient, which is freed at once
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import key
from sdlab.training.rules import BETAS, EPS, Change, State, rules_of

EMA_DECAY = 0.9999
_DTYPES = (torch.float32, torch.bfloat16)  # of trained weights

Named = Mapping[str, nn.Parameter]


class Updater(Protocol):
    """Changes parameters by their gradients. A step is begin, backward, end."""

    def begin(self, step: int, lr: float) -> None:
        """Call before the step's backward; steps count from 0."""

    def end(self, loss: float) -> tuple[float, bool]:
        """Call after backward. The gradient's norm before clipping, and whether all parameters were updated.

        They are not where the loss or the gradient is not finite: no parameter is touched then (FusedBackward:
        none whose own gradient is not finite). Gradients are gone afterwards.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The state by `<parameter>.<part>`, for checkpoints."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state as `tensors` gave it in place. Raises SdlabError if it is another kind of optimizer's."""


def make_optimizer(
    named: Named,
    *,
    kind: str,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    fused_backward: bool,
) -> Updater:
    """The updater of kind adamw, adamw8bit, adafactor or muon, for float32 or bf16 parameters.

    max_grad_norm 0: the gradient is not clipped.

    Bf16 parameters have no float32 copy: the update is computed in float32 and rounded stochastically, with random
    bits named by (seed, step, parameter).
    """
    plain = all(p.dtype == torch.float32 for p in named.values())
    if kind == "adamw" and plain and not fused_backward:
        return WholeAdamW(named, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    ruled = _Ruled(named, kind=kind, weight_decay=weight_decay, seed=seed)
    return (FusedBackward if fused_backward else AfterBackward)(ruled, max_grad_norm=max_grad_norm)


def refuse_fused(*, num_processes: int, accumulate: int) -> None:
    """Raises SdlabError where a fused backward cannot add up the gradients that make a step."""
    whole = "a fused backward updates a weight as soon as its gradient is there, so"
    if accumulate > 1:
        raise SdlabError(
            f"{whole} it cannot add up {accumulate} passes",
            where="--fused-backward",
            next_step="Leave out --grad-accum, or use --no-fused-backward",
        )
    if num_processes > 1:
        raise SdlabError(
            f"{whole} it cannot wait for {num_processes} processes",
            where="--fused-backward",
            next_step="Train with one process, or use --no-fused-backward",
        )


class WholeAdamW:
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel: a third of the time of the loop on a CPU.

    The kernel is fixed because fused, foreach and loop differ in the last digits. Clips the global norm.
    """

    def __init__(self, named: Named, *, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        self.named, self.max_grad_norm = named, max_grad_norm
        self.optimizer = torch.optim.AdamW(
            list(named.values()), lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True
        )

    def begin(self, step: int, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def end(self, loss: float) -> tuple[float, bool]:
        norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm or math.inf))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def tensors(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.named.items()}
        return {f"{name}.{part}": value for name, state in states.items() for part, value in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, state in _by_parameter(tensors).items():
            if name not in self.named or state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise _other_state()
            parameter = self.named[name]
            self.optimizer.state[parameter] = {
                part: value.to(parameter.device, copy=True) for part, value in state.items()
            }


class AfterBackward:
    """Our rules after the whole backward; clips the global norm."""

    def __init__(self, ruled: _Ruled, *, max_grad_norm: float) -> None:
        self.ruled, self.max_grad_norm = ruled, max_grad_norm
        self.tensors, self.load = ruled.tensors, ruled.load

    def begin(self, step: int, lr: float) -> None:
        self.ruled.step, self.ruled.lr = step, lr

    def end(self, loss: float) -> tuple[float, bool]:
        grads = {name: p.grad for name, p in self.ruled.named.items() if p.grad is not None}
        norm = _norm_of([_norm(grad) for grad in grads.values()], self.ruled.device)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            scale = _clipping(torch.tensor(norm, device=self.ruled.device), self.max_grad_norm)
            for name in grads:
                self.ruled.change(name, scale, ok=None)
        for p in self.ruled.named.values():
            p.grad = None
        return norm, finite


class FusedBackward:
    """Our rules inside backward: a parameter is updated and its gradient freed when that has been accumulated.

    The global norm is not known then, so each tensor's own gradient is clipped to `max_grad_norm`. A gradient that is
    not finite leaves its parameter as it is and the step counts as not done; a loss that is not finite must not get
    as far as backward. Nothing waits for the device before `end`.
    """

    def __init__(self, ruled: _Ruled, *, max_grad_norm: float) -> None:
        self.ruled, self.max_grad_norm = ruled, max_grad_norm
        self.tensors, self.load = ruled.tensors, ruled.load
        self.norms: dict[str, Tensor] = {}
        for name, parameter in ruled.named.items():
            hook = parameter.register_post_accumulate_grad_hook(_Arrival(self, name))  # type: ignore[no-untyped-call]
            weakref.finalize(self, hook.remove)  # the module outlives its training; the state must not

    def begin(self, step: int, lr: float) -> None:
        self.ruled.step, self.ruled.lr = step, lr
        self.norms.clear()

    def arrived(self, name: str) -> None:
        """Backward has the whole gradient of a parameter."""
        assert name not in self.norms, f"{name} got a second gradient in one step"
        grad = self.ruled.named[name].grad
        assert grad is not None
        norm = self.norms[name] = _norm(grad)
        self.ruled.change(name, _clipping(norm, self.max_grad_norm), ok=norm.isfinite())

    def end(self, loss: float) -> tuple[float, bool]:
        seen = [self.norms[name] for name in self.ruled.named if name in self.norms]
        norm = _norm_of(seen, self.ruled.device)
        return norm, math.isfinite(loss) and math.isfinite(norm)


class _Arrival:
    """The hook of one parameter. It does not keep the updater alive."""

    def __init__(self, updater: FusedBackward, name: str) -> None:
        self.updater, self.name = weakref.ref(updater), name

    def __call__(self, parameter: Tensor) -> None:
        updater = self.updater()
        assert updater is not None
        updater.arrived(self.name)


class _Ruled:
    """Parameters, each with its rule and its state."""

    def __init__(self, named: Named, *, kind: str, weight_decay: float, seed: int) -> None:
        faults = [n for n, p in named.items() if not p.is_contiguous() or p.dtype not in _DTYPES]
        assert named and not faults, faults
        self.named, self.weight_decay, self.seed = named, weight_decay, seed
        self.device = next(iter(named.values())).device
        self.rules = rules_of(kind, named, self.device)
        self.state: dict[str, State] = {n: self.rules[n].fresh(p.detach()) for n, p in named.items()}
        self.step, self.lr = 0, 0.0

    @torch.no_grad()
    def change(self, name: str, scale: Tensor, *, ok: Tensor | None) -> None:
        """Update one parameter by its gradient times `scale`, and free the gradient."""
        parameter = self.named[name]
        assert parameter.grad is not None
        change = Change(self.lr, self.weight_decay, scale, ok, self._rounding(name, parameter))
        self.rules[name].apply(parameter.detach(), parameter.grad, self.state[name], change)
        parameter.grad = None

    def _rounding(self, name: str, parameter: Tensor) -> torch.Generator | None:
        """The random bits of one parameter in one step; None where it is not rounded.

        They are the only ones drawn on the parameter's own device, not on the CPU: 4 billion of them a step would
        take longer than the step. So a run on a card has other bits than one on a CPU, and both resume exactly.
        """
        if parameter.dtype != torch.bfloat16:
            return None
        return torch.Generator(parameter.device).manual_seed(key(self.seed, "rounding", self.step, name))

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": value for name, state in self.state.items() for part, value in state.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.tensors()
        shapes = ({name: (t.shape, t.dtype) for name, t in group.items()} for group in (own, tensors))
        if next(shapes) != next(shapes):
            raise _other_state()
        for name, value in own.items():
            value.copy_(tensors[name])


def _norm(grad: Tensor) -> Tensor:
    """Norm of one gradient, () float32 on its device."""
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float32)
    return norm


def _norm_of(norms: list[Tensor], device: torch.device) -> float:
    """Norm over all gradients from theirs. The one place that waits for the device."""
    stacked = torch.stack([*norms, torch.zeros((), device=device)])
    return float(torch.linalg.vector_norm(stacked, dtype=torch.float64))


def _clipping(norm: Tensor, max_grad_norm: float) -> Tensor:
    """The factor, () float32, that brings a gradient down to the norm allowed; 0 allows any."""
    if not max_grad_norm:
        return torch.ones_like(norm)
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    """`<parameter>.<part>` taken apart again."""
    states: dict[str, State] = {}
    for name, value in tensors.items():
        parameter, _, part = name.rpartition(".")
        states.setdefault(parameter, {})[part] = value
    return states


def _other_state() -> SdlabError:
    return SdlabError(
        "the checkpoint holds another optimizer's state",
        next_step="Resume with the --optimizer, --weights and --fused-backward that the run was started with",
    )


def lr_at(step: int, *, peak: float, warmup: int, total: int, schedule: str) -> float:
    """Learning rate of a step from 0: linear rise over `warmup` steps, then constant, or down to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


class Ema:
    """Exponential moving average of the trained weights, with warm-up; float32 whatever the weights are.

    After step n (from 1) the decay is min(EMA_DECAY, (1 + n) / (10 + n)), so that a short run forgets its start.
    """

    def __init__(self, named: Named) -> None:
        self.named = named
        self.shadow: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in named.items()
        }

    def update(self, step: int) -> None:
        """Move towards the weights as they are after step `step` (from 1)."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, parameter in self.named.items():
            self.shadow[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module carries the averages inside the `with`, rounded to its type; float32 ones are not copied."""
        held = {name: parameter.data for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            parameter.data = self.shadow[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.named.items():
                parameter.data = held[name]
