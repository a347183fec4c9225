"""LoRAs under the names of other programs.

kohya       ``lora_unet_…``, ``lora_te_…`` with an alpha beside each pair; A1111, ComfyUI, Civitai
diffusers   ``unet.…``, ``text_encoder.…``, ``transformer.…``; no alpha, so that the scale is in B
peft        ``base_model.model.…`` of one network, alphas in the adapter_config.json beside it
bfl         ``diffusion_model.…`` with Black Forest Labs' layers, FLUX.2 alone; no alpha; ComfyUI

Shapes: A (R, in), B (out, R); a convolution's have its kernel behind, (R, in, h, w) and (out, R, 1, 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sdlab.convert.lora.fit import models_of
from sdlab.convert.plan import Output
from sdlab.errors import SdlabError
from sdlab.models import bfl
from sdlab.models.files import Stored, read_header, torch_type
from sdlab.models.lora import shaped
from sdlab.models.lora_files import Adapter, check_lora, read_lora
from sdlab.models.lora_names import names_of

__all__ = ["LAYOUTS", "Adapter", "outputs", "peft_config", "read_adapters"]

LAYOUTS = ("kohya", "diffusers", "peft", "bfl")


def read_adapters(
    path: Path, *, base: Path | None = None, allow_pickle: bool = False
) -> tuple[str, list[Adapter]]:
    """The kind of model that a LoRA is for (sd1, sd2, flux2-klein, flux2-dev), and its layers by diffusers' names.

    The model is told by the shapes among those we know, or is the one at `base`. Raises SdlabError where the file is
    no LoRA, or any of its layers has no place in such a model.
    """
    header = read_header(path)
    check_lora(header)
    kind, modules = models_of(header, base, allow_pickle=allow_pickle)
    found = read_lora(path, {name: names_of(module) for name, module in modules.items()})
    adapters = [shaped(a, modules[a.part].get_submodule(a.layer), path) for a in found]
    for one, other in pairwise(adapters):  # they are sorted
        if (one.part, one.layer) == (other.part, other.layer):
            raise SdlabError(f"adapts {one.layer} twice, under two names", where=str(path))
    return kind, _unfused(adapters)


def outputs(
    adapters: Sequence[Adapter], *, family: str, layout: str, dtype: str | None, path: Path = Path("LoRA")
) -> list[Output]:
    """The tensors of a LoRA's file in one of LAYOUTS; `dtype` is a safetensors word, None what each layer had.

    `path` is for messages. Raises SdlabError where the layout has no name for a layer.
    """
    assert layout in LAYOUTS, layout
    written: list[tuple[str, Tensor, str]] = []
    for name, adapter in _named(adapters, family=family, layout=layout):
        word = dtype or (adapter.dtype if adapter.dtype in ("F16", "BF16") else "F32")
        if not _keeps_scale(adapter, layout):
            adapter = _baked(adapter, word)
        first, second = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
        halves = (f"{name}.{first}.weight", adapter.down, word), (f"{name}.{second}.weight", adapter.up, word)
        written += halves
        if layout == "kohya":
            alpha = torch.tensor(adapter.scale * adapter.rank)
            written.append((f"{name}.alpha", alpha, _type_of(alpha, word)))
    return [_output(name, tensor, word, path) for name, tensor, word in written]


def peft_config(adapters: Sequence[Adapter]) -> str:
    """The text of the adapter_config.json beside a file of the layout peft."""
    first = adapters[0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _number(first.scale * first.rank),
        "target_modules": "|".join(re.escape(a.layer) for a in adapters),
        "rank_pattern": {_whole(a.layer): a.rank for a in adapters if a.rank != first.rank},
        "alpha_pattern": {
            _whole(a.layer): _number(a.scale * a.rank)
            for a in adapters
            if (a.rank, a.scale) != (first.rank, first.scale)
        },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return json.dumps(config, indent=2) + "\n"


def _whole(layer: str) -> str:
    return f"^{re.escape(layer)}"  # PEFT's patterns are ends of names otherwise


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _named(adapters: Sequence[Adapter], *, family: str, layout: str) -> list[tuple[str, Adapter]]:
    """Each layer's name in the file, before ``.lora_…``. For FLUX.2's own layers q, k and v become one."""
    if layout == "bfl" and family != "flux2":
        raise SdlabError(
            "the layout bfl has names for layers of FLUX.2 only",
            where="--lora-layout bfl",
            next_step="For Stable Diffusion take kohya",
        )
    parts = sorted({adapter.part for adapter in adapters})
    if layout == "peft" and len(parts) > 1:
        raise SdlabError(
            f"a folder of PEFT's is of one network, and this LoRA is of {' and '.join(parts)}",
            where="--lora-layout peft",
            next_step="Take diffusers or kohya",
        )
    if layout == "diffusers":
        return [(f"{a.part}.{_prefixed(a)}", a) for a in adapters]
    if layout == "peft":
        return [(f"base_model.model.{a.layer}", a) for a in adapters]
    if layout == "kohya" and family != "flux2":
        prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
        return [(prefixes[a.part] + _prefixed(a).replace(".", "_"), a) for a in adapters]
    fused = _fused(adapters)
    if layout == "kohya":
        return [("lora_unet_" + a.layer.replace(".", "_"), a) for a in fused]
    return [(f"diffusion_model.{a.layer}", a) for a in fused]


def _prefixed(adapter: Adapter) -> str:
    """The layer as every version of transformers' CLIP had it in a file, with ``text_model.``."""
    return f"text_model.{adapter.layer}" if adapter.part == "text_encoder" else adapter.layer


