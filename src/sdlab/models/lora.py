"""LoRA (Hu et al. 2021): W x + B A x, two thin matrices beside each weight that is adapted.

Training adds them here and writes them under the names that diffusers uses; `apply_loras` reads what others wrote
too: diffusers and PEFT, kohya (``lora_unet_…``, ``.alpha``), Black Forest Labs' and ComfyUI's names. A file comes
from anywhere, so every tensor must find its place and fit it, or nothing is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import keyed
from sdlab.models.files import Stored, read_header, write_safetensors
from sdlab.models.lora_family import family_of
from sdlab.models.lora_files import Adapter, parse_lora, read_lora
from sdlab.models.lora_names import names_of
from sdlab.models.parts import Part, build
from sdlab.models.runs import LORA_FILE

__all__ = [
    "LORA_FILE",
    "Lora",
    "add_lora",
    "apply_loras",
    "check_loras",
    "parse_lora",
    "take_off",
    "targets",
    "write_lora",
]

ADAPTER = "default"
ADAPTED = ("transformer", "unet", "text_encoder")  # networks of a pipeline that LoRAs are made for


@dataclass(frozen=True)
class Adaptable:
    """What is adapted of a class of denoisers, and how many layers that must be."""

    prefix: str  # of its names in a file, and its place in a pipeline
    layers: re.Pattern[str]
    count: Callable[[Any], int]


# All linear layers of the blocks. Those that serve all blocks (modulation, embedders) stay as they are: other
# programs have no common names for them.
ADAPTABLE = {
    "Flux2Transformer2DModel": Adaptable(
        "transformer",
        re.compile(
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|ff(_context)?\.linear_(in|out))"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        ),
        lambda model: 12 * len(model.transformer_blocks) + 2 * len(model.single_transformer_blocks),
    ),
    "UNet2DConditionModel": Adaptable(
        "unet",
        re.compile(r".+\.transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"),
        lambda model: 10 * sum(type(m).__name__ == "BasicTransformerBlock" for m in model.modules()),
    ),
}


@dataclass(frozen=True)
class Lora:
    """What was added to a denoiser."""

    rank: int
    alpha: float
    num_layers: int
    num_parameters: int

    @property
    def scale(self) -> float:
        """How many times B A x counts."""
        return self.alpha / self.rank

    def as_line(self) -> str:
        """``LoRA of rank 16 on 100 layers, 24.1 M weights, scale 1``."""
        size = (
            f"{self.num_parameters / 1e6:.1f} M" if self.num_parameters >= 1e6 else f"{self.num_parameters:,}"
        )
        return f"LoRA of rank {self.rank} on {self.num_layers} layers, {size} weights, scale {self.scale:g}"


def targets(denoiser: nn.Module) -> list[str]:
    """Names of the layers that a LoRA is trained for; a model of another make than we know is our own fault."""
    about = ADAPTABLE[type(denoiser).__name__]
    names = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and about.layers.fullmatch(name)
    ]
    assert len(names) == about.count(denoiser) > 0, (len(names), about.count(denoiser))
    return names


def add_lora(denoiser: nn.Module, *, rank: int, alpha: float, seed: int) -> Lora:
    """Freeze the denoiser and put a trainable float32 LoRA beside each of its `targets`, in place.

    A is drawn uniformly within 1/sqrt(in), named by seed and layer; B is zero, so that nothing changes yet.
    """
    names = targets(denoiser)
    denoiser.requires_grad_(False)
    layers = _inject(denoiser, dict.fromkeys(names, rank), alpha=alpha)
    for name, layer in layers.items():
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        device, (_, width) = down.weight.device, down.weight.shape
        unit_RI = torch.rand((rank, width), generator=keyed(seed, "lora", name))
        down.weight.data = ((2 * unit_RI - 1) / math.sqrt(width)).to(device)
        up.weight.data = torch.zeros(up.weight.shape, dtype=torch.float32, device=device)
    weights = [p for p in denoiser.parameters() if p.requires_grad]
    assert len(weights) == 2 * len(names)
    return Lora(rank, alpha, len(names), sum(p.numel() for p in weights))


def _inject(module: nn.Module, ranks: Mapping[str, int], *, alpha: float | None = None) -> dict[str, Any]:
    """PEFT layers of the given ranks around the named ones, by name; scale alpha/rank, or 1 without alpha."""
    from peft import LoraConfig, inject_adapter_in_model

    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    first = next(iter(ranks.values()))
    config = LoraConfig(
        r=first,
        lora_alpha=first if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT only divides it
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern=exact,
        alpha_pattern=dict(exact) if alpha is None else {},
        lora_dropout=0.0,
    )
    inject_adapter_in_model(config, module, ADAPTER)
    return {name: module.get_submodule(name) for name in ranks}


def write_lora(
    denoiser: nn.Module, path: Path, *, rank: int, alpha: float, metadata: Mapping[str, str]
) -> None:
    """Write the LoRA that training added to `denoiser`, in the number type of the weights beside it.

    alpha/rank is multiplied into B: diffusers keeps a scale in the file's header only, other programs never look
    there, so only a file whose scale is 1 means the same everywhere.
    """
    prefix = ADAPTABLE[type(denoiser).__name__].prefix
    tensors = {}
    for name, layer in denoiser.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        dtype = layer.get_base_layer().weight.dtype
        for half, scale in (("lora_A", 1.0), ("lora_B", alpha / rank)):
            tensor = (getattr(layer, half)[ADAPTER].weight.detach() * scale).to("cpu", dtype).contiguous()
            key = f"{prefix}.{name}.{half}.weight"
            tensors[key] = Stored.of(key, tensor, path)
    assert tensors, "no LoRA was added to this module"
    write_safetensors(path, tensors, metadata=metadata)


def apply_loras(pipeline: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Make a diffusers pipeline count `weight` times each LoRA, beside its weights, which stay as they are.

    Raises SdlabError, naming file and layer, where a file is not a LoRA or not of this model; then the pipeline
    is unchanged. The weights are not merged: in bfloat16 most of a LoRA would be rounded away.
    """
    parts = {name: getattr(pipeline, name, None) for name in ADAPTED}
    modules = _adapted({name: _inner(part) for name, part in parts.items() if isinstance(part, nn.Module)})
    gathered = _gathered(modules, loras)
    for part, module in modules.items():
        together = {
            layer: (torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1))
            for (where, layer), pairs in gathered.items()
            if where == part
        }
        if together:
            _put(module, together)


