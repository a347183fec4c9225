"""`fit` with a model of five numbers: what it promises does not depend on what is trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from sdlab.dataset.batches import Batches, CachedSource, Entry
from sdlab.dataset.cache import Cache
from sdlab.errors import ItemsFailed, OutOfResources, SdlabError, Stopped
from sdlab.signals import StopRequest, stop_on_signals
from sdlab.training import checkpoint
from sdlab.training.folder import RunFolder
from sdlab.training.loop import FitConfig, fit
from sdlab.training.optim import make_optimizer

CONFIG = FitConfig(
    steps=12, lr=0.05, lr_schedule="cosine", warmup=3, weight_decay=0.01, max_grad_norm=1.0, ema=True, seed=7,
    save_every=4, keep=2, preview_every=0, num_workers=0, compile=False, optimizer="adamw", fused_backward=False,
)  # fmt: skip


class Killed(BaseException):
    """What a kill -9 looks like from inside: nothing after it runs."""


def replace(**changes) -> FitConfig:
    return FitConfig(**{**vars(CONFIG), **changes})


def data(
    tmp_path: Path, *, batch: int = 2, accumulate: int = 2, count: int = 7, num_sizes: int = 2
) -> Batches:
    cache = Cache(tmp_path / "cache")
    cache.put("prompts", "", {"e": torch.zeros(2)})
    entries = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        cache.put("latents", f"{index}", {"latents": torch.randn(1, 2, 2, generator=generator)})
        cache.put("prompts", f"p{index}", {"e": torch.randn(2, generator=generator)})
        entries.append(Entry(f"{index}.png", (16, 16 + 16 * (index % num_sizes)), f"{index}", f"p{index}"))
    return Batches(entries, CachedSource(cache, 0.2, ""), batch=batch, accumulate=accumulate, seed=7)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x, e):
        return (x.flatten(1) + self.bias + self.weight[:, :2].matmul(e[..., None])[..., 0]).tanh()


def loss(module, batch, rng):
    noise = rng.normal("noise", batch.ids, (4,))
    return (module(batch.latents_BCHW, batch.cond["e"]) - noise).square().mean(1)


class Wide(nn.Module):
    """Large enough for 8-bit states (6144 weights, not a whole number of rows to a block), with a shared vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 1539, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, e):
        spread = self.weight.float().view(4, 513, 3).mean(1)[:, :2].matmul(e[..., None])[..., 0]
        return (x.flatten(1) + self.bias.float() + spread + self.bias.float() * spread).tanh()


def updater_of(module: nn.Module):
    return make_optimizer(
        checkpoint.trainable(module), kind="adamw", lr=0.1, weight_decay=0.0, max_grad_norm=1.0, seed=0,
        fused_backward=False,
    )  # fmt: skip


def run(
    folder: Path,
    batches: Batches,
    config: FitConfig = CONFIG,
    *,
    loss_fn=loss,
    stop=None,
    module=None,
    **settings,
) -> nn.Module:
    module = module or Net()
    AcceleratorState._reset_state(reset_partial_state=True)
    files = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fit(
            module, loss_fn, batches, config, files, accelerator=Accelerator(cpu=True),
            stop=StopRequest() if stop is None else stop, **{"preview": lambda step: None, **settings},
        )  # fmt: skip
    finally:
        files.close()
    return module


