"""How one parameter changes by its gradient: AdamW, also with 8-bit moments, Adafactor, Muon; float32 or bf16 weights.

All arithmetic is float32, CHUNK elements at a time, so that a tensor of 340 million weights (FLUX.2 dev has such)
needs no float32 copies of itself; Muon alone takes a matrix as a whole, as it must. A state is plain tensors by name.
Nothing here waits for the device: whether a gradient is finite stays a tensor, `Change.ok`.

Shapes: N elements of a parameter, K blocks of BLOCK elements, R rows, C columns; () a number on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sdlab.training.muon import MOMENTUM, is_block_matrix, muon_step, rows_of

CHUNK = (
    1 << 23
)  # elements; a multiple of BLOCK. 32 MiB in float32, so that most temporaries stay in a card's cache
BLOCK = 256  # elements that share a scale in 8-bit states
SMALL = (
    4096  # tensors with fewer elements keep float32 moments: they are few bytes, and often the delicate ones
)

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
DECAY, EPS_SQUARE, MAX_RMS = 0.8, 1e-30, 1.0  # of Adafactor: its section 7.2, epsilon 1 and d

State = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What one step does to one parameter, besides its gradient."""

    lr: float
    weight_decay: float
    scale: Tensor  # (), the gradient is multiplied by it
    ok: (
        Tensor | None
    )  # () bool, False leaves parameter and state as they are; None where it is known to be True
    rounding: torch.Generator | None  # draws the random bits of bf16 weights, on their device


class Rule(Protocol):
    """A kind of optimizer."""

    def fresh(self, weight: Tensor) -> State:
        """The state of a parameter before its first step."""

    def apply(self, weight: Tensor, grad: Tensor, state: State, change: Change) -> None:
        """Change a contiguous weight and its state in place."""


def rule_of(kind: str, device: torch.device) -> Rule:
    """The rule called adamw, adamw8bit or adafactor, for parameters on `device`."""
    if kind == "adafactor":
        return Adafactor()
    assert kind in ("adamw", "adamw8bit"), kind
    return AdamW(codes=(Code.of(True, device), Code.of(False, device)) if kind == "adamw8bit" else None)


def rules_of(kind: str, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Rule]:
    """The rule of each parameter: with muon its own for matrices inside blocks, and AdamW for all others."""
    if kind != "muon":
        return dict.fromkeys(weights, rule_of(kind, device))
    others = rule_of("adamw", device)
    return {
        name: Muon(rows_of(name, weight)) if is_block_matrix(name, weight) else others
        for name, weight in weights.items()
    }


def put(target: Tensor, value: Tensor, change: Change) -> None:
    """Store float32 or uint8 values in place unless the change is not ok; bf16 targets are rounded stochastically."""
    if target.dtype == torch.bfloat16:
        assert change.rounding is not None
        value = rounded_bf16(value, change.rounding)
    target.copy_(value if change.ok is None else torch.where(change.ok, value, target))


