"""``sdlab train-sd`` as a user runs it, on a tiny model."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from sdlab.models.sd import SdEncoders
from tests.program import sdlab, start

FILES = {
    "red_cat/a.png": (64, 64),
    "red_cat/b.jpg": (64, 64),
    "dog/c.png": (48, 96),
    "dog/d.webp": (96, 48),
    "dog/e.png": (70, 60),
}


@pytest.fixture
def folder(pictures) -> Path:
    return pictures(FILES)


@pytest.fixture
def train(tiny_sd_folder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sdlab.commands.train_sd.PREVIEW_STEPS", 1)

    def run(name: str, *args: object) -> int:
        return sdlab("train-sd", *options(tiny_sd_folder, folder, tmp_path / "tuned" / name), *args)

    return run


def options(model: Path, images: Path, run: Path) -> list[object]:
    return [
        "--images", images, "--load-model", model, "--save-model", run, "--image-size", 64, "--batch", 2,
        "--steps", 6, "--lr", "1e-3", "--lr-schedule", "constant", "--warmup", 0, "--save-every", 2, "--ema",
        "--device", "cpu", "--preview-every", 0, "--preview-prompt", "dog",
    ]  # fmt: skip


def digests(run: Path) -> dict[str, str]:
    """sha256 of what a run's seed determines: the last checkpoint's tensors, the saved UNet and the log."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = [*sorted(newest.glob("*.safetensors")), run / "unet" / "diffusion_pytorch_model.safetensors"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [*files, run / "log.jsonl"]}


def tree(root: Path) -> dict[str, tuple[str, int]]:
    return {
        p.relative_to(root).as_posix(): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_a_run_leaves_a_pipeline_and_its_whole_story(train, folder, tmp_path):
    before = tree(folder)
    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    assert tree(folder) == before
    names = {p.name for p in run.iterdir()}
    assert names >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "run.json",
                     "log.jsonl", "loss.png", "samples", "checkpoints"}  # fmt: skip
    assert not {n for n in names if n.startswith(".")}
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-000000.png", "step-000006.png"]
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished" and record["step"] == record["steps"] == 6
    assert record["dataset"]["prompts"] == {"dog": 3, "red cat": 2}
    assert record["config"]["seed"] == 42
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(
        name.startswith("text_model.") for name in load_file(run / "text_encoder" / "model.safetensors")
    )
    assert all(not oct(p.stat().st_mode).endswith("600") for p in run.rglob("*.safetensors"))


def test_diffusers_opens_the_run_and_its_parts_are_the_bases(train, tiny_sd_folder, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    pipeline = StableDiffusionPipeline.from_pretrained(run, dtype=torch.float32)
    base = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, dtype=torch.float32)
    for part in ("vae", "text_encoder"):
        mine, theirs = getattr(pipeline, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    mine, theirs = pipeline.unet.state_dict(), base.unet.state_dict()
    assert any(not torch.equal(mine[name], theirs[name]) for name in theirs)
    averages = load_file(sorted((run / "checkpoints").iterdir())[-1] / "ema.safetensors")
    assert all(torch.equal(mine[name], averages[name]) for name in averages)


def test_everything_is_encoded_once_and_a_replaced_picture_alone_again(train, folder, monkeypatch):
    seen: dict[str, list] = {"pictures": [], "prompts": []}
    pictures, prompts = SdEncoders.encode_pictures, SdEncoders.encode_prompts

    def count_pictures(self, pixels):
        seen["pictures"].append(len(pixels))
        return pictures(self, pixels)

    def count_prompts(self, texts):
        seen["prompts"] += texts
        return prompts(self, texts)

    monkeypatch.setattr(SdEncoders, "encode_pictures", count_pictures)
    monkeypatch.setattr(SdEncoders, "encode_prompts", count_prompts)

    def counted(name):
        seen.update(pictures=[], prompts=[])
        assert train(name) == 0
        return sum(seen["pictures"]), len(seen["prompts"])

    assert counted("first") == (5, 3)  # two folders and the empty prompt
    assert counted("second") == (0, 0)
    Image.new("RGB", (64, 64), "white").save(folder / "red_cat" / "a.png")
    assert counted("third") == (1, 0)
    (folder / "red_cat").rename(folder / "blue_cat")
    assert counted("fourth") == (0, 1)
    shutil.copy(folder / "dog" / "e.png", folder / "dog" / "copy.png")
    assert counted("fifth") == (0, 0)


def test_the_encoders_are_gone_before_the_first_step(train, monkeypatch):
    from sdlab.models.sd import StableDiffusion

    alive: list[weakref.ref] = []
    module_of, loss = SdEncoders._module, StableDiffusion.loss

    def remember(self, part):
        module = module_of(self, part)
        alive.append(weakref.ref(module))
        return module

    def check(self, denoiser, batch, rng):
        gc.collect()
        assert alive and all(ref() is None for ref in alive)
        return loss(self, denoiser, batch, rng)

    monkeypatch.setattr(SdEncoders, "_module", remember)
    monkeypatch.setattr(StableDiffusion, "loss", check)
    assert train("a") == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kill_9_at_any_moment_and_resume_gives_the_same_bits(
    train, tiny_sd_folder, folder, tmp_path, num_workers, capsys
):
    assert train("straight") == 0
    run = tmp_path / "tuned" / "killed"
    args = [
        "train-sd",
        *options(tiny_sd_folder, folder, run),
        "--cache-dir",
        tmp_path / "cold",
        "--num-workers",
        num_workers,
    ]
    process = start(*args)
    log, moment = run / "log.jsonl", random.Random(num_workers).randint(1, 5)
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) >= moment):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert sdlab(*args, "--resume") == 0
    assert digests(run) == digests(tmp_path / "tuned" / "straight")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_saves_and_exits_and_resume_is_exact(
    train, tiny_sd_folder, folder, tmp_path, signum
):
    assert train("straight") == 0
    run = tmp_path / "tuned" / "stopped"
    args = ["train-sd", *options(tiny_sd_folder, folder, run), "--num-workers", 2]
    process = start(*args)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().splitlines()):
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    _, err = process.communicate()
    assert process.returncode == 128 + signum, err
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    assert sdlab("train-sd", "--save-model", run, "--resume") == 0  # its own options are remembered
    assert digests(run) == digests(tmp_path / "tuned" / "straight")