def state(folder: Path) -> dict[str, str]:
    newest = checkpoint.newest_good(folder / "checkpoints")
    assert newest
    files = [*sorted(newest.glob("*.safetensors")), folder / "log.jsonl"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def dying(at_step: int):
    def loss_fn(module, batch, rng):
        if rng.step == at_step:
            raise Killed
        return loss(module, batch, rng)

    return loss_fn


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("deaths", [[0], [5], [11], [5, 9], [4, 4, 8]])
def test_a_killed_and_resumed_run_gives_the_same_bits_as_one_run(tmp_path, deaths, accumulate):
    batches = data(tmp_path, accumulate=accumulate)
    run(tmp_path / "straight", batches)
    for death in deaths:
        with pytest.raises(Killed):
            run(tmp_path / "killed", batches, loss_fn=dying(death))
    run(tmp_path / "killed", batches)
    assert state(tmp_path / "killed") == state(tmp_path / "straight")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_every_optimizer_resumes_to_the_same_bits(tmp_path, optimizer, dtype, fused):
    batches = data(tmp_path, accumulate=1 if fused else 2)
    config = replace(optimizer=optimizer, fused_backward=fused)
    straight = run(tmp_path / "straight", batches, config, module=Wide(dtype))
    for death in (5, 9):
        with pytest.raises(Killed):
            run(tmp_path / "killed", batches, config, loss_fn=dying(death), module=Wide(dtype))
    previewed = replace(optimizer=optimizer, fused_backward=fused, preview_every=1)  # shows the averages
    resumed = run(tmp_path / "killed", batches, previewed, module=Wide(dtype))
    assert state(tmp_path / "killed") == state(tmp_path / "straight")
    assert torch.equal(resumed.weight, straight.weight)
    assert straight.weight.dtype == dtype
    assert not torch.equal(straight.weight, Wide(dtype).weight)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_fused_and_unfused_updates_are_the_same_where_nothing_is_clipped(tmp_path, kind):
    batches = data(tmp_path, accumulate=1)
    ways = [
        run(
            tmp_path / str(fused),
            batches,
            replace(optimizer=kind, fused_backward=fused, max_grad_norm=0.0),
            module=Wide(torch.bfloat16),
        )
        for fused in (False, True)
    ]
    assert torch.equal(ways[0].weight, ways[1].weight)
    logs = [(tmp_path / str(fused) / "log.jsonl").read_text() for fused in (False, True)]
    assert logs[0] == logs[1]  # grad_norm too


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"processes": 2}])
def test_a_fused_backward_is_refused_where_gradients_add_up(tmp_path, changes, monkeypatch):
    if "processes" in changes:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(SdlabError, match="--no-fused-backward") as refused:
        run(
            tmp_path / "run",
            data(tmp_path, accumulate=changes.get("accumulate", 1)),
            replace(fused_backward=True),
        )
    assert "\n" not in str(refused.value)


def test_a_fused_step_whose_loss_is_not_finite_changes_nothing(tmp_path, capsys):
    batches = data(tmp_path, accumulate=1)
    config = replace(steps=3, save_every=1, keep=9, optimizer="adafactor", fused_backward=True)

    def poisoned(module, batch, rng):
        return loss(module, batch, rng) + (float("nan") if rng.step == 1 else 0.0)  # its gradient is finite

    run(tmp_path / "run", batches, config, loss_fn=poisoned)
    first, second = (tmp_path / "run" / "checkpoints" / f"step-00000{n}" for n in (1, 2))
    for name in ("weights", "optimizer", "ema"):
        file = f"{name}.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert "step 2: the loss or a gradient is not finite" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").num_skipped() == 1


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_a_fused_gradient_that_is_not_finite_leaves_its_own_tensor_alone(tmp_path, kind):
    from safetensors.torch import load_file

    batches = data(tmp_path, accumulate=1)
    config = replace(steps=3, save_every=1, keep=9, optimizer=kind, fused_backward=True)

    def poisoned(module, batch, rng):
        if rng.step == 1:
            module.weight.register_hook(lambda grad: grad * float("nan"))
        return loss(module, batch, rng)

    run(tmp_path / "run", batches, config, loss_fn=poisoned, module=Wide(torch.bfloat16))
    first, second = (tmp_path / "run" / "checkpoints" / f"step-00000{n}" for n in (1, 2))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        before, after = load_file(first / file), load_file(second / file)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert {name for name in before if name.startswith("weight")} <= same
        assert {name for name in before if name.startswith("bias")}.isdisjoint(same)
    assert RunFolder(tmp_path / "run").num_skipped() >= 1


@pytest.mark.parametrize(
    "changes", [{"num_workers": 3}, {"save_every": 0}, {"preview_every": 1}, {"keep": 9}]
)
def test_nothing_incidental_changes_a_bit(tmp_path, changes):
    batches = data(tmp_path)
    run(tmp_path / "one", batches)
    run(tmp_path / "two", batches, replace(**changes))
    assert state(tmp_path / "one") == state(tmp_path / "two")