def _fused(adapters: Iterable[Adapter]) -> list[Adapter]:
    """FLUX.2's layers as Black Forest Labs have them. SdlabError for one that they lack."""
    whole, thirds = [], dict[str, dict[int, Adapter]]()
    for adapter in adapters:
        place = _place(adapter)
        if place is None:
            raise SdlabError(f"{adapter.layer} has no name in Black Forest Labs' layout", where=adapter.part)
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = adapter
        else:
            up = torch.cat(adapter.up.chunk(2)[::-1]) if place.halves_swapped else adapter.up
            whole.append(replace(adapter, layer=place.name, up=up))
    return whole + [_joined(name, by) for name, by in thirds.items()]


def _place(adapter: Adapter) -> bfl.Place | None:
    """Where Black Forest Labs have the layer, ``.weight`` left off."""
    try:
        place = bfl.place_of(f"{adapter.layer}.weight")
    except KeyError:
        return None
    return replace(place, name=place.name.removesuffix(".weight"))


def _joined(name: str, thirds: dict[int, Adapter]) -> Adapter:
    """One LoRA of q, k and v together, those that there are.

    Where all three have the same A it is that one, their B below one another; else the rank is the sum: A below one
    another, B on the diagonal.
    """
    some = [thirds[i] for i in sorted(thirds)]
    scale = some[0].scale if len({a.scale for a in some}) == 1 else 1.0
    ups = {i: a.up * (a.scale / scale) if a.scale != scale else a.up for i, a in thirds.items()}
    dtype = some[0].dtype if len({a.dtype for a in some}) == 1 else "F32"
    if len(thirds) == 3 and all(torch.equal(a.down, some[0].down) for a in some):
        return Adapter("transformer", name, some[0].down, torch.cat([ups[i] for i in range(3)]), scale, dtype)
    out = some[0].up.shape[0]
    up, column = torch.zeros(3 * out, sum(a.rank for a in some)), 0
    for third in sorted(thirds):
        rank = thirds[third].rank
        up[third * out : (third + 1) * out, column : column + rank] = ups[third]
        column += rank
    return Adapter("transformer", name, torch.cat([a.down for a in some]), up, scale, dtype)


def _unfused(adapters: list[Adapter]) -> list[Adapter]:
    """Each of q, k and v that came as one with B on the diagonal, with its own third of the rank alone."""
    thirds: dict[str, dict[int, Adapter]] = {}
    for adapter in adapters:
        place = _place(adapter) if adapter.part == "transformer" else None
        if place is not None and place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = adapter
    own = {a.layer: _block(a, i) for by in thirds.values() if _is_diagonal(by) for i, a in by.items()}
    return [own.get(adapter.layer, adapter) for adapter in adapters]


def _is_diagonal(thirds: dict[int, Adapter]) -> bool:
    first = next(iter(thirds.values()))
    if (
        len(thirds) != 3
        or first.rank % 3
        or not all(torch.equal(a.down, first.down) for a in thirds.values())
    ):
        return False
    return all(int(a.up.count_nonzero()) == int(_block(a, i).up.count_nonzero()) for i, a in thirds.items())


def _block(adapter: Adapter, third: int) -> Adapter:
    return replace(adapter, down=adapter.down.chunk(3)[third], up=adapter.up.chunk(3, dim=1)[third])


def _keeps_scale(adapter: Adapter, layout: str) -> bool:
    """diffusers does not heed kohya's alphas of a text encoder, so those are never left to the reader."""
    return layout == "peft" or (layout == "kohya" and adapter.part != "text_encoder")


def _baked(adapter: Adapter, dtype: str) -> Adapter:
    """The same of scale 1. In half precision a small B would lose digits: a power of two moves from A to it."""
    if adapter.scale == 1:
        return adapter
    down, up = adapter.down, adapter.up * adapter.scale
    most_down, most_up = float(down.abs().max()), float(up.abs().max())
    if dtype == "F16" and most_down and most_up:
        power = 2.0 ** max(0, round(math.log2(most_down / most_up) / 2))
        down, up = down / power, up * power
    return replace(adapter, down=down, up=up, scale=1.0)


def _type_of(alpha: Tensor, dtype: str) -> str:
    """The type of the halves beside it, as kohya's scripts do, unless that would change the number."""
    return dtype if bool(alpha.to(torch_type(dtype)).float() == alpha) else "F32"


def _output(name: str, tensor: Tensor, dtype: str, path: Path) -> Output:
    stored = Stored.of(name, tensor.contiguous(), path)
    return Output(name, dtype, stored.shape, (stored,))
