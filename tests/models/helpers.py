"""Copies of a tiny model that are changed in one place, and single files made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdlab.models import bfl, ldm

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
Tensors = dict[str, torch.Tensor]


def copied(source: Path, folder: Path) -> Path:
    """A writable copy of a model folder."""
    return Path(shutil.copytree(source, folder))


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    table = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in table.items() if v != "-"}), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[Tensors], Any]) -> None:
    """Load a .safetensors, let `change` alter the table, save it again."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def single_file(folder: Path, path: Path, *, text_prefix: bool = True, metadata: Any = None) -> Path:
    """The model of `folder` as one file in the original layout, as other tools write it."""
    tensors: Tensors = {}
    fused: dict[str, dict[int, torch.Tensor]] = {}
    for part, file in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        for name, tensor in load_file(folder / file).items():
            name = name.removeprefix("text_model.")
            place = ldm.place_of(part, name, config)
            whole = place.name if text_prefix else place.name.replace(".text_model.", ".")
            if ".mid.attn_1." in whole and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            if place.third is not None:
                fused.setdefault(whole, {})[place.third] = tensor
            else:
                tensors[whole] = tensor.contiguous()
    tensors |= {name: torch.cat([thirds[i] for i in range(3)]) for name, thirds in fused.items()}
    save_file(tensors, path, metadata)
    return path


def bfl_file(folder: Path, path: Path, *, prefix: str = "", metadata: Any = None) -> Path:
    """The transformer of a FLUX.2 folder as one file with Black Forest Labs' names, as they write it."""
    stored = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    tensors: Tensors = {}
    fused: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in stored.items():
        place = bfl.place_of(name)
        if place.third is not None:
            fused.setdefault(place.name, {})[place.third] = tensor
        elif place.halves_swapped:
            scale, shift = tensor.chunk(2)
            tensors[place.name] = torch.cat([shift, scale])
        else:
            tensors[place.name] = tensor
    tensors |= {name: torch.cat([thirds[i] for i in range(3)]) for name, thirds in fused.items()}
    save_file({prefix + name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def bfl_vae_file(folder: Path, path: Path) -> Path:
    """The VAE of a FLUX.2 folder as one file with Black Forest Labs' names; its attention is 1x1 convolutions."""
    config = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))
    tensors: Tensors = {}
    for name, tensor in load_file(folder / VAE).items():
        whole = bfl.vae_name(name, config)
        tensors[whole] = tensor[:, :, None, None] if ".attn_1." in whole and tensor.ndim == 2 else tensor
    tensors.pop("bn.num_batches_tracked")
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path
