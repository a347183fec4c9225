"""Training in bf16 with fp32 weights behind it, and their running average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn


class Master:
    """The fp32 weights, their average and their optimizer, of modules that compute in bf16.

    bf16 forward and backward take half of fp32's time on CPUs that have it; AdamW's small steps need fp32.
    """

    def __init__(self, modules: Sequence[nn.Module], *, lr: float, average: float, clip: float = 1.0) -> None:
        self.peak_lr, self.average, self.clip, self.step = lr, average, clip, 0
        weights = [p for module in modules for p in module.parameters()]
        self.weights = [nn.Parameter(p.detach().float().clone(), p.requires_grad) for p in weights]
        self.averaged = [p.detach().clone() for p in self.weights]
        for module in modules:
            module.to(torch.bfloat16)
        self.computing = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    def update(self, lr_factor: float) -> None:
        """Takes one step with the gradients that the modules hold, and clears them."""
        for slow, fast in zip(self.weights, self.computing, strict=True):
            slow.grad, fast.grad = (None if fast.grad is None else fast.grad.float()), None
        if torch.distributed.is_initialized():
            self._share_gradients()
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * lr_factor
        self.optimizer.step()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.weights], 1 - decay)
            self.refresh()

    def _share_gradients(self) -> None:
        """Averages the gradients over the processes that `torchrun` started."""
        gradients = [p.grad for p in self.weights if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / torch.distributed.get_world_size()
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def refresh(self) -> None:
        """Copies the fp32 weights into the modules."""
        with torch.no_grad():
            for slow, fast in zip(self.weights, self.computing, strict=True):
                fast.copy_(slow)

    def state(self) -> dict[str, object]:
        """Everything that going on needs."""
        weights: list[Tensor] = [p.detach() for p in self.weights]
        optimizer = self.optimizer.state_dict()
        return {"step": self.step, "weights": weights, "averaged": self.averaged, "optimizer": optimizer}

    def restore(self, state: dict[str, object]) -> None:
        """Takes up a state that `state` gave."""
        self.step = int(state["step"])  # type: ignore[call-overload]
        with torch.no_grad():
            for mine, kept in ((self.weights, state["weights"]), (self.averaged, state["averaged"])):
                for p, saved in zip(mine, kept, strict=True):  # type: ignore[call-overload]
                    p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.refresh()


def put(weights: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """Copies a list of weights, in the order of `Master`, into modules."""
    own = [p for module in modules for p in module.parameters()]
    with torch.no_grad():
        for p, kept in zip(own, weights, strict=True):
            p.copy_(kept)
