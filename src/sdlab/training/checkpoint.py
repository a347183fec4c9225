"""Checkpoints that are whole or absent.

    checkpoints/step-000500/   weights.safetensors  optimizer.safetensors  [ema.safetensors]  state.json
                               manifest.json: sha256 and size of each of them, written last

A checkpoint is staged beside its place, every file synced, the folder renamed, the parent synced; older ones
go only after the new one has been read back. What does not verify is passed over, newest first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlab import show
from sdlab.dataset.files import sha256_of
from sdlab.errors import SdlabError
from sdlab.models.files import Stored, write_safetensors
from sdlab.training.optim import Ema, Updater
from sdlab.training.rules import state_bytes

MANIFEST = "manifest.json"
WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8",
    torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its tensors. Random numbers have no state: they are named by the step."""

    step: int  # optimizer steps done
    log_bytes: int  # length of log.jsonl that belongs to them
    skipped_in_a_row: int


def save(folder: Path, state: State, module: nn.Module, updater: Updater, ema: Ema | None) -> Path:
    """Write checkpoint `step-NNNNNN` below `folder` and verify it. Raises OSError, and then nothing is left of it.

    Raises SdlabError if a weight is not finite: such a state is never saved.
    """
    named = trainable(module)
    _refuse_non_finite(named)
    final = folder / f"step-{state.step:06d}"
    if final.exists() and not fault_of(
        final
    ):  # the same step has the same content: a function of the run's seed
        return final
    staged = folder / f".{final.name}.{os.getpid()}.part"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir()
        _save_tensors({n: p.detach() for n, p in named.items()}, staged / "weights.safetensors")
        _save_tensors(updater.tensors(), staged / "optimizer.safetensors")
        if ema:
            _save_tensors(ema.shadow, staged / "ema.safetensors")
        _write_synced(staged / "state.json", json.dumps(vars(state)).encode())
        files = {
            p.name: {"sha256": sha256_of(str(p)), "bytes": p.stat().st_size} for p in sorted(staged.iterdir())
        }
        _write_synced(staged / MANIFEST, json.dumps({"files": files}, indent=1).encode())
        sync_folder(staged)
        if final.exists():  # it did not verify above
            shutil.rmtree(final)
        os.rename(staged, final)
        sync_folder(folder)
    except BaseException:  # passed on; half a checkpoint must not stay, not even after Ctrl-C
        shutil.rmtree(staged, ignore_errors=True)
        raise
    fault = fault_of(final)
    if fault:
        raise SdlabError(
            f"the checkpoint did not read back: {fault}", where=str(final), next_step="Check the disk"
        )
    return final


def prune(folder: Path, *, newest: Path, keep: int) -> None:
    """Remove all but `newest`, which has been verified, and the `keep` - 1 before it; leftovers of saves too.

    Later ones go first: a run that went back to `newest` did so because they did not verify.
    """
    later = [path for path in found(folder) if _step_of(path) > _step_of(newest)]
    for old in [*later, *[path for path in found(folder) if path not in later][keep:]]:
        doomed = old.with_name(
            f".{old.name}.old"
        )  # first out of sight: half a checkpoint must not look like one
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the leftovers of saves and removals that were killed. Call with the run locked."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def found(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, newest first; not verified."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)), reverse=True, key=_step_of
    )


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; the ones passed over are named on stderr."""
    for path in found(folder):
        fault = fault_of(path)
        if not fault:
            return path
        show.warn(f"{path}: {fault}; trying the one before")
    return None


def fault_of(path: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, about in files.items():
            file = path / name
            if file.stat().st_size != about["bytes"] or sha256_of(str(file)) != about["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        return f"incomplete ({type(reason).__name__}: {reason})"
    return ""


def load(path: Path, module: nn.Module, updater: Updater, ema: Ema | None) -> State:
    """Put a checkpoint's tensors into the module, optimizer and average, in place. Returns where it stood."""
    named = trainable(module)
    weights = load_file(path / "weights.safetensors")
    _copy_into({n: p.detach() for n, p in named.items()}, weights, path)
    updater.load(load_file(path / "optimizer.safetensors"))
    if ema:
        _copy_into(ema.shadow, load_file(path / "ema.safetensors"), path)
    return State(**json.loads((path / "state.json").read_bytes()))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def size_bytes(module: nn.Module, *, optimizer: str, ema: bool) -> int:
    """Bytes of one checkpoint of this module: weights in their own type, optimizer state, the average in float32."""
    return sum(
        p.nbytes + state_bytes(optimizer, p, name) + (4 * p.numel() if ema else 0)
        for name, p in trainable(module).items()
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes for a digest, whatever its type: numpy knows no bf16."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut, where the system can."""
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make every file below a folder reach the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("r+b") as file:  # Windows syncs only files open for writing
                os.fsync(file.fileno())


def _copy_into(targets: dict[str, Tensor], values: dict[str, Tensor], path: Path) -> None:
    if targets.keys() != values.keys():
        raise SdlabError(
            "holds other weights than this model trains", where=str(path), next_step="Start a new run"
        )
    for name, target in targets.items():
        target.copy_(values[name])


def _refuse_non_finite(named: dict[str, nn.Parameter]) -> None:
    for name, parameter in named.items():
        if not torch.isfinite(parameter.detach().sum()):
            raise SdlabError(
                f"weight {name} is not finite; nothing was saved",
                next_step="Start another run with a lower --lr",
            )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the tensors one after the other: all of them at once would not fit beside a large model in memory."""
    stored = {
        name: Stored(name, WORDS[t.dtype], tuple(t.shape), path, nbytes=t.nbytes, tensor=t)
        for name, t in tensors.items()
    }
    write_safetensors(path, stored)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