def check_loras(networks: Iterable[Part], loras: Sequence[tuple[Path, float]]) -> None:
    """Raise the SdlabError that `apply_loras` would raise, before a weight of the model or of a LoRA is read.

    By names and shapes alone: numbers that are not finite are found when they are read.
    """
    if loras:
        _gathered(adaptable(networks), loras, shapes_only=True)


def gather(
    networks: Iterable[Part], loras: Sequence[tuple[Path, float]]
) -> dict[tuple[str, str], list[tuple[Tensor, Tensor]]]:
    """(A, B) of every LoRA by (network, layer), float32, scale and weight in B. Raises as `apply_loras` does."""
    return _gathered(adaptable(networks), loras)


def adaptable(networks: Iterable[Part]) -> dict[str, nn.Module]:
    """Those of a model's networks that a LoRA can be of, without memory, by name."""
    return _adapted({part.name: build(part) for part in networks if part.name in ADAPTED})


def _adapted(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a model's networks that a LoRA can be of: FLUX.2's text encoder is nobody's, and may be cut short."""
    return {name: m for name, m in modules.items() if name != "text_encoder" or "transformer" not in modules}


def _gathered(
    modules: Mapping[str, nn.Module], loras: Sequence[tuple[Path, float]], *, shapes_only: bool = False
) -> dict[tuple[str, str], list[tuple[Tensor, Tensor]]]:
    """A and weighted B of every LoRA, by network and layer. Raises SdlabError where one has no place there."""
    gathered: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    places = {name: names_of(module) for name, module in modules.items()}
    for path, weight in loras:
        for fit in _shaped(read_lora(path, places, shapes_only=shapes_only), modules, path):
            pair = (fit.down, fit.up * fit.scale * weight)
            gathered.setdefault((fit.part, fit.layer), []).append(pair)
    return gathered


def _put(module: nn.Module, together: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    training = module.training
    for name, layer in _inject(module, {n: len(down) for n, (down, _) in together.items()}).items():
        down, up = together[name]
        with torch.no_grad():
            layer.lora_A[ADAPTER].weight.copy_(down)
            layer.lora_B[ADAPTER].weight.copy_(up)
    module.requires_grad_(False).train(training)


def take_off(pipeline: Any) -> None:
    """Undo `apply_loras`: every layer that it wrapped is the very module again that was there before."""
    for name in ADAPTED:
        part = getattr(pipeline, name, None)
        if isinstance(part, nn.Module):
            _take_out(_inner(part))


def _take_out(module: nn.Module) -> None:
    wrapped = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in wrapped.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, layer.get_base_layer())
    if wrapped:
        del module.peft_config  # inject_adapter_in_model left it there


def _inner(module: nn.Module) -> nn.Module:
    """The network itself where torch.compile has put another module around it."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def _shaped(adapters: Sequence[Adapter], modules: Mapping[str, nn.Module], path: Path) -> list[Adapter]:
    """All of a file's adapters as `shaped` has them. SdlabError, saying how many fit, where one does not."""
    pairs = [(adapter, modules[adapter.part].get_submodule(adapter.layer)) for adapter in adapters]
    wrong = [(adapter, layer) for adapter, layer in pairs if not _has_size_of(adapter, layer)]
    if wrong:
        raise _of_another_size(*wrong[0], path, f"{len(pairs) - len(wrong)} of its {len(pairs)} layers fit")
    return [shaped(adapter, layer, path) for adapter, layer in pairs]


def shaped(adapter: Adapter, layer: nn.Module, path: Path) -> Adapter:
    """The adapter with both halves in the shapes that `layer`'s own LoRA has. SdlabError for those of another size."""
    if not _has_size_of(adapter, layer):
        raise _of_another_size(adapter, layer, path, "one layer does not fit")
    down, up = _shapes(adapter.rank, layer)
    return replace(adapter, down=adapter.down.reshape(down), up=adapter.up.reshape(up))


def _shapes(rank: int, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    return (rank, *shape[1:]), (shape[0], rank, *([1] * (len(shape) - 2)))


def _has_size_of(adapter: Adapter, layer: nn.Module) -> bool:
    down, up = _shapes(adapter.rank, layer)
    return (adapter.down.numel(), adapter.up.numel()) == (math.prod(down), math.prod(up))


def _of_another_size(adapter: Adapter, layer: nn.Module, path: Path, how_many: str) -> SdlabError:
    there, here = tuple(adapter.up.shape[:1] + adapter.down.shape[1:]), tuple(layer.weight.shape)  # type: ignore[arg-type]
    return SdlabError(
        f"is a LoRA of another model: {how_many}, {adapter.layer} takes {there} there, {here} here; "
        f"it is for {family_of(read_header(path))}",
        where=str(path),
        next_step="Give it with the model that it was trained for",
    )