@pytest.mark.parametrize("changes", [{"seed": 8}, {"lr": 0.04}, {"lr_schedule": "linear"}, {"ema": False}])
def test_what_matters_changes_the_result(tmp_path, changes):
    batches = data(tmp_path)
    run(tmp_path / "one", batches)
    run(tmp_path / "two", batches, replace(**changes))
    assert state(tmp_path / "one") != state(tmp_path / "two")


def test_a_step_is_the_mean_over_its_samples_whatever_the_split(tmp_path):
    one_step = replace(steps=1, warmup=0, ema=False, max_grad_norm=0.0, lr_schedule="constant")
    whole = run(tmp_path / "whole", data(tmp_path, batch=4, accumulate=1, count=4, num_sizes=1), one_step)
    split = run(tmp_path / "split", data(tmp_path, batch=1, accumulate=4, count=4, num_sizes=1), one_step)
    assert torch.allclose(whole.weight, split.weight, atol=1e-6)


def test_gradients_of_a_short_batch_weigh_each_sample_as_in_a_full_one(tmp_path):
    seen = []

    def spy(module, batch, rng):
        out = loss(module, batch, rng)
        out.register_hook(lambda grad: seen.append(grad.tolist()))
        return out

    run(
        tmp_path / "run",
        data(tmp_path, batch=3, accumulate=1, count=7, num_sizes=1),
        replace(steps=3),
        loss_fn=spy,
    )
    assert sorted(len(g) for g in seen) == [1, 3, 3]
    assert {round(g, 6) for grads in seen for g in grads} == {round(1 / 3, 6)}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_save_and_resume_is_exact(tmp_path, signum):
    batches = data(tmp_path)
    run(tmp_path / "straight", batches)
    calls = iter(range(1000))

    def interrupted(module, batch, rng):
        if next(calls) == 9:
            os.kill(os.getpid(), signum)
        return loss(module, batch, rng)

    with stop_on_signals() as stop, pytest.raises(Stopped) as stopped:
        run(tmp_path / "stopped", batches, loss_fn=interrupted, stop=stop)
    assert stopped.value.exit_code == 128 + signum
    assert "step 5 of 12" in str(stopped.value)
    run(tmp_path / "stopped", batches)
    assert state(tmp_path / "stopped") == state(tmp_path / "straight")


def test_a_non_finite_step_is_skipped_and_its_pictures_are_named(tmp_path, capsys):
    batches = data(tmp_path)

    def poisoned(module, batch, rng):
        out = loss(module, batch, rng)
        return out * float("nan") if "3.png" in batch.ids and rng.step < 4 else out

    module = run(tmp_path / "run", batches, loss_fn=poisoned)
    assert torch.isfinite(module.weight).all()
    assert "3.png" in capsys.readouterr().err
    assert '"skipped"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_three_non_finite_steps_in_a_row_stop_the_run_with_the_last_good_weights(tmp_path):
    batches = data(tmp_path)

    def poisoned(module, batch, rng):
        return loss(module, batch, rng) * (float("inf") if rng.step >= 5 else 1.0)

    with pytest.raises(ItemsFailed, match="3 steps in a row") as failed:
        run(tmp_path / "run", batches, loss_fn=poisoned)
    assert failed.value.exit_code == 3
    five = replace(save_every=5)
    with pytest.raises(Killed):
        run(tmp_path / "five", batches, five, loss_fn=dying(5))
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "five"))


def weights(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    newest = checkpoint.newest_good(folder / "checkpoints")
    assert newest
    return load_file(newest / "weights.safetensors")["weight"]


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(tmp_path, capsys):
    batches = data(tmp_path)
    run(tmp_path / "straight", batches)
    with pytest.raises(Killed):
        run(tmp_path / "run", batches, loss_fn=dying(10))
    newest, before = checkpoint.found(tmp_path / "run" / "checkpoints")
    target = newest / "optimizer.safetensors"
    damaged = bytearray(target.read_bytes())
    damaged[-3] ^= 1
    target.write_bytes(damaged)
    run(tmp_path / "run", batches)
    err = capsys.readouterr().err
    assert f"{newest}: optimizer.safetensors is not as it was written" in err
    assert f"goes on from {before}" in err
    assert state(tmp_path / "run") == state(tmp_path / "straight")


def test_only_the_newest_checkpoints_are_kept_and_leftovers_are_swept(tmp_path):
    leftover = tmp_path / "run" / "checkpoints" / ".step-000002.123.part"
    leftover.mkdir(parents=True)
    run(tmp_path / "run", data(tmp_path))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000008",
        "step-000012",
    ]


