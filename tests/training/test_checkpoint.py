"""Checkpoints of every kind of state: what is counted beforehand, what is written, what is digested."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdlab.errors import SdlabError
from sdlab.training import checkpoint
from sdlab.training.optim import Ema, make_optimizer

KINDS = ["adamw", "adamw8bit", "adafactor", "muon"]


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 100), nn.Conv2d(4, 8, 3), nn.Linear(3, 3))
    module[2].requires_grad_(False)
    return module.to(dtype)


def stepped(module: nn.Module, kind: str, *, fused: bool, steps: int = 3):
    named = checkpoint.trainable(module)
    updater = make_optimizer(
        named, kind=kind, lr=1e-2, weight_decay=0.01, max_grad_norm=1.0, seed=1, fused_backward=fused
    )
    for step in range(steps):
        updater.begin(step, 1e-2)
        sum((p.float().sin() * (step + 1)).sum() for p in named.values()).backward()
        updater.end(0.0)
    return updater


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_counted_is_the_size_written(tmp_path, kind, dtype, ema):
    module = net(dtype)
    averages = Ema(checkpoint.trainable(module)) if ema else None
    updater = stepped(module, kind, fused=False)
    path = checkpoint.save(tmp_path, checkpoint.State(3, 0, 0), module, updater, averages)
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    counted = checkpoint.size_bytes(module, optimizer=kind, ema=ema)
    assert 0 <= written - counted < 5000  # headers, and the counts of steps


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(tmp_path, kind, dtype, fused):
    module, other = net(dtype), net(dtype)
    updater = stepped(module, kind, fused=fused)
    path = checkpoint.save(tmp_path, checkpoint.State(3, 17, 1), module, updater, None)
    fresh = stepped(other, kind, fused=fused, steps=0)
    assert checkpoint.load(path, other, fresh, None) == checkpoint.State(3, 17, 1)
    for left, right in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    ours, theirs = updater.tensors(), fresh.tensors()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    assert load_file(path / "weights.safetensors")["0.weight"].dtype == dtype


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    module = net(torch.float32)
    updater = stepped(module, "adamw8bit", fused=False)
    path = checkpoint.save(tmp_path, checkpoint.State(3, 0, 0), module, updater, None)
    with pytest.raises(SdlabError, match="another optimizer"):
        checkpoint.load(path, net(torch.float32), stepped(net(torch.float32), "adafactor", fused=False), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_every_type_of_tensor_has_bytes_for_a_digest(dtype, shape):
    tensor = (torch.rand(shape) * 100).to(dtype)
    digest = hashlib.sha256(checkpoint.bytes_of(tensor)).hexdigest()
    wanted = tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor
    assert digest == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()


def test_a_transposed_tensor_is_digested_in_its_own_order():
    tensor = torch.arange(6.0).view(2, 3).T
    assert bytes(checkpoint.bytes_of(tensor)) == tensor.contiguous().numpy().tobytes()


def test_a_bf16_checkpoint_is_verified_like_any_other(tmp_path: Path):
    module = net(torch.bfloat16)
    path = checkpoint.save(
        tmp_path, checkpoint.State(1, 0, 0), module, stepped(module, "adamw8bit", fused=True), None
    )
    assert not checkpoint.fault_of(path)
    damaged = bytearray((path / "optimizer.safetensors").read_bytes())
    damaged[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(damaged)
    assert "optimizer.safetensors is not as it was written" in checkpoint.fault_of(path)