def test_two_processes_train_the_same_as_one(tiny_sd_folder, folder, tmp_path):
    common = ["--ema", "--device", "cpu", "--preview-every", 0, "--preview-prompt", "dog", "--num-workers", 0]
    one = [*options(tiny_sd_folder, folder, tmp_path / "one"), *common, "--batch", 2]
    two = [*options(tiny_sd_folder, folder, tmp_path / "two"), *common, "--batch", 1]
    assert sdlab("train-sd", *one) == 0
    launcher = (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "sdlab",
    )  # fmt: skip
    process = start("train-sd", *two, module=launcher)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["machine"]["processes"] == 2


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_on(train, capsys, tmp_path):
    assert train("a") == 0
    capsys.readouterr()
    assert train("a") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--resume" in err and "--overwrite" in err
    assert train("a", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err
    assert train("a", "--overwrite", "--steps", 2) == 0
    assert json.loads((tmp_path / "tuned" / "a" / "run.json").read_text())["step"] == 2


def interrupted(train, monkeypatch, name: str) -> None:
    """A run that stops after its third step."""
    from sdlab.training import loop

    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: signal.SIGTERM)
    assert train(name) == 143
    monkeypatch.undo()


def test_a_changed_configuration_is_refused_with_the_difference(train, monkeypatch, capsys):
    interrupted(train, monkeypatch, "a")
    capsys.readouterr()
    assert train("a", "--resume", "--lr", "2e-3", "--seed", 43) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--lr: the run has 0.001, now 0.002" in err and "--seed: the run has 42, now 43" in err


def test_a_changed_dataset_is_refused_with_the_difference(train, folder, monkeypatch, capsys):
    interrupted(train, monkeypatch, "a")
    (folder / "dog" / "c.png").unlink()
    Image.new("RGB", (64, 64), "white").save(folder / "red_cat" / "a.png")
    capsys.readouterr()
    assert train("a", "--resume") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "1 removed: dog/c.png" in err and "1 changed: red_cat/a.png" in err


def test_resume_without_a_run_says_so(train, capsys):
    assert train("a", "--resume") == 2
    assert "no run to resume" in capsys.readouterr().err


def test_broken_pictures_are_named_and_the_rest_is_trained(train, folder, tmp_path, capsys):
    (folder / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    whole = (folder / "dog" / "c.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert train("a") == 0
    err = capsys.readouterr().err
    assert "dog/broken.png" in err and "dog/cut.png" in err
    refused = json.loads((tmp_path / "tuned" / "a" / "run.json").read_text())["dataset"]["refused"]
    assert [r["path"] for r in refused] == ["dog/broken.png", "dog/cut.png"]


def test_nothing_usable_says_what_was_seen(train, folder, capsys):
    shutil.rmtree(folder / "dog")
    for path in (folder / "red_cat").iterdir():
        path.write_bytes(b"")
    assert train("a") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "no usable picture" in err and "red_cat/a.png" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--timestep-range", "700-0"], "0-700"),
        (["--background", "nocolour"], "nocolour"),
        (["--image-size", "60"], "60"),
        (["--images", "/nonexistent"], "/nonexistent"),
        (["--lr-schedule", "wave"], "wave"),
        (["--stepz", "3"], "did you mean '--steps'"),
        (["--load-model", "mini-sdd"], "mini-sd"),
        (["--device", "cudda"], "cudda"),
    ],
)
def test_wrong_settings_end_in_one_line_and_exit_2(train, args, said, capsys):
    assert train("a", *args) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and "Traceback" not in err


