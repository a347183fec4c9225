"""Copies of a tiny model that are changed in one place, and single files made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdlab.models import ldm

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
    for part, file in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        for name, tensor in load_file(folder / file).items():
            name = name.removeprefix("text_model.")
            whole = ldm.single_file_name(part, name, config)
            if ".mid.attn_1." in whole and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[whole if text_prefix else whole.replace(".text_model.", ".")] = tensor.contiguous()
    save_file(tensors, path, metadata)
    return path
