"""Where the parts of a model are while pictures are made: all on the card, or only the one that works.

A part that waits has its weights in the computer's memory. They are not copied back when its work is done, since it
changes none of them: what was copied to the card is dropped, and the weights are those that never left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.inference.spec import Offload

_Pipeline = TypeVar("_Pipeline")
CPU = torch.device("cpu")
HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # diffusers' names


@dataclass(frozen=True)
class Placement:
    """Which device computes, and what of the model stays there."""

    device: torch.device
    offload: Offload = "none"

    @property
    def home(self) -> torch.device:
        """Where weights are loaded to, and where they wait."""
        return self.device if self.offload == "none" else CPU

    @contextmanager
    def using(self, module: nn.Module) -> Iterator[None]:
        """The module is on the device for the length of the `with`. What it computes with must be there too.

        Several may be used at once, and one within itself. Its weights must not be changed meanwhile, but for a
        change of number type there and back.
        """
        if self.offload == "none" or _goes_by_layers(module):
            yield
            return
        weights = [(weight, weight.data) for weight in module.parameters()]
        buffers = _buffers(module)
        try:
            for weight, data in weights:
                weight.data = _copied(data, self.device)
            for owner, name, buffer in buffers:
                owner._buffers[name] = _copied(buffer, self.device)
            yield
        finally:
            for weight, data in weights:
                weight.data = data
            for owner, name, buffer in buffers:
                owner._buffers[name] = buffer
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # Windows lends a full card slow memory instead of an error

    def settle(self, denoiser: nn.Module) -> None:
        """Call when the denoiser has all its layers: with "layers" each of them comes to the device by itself."""
        if self.offload == "layers":
            denoiser.enable_group_offload(  # type: ignore[operator]  # of diffusers
                onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
            )

    def unsettle(self, denoiser: nn.Module) -> None:
        """Call before layers of the denoiser are changed; `settle` comes after."""
        if self.offload == "layers":
            register = HookRegistry.check_if_exists_or_initialize(denoiser)
            for name in HOOKS:
                register.remove_hook(name, recurse=True)
            denoiser.to(CPU)

    def pipeline(self, kind: type[_Pipeline]) -> type[_Pipeline]:
        """A diffusers pipeline class like `kind` that makes its tensors on the device, wherever its parts wait."""
        if self.offload == "none":
            return kind
        return type(kind.__name__, (kind,), {"_execution_device": property(lambda _: self.device)})


def check_offload(offload: Offload, device: torch.device) -> None:
    """Raises SdlabError where there is no card whose memory could be spared."""
    if offload != "none" and device.type != "cuda":
        raise SdlabError(
            f"--offload {offload} spares the memory of a CUDA card, and pictures are made on {device.type} here",
            next_step="Leave it out",
        )


def _copied(data: Tensor, device: torch.device) -> Tensor:
    return data.to(device)


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """With their owners: a change of number type puts other tensors in their places."""
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def _goes_by_layers(module: nn.Module) -> bool:
    registers = [getattr(one, "_diffusers_hook", None) for one in module.modules()]
    return any(register is not None and HOOKS[0] in register.hooks for register in registers)