def test_a_run_is_never_written_into_its_dataset(train, folder, capsys):
    assert train("a", "--save-model", folder / "run") == 2
    assert "dataset" in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "run").exists()


def test_too_little_disk_is_said_before_the_first_step(train, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert train("a") == 4
    assert "GB of disk" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(train, tiny_sd_folder, folder, tmp_path):
    assert train("straight") == 0
    run = tmp_path / "tuned" / "left"
    args = ["train-sd", *options(tiny_sd_folder, folder, run)]
    process = start(*args)
    while process.poll() is None and not (run / "checkpoints").exists():
        time.sleep(0.005)
    began = time.monotonic()
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    process.communicate()
    assert process.returncode == 130 and time.monotonic() - began < 2
    assert train("left", "--resume") == 0
    assert digests(run) == digests(tmp_path / "tuned" / "straight")


def test_a_run_stopped_while_it_encodes_keeps_what_it_has(
    train, tiny_sd_folder, folder, tmp_path, monkeypatch, capsys
):
    encode = SdEncoders.encode_pictures

    def stopping(self, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    monkeypatch.setattr(SdEncoders, "encode_pictures", stopping)
    assert train("a") == 143
    assert "1 of 5 pictures encoded" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert train("a") == 0
    assert "pictures encoded: 4/4" in capsys.readouterr().err


def test_overwrite_takes_nothing_away_before_the_new_run_can_start(train, folder, tmp_path):
    assert train("a") == 0
    before = tree(tmp_path / "tuned" / "a")
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    assert train("a", "--overwrite") == 2
    assert tree(tmp_path / "tuned" / "a") == before


def test_a_run_never_replaces_the_model_it_starts_from(train, tmp_path, capsys):
    assert train("a") == 0
    before = tree(tmp_path / "tuned" / "a")
    assert train("a", "--load-model", tmp_path / "tuned" / "a", "--overwrite") == 2
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    assert tree(tmp_path / "tuned" / "a") == before


def test_a_refused_start_leaves_no_folder_behind(train, folder, tmp_path):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    assert train("a") == 2
    assert not (tmp_path / "tuned" / "a").exists()


@pytest.mark.parametrize(
    "extra", [["--dtype", "bf16"], ["--grad-checkpointing"], ["--flip", "--grad-accum", 2]]
)
def test_other_arithmetic_resumes_exactly_too(train, monkeypatch, tmp_path, extra):
    assert train("straight", *extra) == 0
    from sdlab.training import loop

    calls = iter([0, 0, signal.SIGTERM])
    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: next(calls))
    assert train("a", *extra) == 143
    monkeypatch.undo()
    assert train("a", "--resume") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(tmp_path / "tuned" / "straight")


def test_a_model_of_the_users_is_never_taken_for_a_run(train, tiny_sd, tmp_path, capsys):
    mine = tiny_sd("precious")
    before = tree(mine)
    for extra in ([], ["--overwrite"], ["--load-model", mine]):
        assert train("a", "--save-model", mine, *extra) == 2
    assert tree(mine) == before


def test_overwrite_checks_the_disk_before_it_removes_anything(train, tmp_path, monkeypatch):
    assert train("a") == 0
    before = tree(tmp_path / "tuned" / "a")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=-(10**12)))
    assert train("a", "--overwrite") == 4
    assert tree(tmp_path / "tuned" / "a") == before


def test_resume_and_overwrite_exclude_each_other(train, capsys):
    assert train("a", "--resume", "--overwrite") == 2
    assert "Give one of the two" in capsys.readouterr().err


def test_a_run_killed_while_it_encodes_can_be_resumed(train, monkeypatch, tmp_path):
    assert train("straight") == 0

    def killed(self, pixels):
        raise SystemExit(9)

    monkeypatch.setattr(SdEncoders, "encode_pictures", killed)
    cold = ["--cache-dir", tmp_path / "cold"]
    assert train("a", *cold) == 9
    monkeypatch.undo()
    assert sdlab("train-sd", "--save-model", tmp_path / "tuned" / "a", "--resume") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(tmp_path / "tuned" / "straight")