@pytest.mark.parametrize("victim", ["write", "rename"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, victim):
    batches = data(tmp_path)
    real_save, real_rename, count = checkpoint._save_tensors, os.rename, iter(range(100))

    def full(*args):
        raise OSError(28, "No space left on device", str(args[-1]))

    if victim == "write":
        monkeypatch.setattr(
            checkpoint, "_save_tensors", lambda t, p: real_save(t, p) if next(count) < 4 else full(p)
        )
    else:
        monkeypatch.setattr(os, "rename", lambda a, b: real_rename(a, b) if next(count) < 1 else full(b))
    with pytest.raises(OutOfResources, match=r"last good checkpoint is .*step-000004"):
        run(tmp_path / "run", batches)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    run(tmp_path / "straight", batches)
    run(tmp_path / "run", batches)
    assert state(tmp_path / "run") == state(tmp_path / "straight")


def test_non_finite_weights_are_never_saved(tmp_path):
    module = Net()
    module.bias.data[1] = float("nan")
    with pytest.raises(SdlabError, match="bias is not finite"):
        checkpoint.save(tmp_path / "c", checkpoint.State(1, 0, 0), module, updater_of(module), None)
    assert not checkpoint.found(tmp_path / "c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_type_of_weight_hides_a_value_that_is_not_finite(tmp_path, dtype, bad):
    module = Wide(dtype)
    module.weight.data[3, 1538] = bad
    with pytest.raises(SdlabError, match="weight is not finite"):
        checkpoint.save(tmp_path / "c", checkpoint.State(1, 0, 0), module, updater_of(module), None)


def test_a_second_process_cannot_train_into_the_same_run(tmp_path):
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(SdlabError, match="another sdlab"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


def test_files_of_the_user_are_never_taken_for_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(SdlabError, match=r"holiday\.jpg"):
        RunFolder(tmp_path / "run").refuse_strangers()


def test_leftovers_of_killed_writes_are_swept_not_taken_for_strangers(tmp_path):
    folder = tmp_path / "run"
    for name in (
        ".run.json.77.part",
        "samples/.step-000001.png.77.part",
        ".export-77/unet/x",
        "checkpoints/.step-000002.7.part/x",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    RunFolder(folder).record(state="encoding")
    RunFolder(folder).refuse_strangers()
    RunFolder(folder).sweep()
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["run.json"]


def test_pruning_never_removes_the_checkpoint_that_verified(tmp_path):
    folder = tmp_path / "checkpoints"
    module = Net()
    for step in (2, 4, 3):
        newest = checkpoint.save(folder, checkpoint.State(step, 0, 0), module, updater_of(module), None)
    (folder / "step-000004" / "weights.safetensors").write_bytes(b"")
    checkpoint.prune(folder, newest=newest, keep=1)
    assert checkpoint.newest_good(folder) == newest
    assert [p.name for p in folder.iterdir()] == ["step-000003"]


def test_damaged_checkpoints_only_are_an_error_not_a_start_from_nothing(tmp_path):
    batches = data(tmp_path)
    run(tmp_path / "run", batches)
    for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"x")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(SdlabError, match="none of the checkpoints"):
        run(tmp_path / "run", batches)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_what_is_validated_joins_the_line_of_its_step_and_is_of_the_weights_that_would_be_saved(tmp_path):
    module, seen = Net(), []

    def validate(step):
        assert not module.training
        seen.append((step, module.weight.detach().clone()))
        return {"val": float(module.weight.detach().sum())}

    run(tmp_path / "a", data(tmp_path), module=module, validate=validate, validate_every=5)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["val"] for line in lines if "val" in line} == {
        step: float(weight.sum()) for step, weight in seen
    }
    assert [step for step, _ in seen] == [5, 10, 12]
    newest = checkpoint.newest_good(tmp_path / "a" / "checkpoints")
    assert newest and torch.equal(load_file(newest / "ema.safetensors")["weight"], seen[-1][1])
    assert not torch.equal(load_file(newest / "weights.safetensors")["weight"], seen[-1][1])


def test_what_is_validated_and_no_number_is_null_in_the_log(tmp_path):
    run(
        tmp_path / "a",
        data(tmp_path),
        validate=lambda step: {"val": math.nan, "other": 1.0},
        validate_every=5,
    )
    log = (tmp_path / "a" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in log.splitlines()]
    assert [(line["val"], line["other"]) for line in lines if "val" in line] == [(None, 1.0)] * 3


def test_validation_changes_no_bit_and_a_killed_run_writes_the_same_log(tmp_path):
    batches = data(tmp_path)
    run(tmp_path / "without", batches)
    settings = {"validate_every": 2}
    for name, deaths in (("with", []), ("killed", [3, 9])):
        for death in deaths:
            module = Net()
            with pytest.raises(Killed):
                run(
                    tmp_path / name,
                    batches,
                    loss_fn=dying(death),
                    module=module,
                    validate=summed(module),
                    **settings,
                )
        module = Net()
        run(tmp_path / name, batches, module=module, validate=summed(module), **settings)
    assert state(tmp_path / "with") == state(tmp_path / "killed")
    plain, validated = state(tmp_path / "without"), state(tmp_path / "with")
    assert {n for n in plain if plain[n] != validated[n]} == {"log.jsonl"}


def summed(module: nn.Module):
    return lambda step: {"val": float(module.weight.detach().sum())}


def test_no_memory_to_validate_is_said_and_ends_nothing(tmp_path, capsys):
    def validate(step):
        raise torch.OutOfMemoryError

    run(tmp_path / "a", data(tmp_path), validate=validate, validate_every=0)
    assert "step 12: no memory to validate" in capsys.readouterr().err


def gone() -> SdlabError:
    return SdlabError("cannot be used any more", where="3.png", next_step="Put it back, then --resume")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_vanishes_during_a_run_loses_no_step(tmp_path, monkeypatch, num_workers):
    batches, config = data(tmp_path), replace(save_every=0, num_workers=num_workers)
    run(tmp_path / "straight", batches, config)
    load = Batches.load

    def lacking(self, step):
        if step == 5:
            raise gone()
        return load(self, step)

    monkeypatch.setattr(Batches, "load", lacking)
    with pytest.raises(SdlabError) as said:
        run(tmp_path / "a", batches, config)
    assert str(said.value).startswith("3.png: cannot be used any more; step 5 of 12 is saved. ")
    assert str(said.value).count("--resume") == 1
    monkeypatch.undo()
    run(tmp_path / "a", batches, config)
    assert state(tmp_path / "a") == state(tmp_path / "straight")


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch):
    batches = data(tmp_path)

    def lacking(self, step):
        raise gone()

    monkeypatch.setattr(Batches, "load", lacking)
    with pytest.raises(SdlabError) as said:
        run(tmp_path / "a", batches)
    assert "saved" not in str(said.value) and not checkpoint.found(tmp_path / "a" / "checkpoints")


@pytest.mark.parametrize("what", ["validate", "preview"])
def test_a_measurement_or_preview_that_fails_loses_no_step(tmp_path, what):
    batches, config = data(tmp_path), replace(save_every=0, preview_every=3, num_workers=0)
    run(tmp_path / "straight", batches, config)

    def failing(step: int) -> dict[str, float]:
        if step == 3:
            raise SdlabError("is full", where="samples")
        return {}

    with pytest.raises(SdlabError) as said:
        run(tmp_path / "a", batches, config, validate_every=3, **{what: failing})
    assert str(said.value) == "samples: is full; step 3 of 12 is saved. --resume goes on"
    run(tmp_path / "a", batches, config)
    assert state(tmp_path / "a") == state(tmp_path / "straight")


def test_a_second_process_saves_nothing_and_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: pytest.fail("it would wait for ever"))
    batches, load = data(tmp_path), Batches.load

    def lacking(self, step):
        if step == 2:
            raise gone()
        return load(self, step)

    monkeypatch.setattr(Batches, "load", lacking)
    with pytest.raises(SdlabError, match=r"cannot be used any more\. Put"):
        run(tmp_path / "a", batches, replace(save_every=0))
    assert not checkpoint.found(tmp_path / "a" / "checkpoints")
