"""`Master` with Muon for the blocks' matrices: a momentum step whose singular values are all made about one.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import torch
from master import Master
from torch import Tensor, nn


def orthogonalised(matrix: Tensor, *, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values of about one (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class MuonMaster(Master):
    """As `Master`; matrices inside blocks take Muon's steps, all else AdamW's."""

    def __init__(self, model: nn.Module, *, lr: float, muon_lr: float, average: float) -> None:
        names = [name for name, _ in model.named_parameters()]
        super().__init__([model], lr=lr, average=average)
        self.muon_lr, self.momentum = muon_lr, 0.95
        pairs = list(zip(names, self.weights, strict=True))
        in_muon = [muon_lr > 0 and "_blocks." in name and weight.ndim == 2 for name, weight in pairs]
        self.matrices = [pair for pair, muon in zip(pairs, in_muon, strict=True) if muon]
        self.motion = [torch.zeros_like(weight) for _, weight in self.matrices]
        others = [weight for (_, weight), muon in zip(pairs, in_muon, strict=True) if not muon]
        self.optimizer = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    def update(self, lr_factor: float) -> None:
        """Takes one step with the gradients that the module holds, and clears them."""
        self.lr_factor = lr_factor
        super().update(lr_factor)

    @torch.no_grad()
    def refresh(self) -> None:
        """Muon's part of the step, where there are gradients; copies the weights into the module."""
        if self.matrices[:1] and self.matrices[0][1].grad is not None:
            steps = self._steps()
            if torch.distributed.is_initialized():  # each process has made its share of the steps
                flat = torch.cat([step.flatten() for step in steps])
                torch.distributed.all_reduce(flat)
                parts = flat.split([step.numel() for step in steps])
                steps = [part.view_as(step) for part, step in zip(parts, steps, strict=True)]
            for (_, weight), step in zip(self.matrices, steps, strict=True):
                weight.sub_(step, alpha=self.muon_lr * self.lr_factor)
                weight.grad = None
        super().refresh()

    def _steps(self) -> list[Tensor]:
        """The matrices' steps before the learning rate, zeros for those that are another process's share."""
        shared = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
        made = []
        for i, ((name, weight), motion) in enumerate(zip(self.matrices, self.motion, strict=True)):
            motion.lerp_(weight.grad, 1 - self.momentum)
            if i % world != rank:
                made.append(torch.zeros_like(weight))
                continue
            step, width = weight.grad.lerp(motion, self.momentum), weight.shape[1]
            sizes = [width] * 3 + [weight.shape[0] - 3 * width] if "to_qkv" in name else [weight.shape[0]]
            parts = step.split(sizes)
            made.append(
                torch.cat([orthogonalised(p) * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 for p in parts])
            )
        return made

    def state(self) -> dict[str, object]:
        """Everything that going on needs."""
        return {**super().state(), "motion": self.motion}

    def restore(self, state: dict[str, object]) -> None:
        """Takes up a state that `state` gave."""
        super().restore(state)
        for mine, kept in zip(self.motion, state["motion"], strict=True):  # type: ignore[call-overload]
            mine.copy_(kept)