def test_a_changed_base_model_is_refused(train, tiny_sd, monkeypatch, capsys):
    model = tiny_sd("base")
    from sdlab.training import loop

    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: signal.SIGTERM)
    assert train("a", "--load-model", model) == 143
    monkeypatch.undo()
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    assert train("a", "--load-model", model, "--resume") == 2
    assert "the objective" in capsys.readouterr().err.splitlines()[-1]


def test_a_cache_in_the_dataset_is_refused(train, folder, capsys):
    before = tree(folder)
    assert train("a", "--cache-dir", folder / "cache") == 2
    assert "nothing is ever written into a dataset" in capsys.readouterr().err
    assert tree(folder) == before


def test_the_same_setting_in_other_words_resumes(train, monkeypatch):
    from sdlab.training import loop

    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: signal.SIGTERM)
    assert train("a", "--timestep-range", "0-700") == 143
    monkeypatch.undo()
    assert train("a", "--timestep-range", "0:700", "--device", "auto", "--resume") == 0


LORA = ["--adapter", "lora", "--rank", 4, "--alpha", 2]


def test_a_lora_run_has_in_diffusers_the_effect_that_it_has_here(train, tiny_sd_folder, tmp_path, capsys):
    import torch
    from diffusers import StableDiffusionPipeline

    from sdlab.models.lora import apply_loras
    from sdlab.models.resolve import newest_run, resolve

    assert train("a", *LORA) == 0
    err = capsys.readouterr().err
    assert "LoRA of rank 4 on" in err and "scale 0.5" in err
    run = tmp_path / "tuned" / "a"
    names = {p.name for p in run.iterdir()}
    assert "pytorch_lora_weights.safetensors" in names and not names & {"model_index.json", "unet", "vae"}
    averages = load_file(sorted((run / "checkpoints").iterdir())[-1] / "ema.safetensors")
    written = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(written) == len(averages) > 0
    for name, tensor in averages.items():
        scale = 0.5 if "lora_B" in name else 1.0
        assert torch.equal(written["unet." + name.replace(".default", "")], tensor * scale)
    model = resolve(str(run), training=False)
    assert model.path == tiny_sd_folder and newest_run(tmp_path / "tuned") == run
    base, mine, theirs = (
        StableDiffusionPipeline.from_pretrained(tiny_sd_folder, dtype=torch.float32) for _ in range(3)
    )
    apply_loras(mine, [(model.lora, 1.0)])
    theirs.load_lora_weights(run)
    draws = torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 8, 8, generator=draws), torch.randn(1, 77, 32, generator=draws)
    with torch.no_grad():
        out = [
            p.unet(noise, torch.tensor([9]), encoder_hidden_states=text).sample for p in (base, mine, theirs)
        ]
    effect = (out[2] - out[0]).abs().max()
    assert effect > 1e-4 and (out[1] - out[2]).abs().max() < 1e-2 * effect


@pytest.mark.parametrize("extra", [[], ["--grad-checkpointing", "--dtype", "bf16"]], ids=["plain", "lean"])
def test_a_lora_run_resumes_exactly(train, monkeypatch, tmp_path, extra):
    from sdlab.training import loop

    assert train("straight", *LORA, *extra) == 0
    calls = iter([0, 0, signal.SIGTERM])
    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: next(calls))
    assert train("a", *LORA, *extra) == 143
    monkeypatch.undo()
    assert sdlab("train-sd", "--save-model", tmp_path / "tuned" / "a", "--resume") == 0
    results = []
    for name in ("a", "straight"):
        run = tmp_path / "tuned" / name
        newest = sorted((run / "checkpoints").iterdir())[-1]
        files = [
            *sorted(newest.glob("*.safetensors")),
            run / "pytorch_lora_weights.safetensors",
            run / "log.jsonl",
        ]
        results.append([p.read_bytes() for p in files])
    assert results[0] == results[1]


def test_references_of_a_dataset_are_left_out_and_that_is_said(train, folder, capsys):
    Image.new("RGB", (64, 64), "white").save(folder / "dog" / "c.ref.png")
    assert train("a", "--steps", 1) == 0
    assert "reference pictures are not used (1)" in capsys.readouterr().err


def test_a_model_of_another_family_names_its_command(train, tiny_klein_folder, capsys):
    assert train("a", "--load-model", tiny_klein_folder) == 2
    assert "Use sdlab train-flux2" in capsys.readouterr().err.splitlines()[-1]