def rounded_bf16(value_N: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 values as bf16, up or down with the chance that makes the mean exact.

    Rounding to nearest would lose every update below 2^-9 of its weight: with lr 1e-5 almost all of them. The 16 bits
    that bf16 has not are a fraction; a random 16-bit number is added and the carry decides.
    """
    bits_N = torch.randint(
        0, 1 << 16, value_N.shape, dtype=torch.int32, device=value_N.device, generator=generator
    )
    bits_N.add_(value_N.view(torch.int32)).bitwise_and_(-1 << 16)
    result_N = bits_N.view(torch.float32).to(torch.bfloat16)
    # A carry turns a card's NaN, all ones, into zero; a NaN must stay one, so that it is never saved as a weight.
    return result_N.masked_fill_(value_N.isnan(), math.nan)


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with float32 moments, or with 8-bit ones (Dettmers et al. 2022).

    State: step (), and exp_avg, exp_avg_sq in the weight's shape, or of each of the two codes (N,) and scales (K,).
    """

    codes: tuple[Code, Code] | None  # of the mean and of the mean square

    def fresh(self, weight: Tensor) -> State:
        """All zero."""
        count, device = weight.numel(), weight.device
        state = {"step": torch.zeros((), device=device)}
        for name in ("exp_avg", "exp_avg_sq"):
            if self.codes is None or count < SMALL:
                state[name] = torch.zeros(weight.shape, device=device)
            else:
                state[f"{name}_codes"] = torch.zeros(count, dtype=torch.uint8, device=device)
                state[f"{name}_scales"] = torch.zeros(-(-count // BLOCK), device=device)
        return state

    def apply(self, weight: Tensor, grad: Tensor, state: State, change: Change) -> None:
        """One step; a state rounded to 8 bits is used as it was before rounding."""
        count = state["step"] + 1
        known = [-torch.expm1(count.double() * math.log(beta)) for beta in BETAS]  # 1 - beta^count, exactly
        weight_N, grad_N = weight.view(-1), grad.reshape(-1)
        for part in _parts(len(weight_N), CHUNK):
            grad_part = grad_N[part].float() * change.scale
            mean = torch.lerp(self._read(state, "exp_avg", part), grad_part, 1 - BETAS[0])
            square = self._read(state, "exp_avg_sq", part) * BETAS[1]
            square.addcmul_(grad_part, grad_part, value=1 - BETAS[1])
            step = (square / known[1]).sqrt_().add_(EPS).reciprocal_().mul_(mean).div_(known[0])
            old = weight_N[part].float()
            put(weight_N[part], old * (1 - change.lr * change.weight_decay) - change.lr * step, change)
            self._write(state, "exp_avg", part, mean, change)
            self._write(state, "exp_avg_sq", part, square, change)
        put(state["step"], count, change)

    def _read(self, state: State, name: str, part: slice) -> Tensor:
        if name in state:
            return state[name].view(-1)[part]
        codes_N, scales_K = state[f"{name}_codes"][part], state[f"{name}_scales"][_blocks(part)]
        return self._code(name).decode(codes_N, scales_K)

    def _write(self, state: State, name: str, part: slice, value: Tensor, change: Change) -> None:
        if name in state:
            put(state[name].view(-1)[part], value, change)
            return
        codes_N, scales_K = self._code(name).encode(value)
        put(state[f"{name}_codes"][part], codes_N, change)
        put(state[f"{name}_scales"][_blocks(part)], scales_K, change)

    def _code(self, name: str) -> Code:
        assert self.codes is not None
        return self.codes[name == "exp_avg_sq"]


@dataclass(frozen=True)
class Code:
    """256 numbers in [-1, 1] or [0, 1] that 8-bit states are made of, and the limits between them.

    The dynamic tree of Dettmers et al. 2022, section 1.3, as a table: seven decades, the upper ones cut finer (1, 2,
    4 … 64 equal intervals from 10^-7 up to 1; twice as many without a sign), each interval standing for its middle;
    and 0 and 1.
    """

    values_256: Tensor  # rising
    limits_255: Tensor
    signed: bool

    @classmethod
    def of(cls, signed: bool, device: torch.device) -> Code:
        """The table, on a device."""
        values = [0.0, 1.0]
        for decade in range(7):
            count = 2 ** (decade if signed else decade + 1)
            middles = [0.1 + 0.9 * (i + 0.5) / count for i in range(count)]
            positive = [middle * 10.0 ** (decade - 6) for middle in middles]
            values += [*positive, *[-value for value in positive]] if signed else positive
        values_256 = torch.tensor(sorted(values), dtype=torch.float32)
        return cls(values_256.to(device), ((values_256[1:] + values_256[:-1]) / 2).to(device), signed)

    def encode(self, value_N: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N,) uint8 of the nearest numbers, and each block's scale (K,), its largest magnitude.

        Without a sign nothing but zero becomes zero: a mean square of zero under a mean that is not would be a step
        of any length.
        """
        value_KB = nn.functional.pad(value_N, (0, -len(value_N) % BLOCK)).view(-1, BLOCK)
        scales_K = value_KB.abs().amax(1)
        ratio_KB = value_KB / scales_K.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes_KB = torch.bucketize(ratio_KB, self.limits_255, out_int32=True).to(torch.uint8)
        if not self.signed:
            codes_KB = torch.maximum(codes_KB, (value_KB > 0).to(torch.uint8))
        return codes_KB.view(-1)[: len(value_N)], scales_K

    def decode(self, codes_N: Tensor, scales_K: Tensor) -> Tensor:
        """The numbers (N,) float32 that codes and scales stand for."""
        count = len(codes_N)
        values_N = self.values_256.index_select(0, codes_N.int())
        values_KB = nn.functional.pad(values_N, (0, -count % BLOCK)).view(-1, BLOCK)
        return (values_KB * scales_K[:, None]).view(-1)[:count]


class Adafactor:
    """Adafactor (Shazeer & Stern 2018): the mean square of a matrix from its rows' and its columns' only.

    Its choices: no momentum; the lr is the given one, neither relative to the step nor to the weights' size; updates
    clipped to a root mean square of 1; the decay rises with the step, 1 - t^-0.8. More than two dimensions count as
    rows (the first) and columns (the rest); vectors are not factored.

    State: step (), and rows (R,), columns (C,), or of a vector exp_avg_sq (N,).
    """

    def fresh(self, weight: Tensor) -> State:
        """All zero."""
        state = {"step": torch.zeros((), device=weight.device)}
        if weight.ndim < 2:
            return state | {"exp_avg_sq": torch.zeros(weight.shape, device=weight.device)}
        rows_R = torch.zeros(len(weight), device=weight.device)
        columns_C = torch.zeros(weight[0].numel(), device=weight.device)
        return state | {"rows": rows_R, "columns": columns_C}

    def apply(self, weight: Tensor, grad: Tensor, state: State, change: Change) -> None:
        """One step in three passes over the gradient: mean squares, size of the update, update."""
        count = state["step"] + 1
        share = count.double().pow(-DECAY).float()  # of this step in the running means
        matrix = weight.ndim >= 2
        weight_RC = weight.view(len(weight), -1) if matrix else weight.view(1, -1)
        grad_RC = grad.reshape(weight_RC.shape)
        parts = list(_parts(len(weight_RC), max(1, CHUNK // max(1, weight_RC.shape[1]))))
        if matrix:
            factors = self._factors(grad_RC, state, share, parts, change)
        else:
            square_N = (grad.float() * change.scale).square_().add_(EPS_SQUARE)
            square_N = torch.lerp(state["exp_avg_sq"], square_N, share)
            put(state["exp_avg_sq"], square_N, change)
            factors = torch.ones(1, device=weight.device), square_N.view(-1).rsqrt()

        def update(part: slice) -> Tensor:
            return (grad_RC[part].float() * change.scale).mul_(factors[0][part, None]).mul_(factors[1])

        total = torch.zeros((), device=weight.device)
        for part in parts:
            total = total + update(part).square_().sum()
        shorten = change.lr / (total / weight.numel()).sqrt().div(MAX_RMS).clamp(min=1.0)
        for part in parts:
            old = weight_RC[part].float()
            put(
                weight_RC[part],
                old * (1 - change.lr * change.weight_decay) - update(part) * shorten,
                change,
            )
        put(state["step"], count, change)

    def _factors(
        self, grad_RC: Tensor, state: State, share: Tensor, parts: list[slice], change: Change
    ) -> tuple[Tensor, Tensor]:
        """Brings the running means up to date; factors (R,) and (C,) whose product is 1 / root of the mean square."""
        rows_R = torch.empty_like(state["rows"])
        columns_C = torch.zeros_like(state["columns"])
        for part in parts:
            square_RC = (grad_RC[part].float() * change.scale).square_().add_(EPS_SQUARE)
            rows_R[part] = square_RC.mean(1)
            columns_C += square_RC.sum(0)
        rows_R = torch.lerp(state["rows"], rows_R, share)
        columns_C = torch.lerp(state["columns"], columns_C / len(rows_R), share)
        put(state["rows"], rows_R, change)
        put(state["columns"], columns_C, change)
        return (rows_R / rows_R.mean()).rsqrt(), columns_C.rsqrt()


@dataclass(frozen=True)
class Muon:
    """Muon with Nesterov momentum, and AdamW's weight decay and size of steps (muon.py). For matrices.

    State: momentum (R, C).
    """

    rows: tuple[int, ...]  # of each matrix that the weight stacks

    def fresh(self, weight: Tensor) -> State:
        """All zero."""
        return {"momentum": torch.zeros(weight.shape, device=weight.device)}

    def apply(self, weight: Tensor, grad: Tensor, state: State, change: Change) -> None:
        """One step."""
        grad_RC = grad.float() * change.scale
        momentum_RC = torch.lerp(state["momentum"], grad_RC, 1 - MOMENTUM)
        step_RC = muon_step(torch.lerp(grad_RC, momentum_RC, MOMENTUM), self.rows)
        old = weight.float()
        put(weight, old * (1 - change.lr * change.weight_decay) - change.lr * step_RC, change)
        put(state["momentum"], momentum_RC, change)


def state_bytes(kind: str, weight: Tensor, name: str = "") -> int:
    """Bytes of a parameter's state, besides the count of its steps."""
    shaped = torch.empty(weight.shape, device="meta")
    state = rules_of(kind, {name: shaped}, torch.device("meta"))[name].fresh(shaped)
    return sum(tensor.nbytes for name, tensor in state.items() if name != "step")


def _parts(count: int, size: int) -> Iterator[slice]:
    """range(count) cut into slices of `size`, the last may be shorter."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _blocks(part: slice) -> slice:
    """The blocks that a part's elements belong to."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
