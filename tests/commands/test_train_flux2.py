"""``sdlab train-flux2`` as a user runs it, on tiny models with random weights."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlab.commands import train_flux2
from sdlab.commands.training import frozen_bytes
from sdlab.models.bases import recommended_for
from sdlab.models.flux2 import Flux2, Flux2Encoders
from sdlab.models.lora import apply_loras, targets
from sdlab.models.opening import open_family
from sdlab.models.resolve import newest_run, resolve
from tests.program import sdlab, start

FILES = {"red_cat/a.png": (64, 64), "red_cat/b.png": (64, 64), "dog/c.png": (48, 96)}
LORA = ["--adapter", "lora", "--rank", 4, "--alpha", 2]
LEAN = [
    "--optimizer",
    "adafactor",
    "--weights",
    "bf16",
    "--fused-backward",
    "--grad-checkpointing",
    "--no-ema",
]


@pytest.fixture
def folder(pictures) -> Path:
    return pictures(FILES)


@pytest.fixture
def edits(folder) -> Path:
    """Half of the pictures have references: one, and two of other sizes."""
    for name, sizes in (("red_cat/a", [(64, 64)]), ("dog/c", [(64, 64), (96, 48)])):
        for index, (height, width) in enumerate(sizes):
            path = folder / f"{name}.ref{index + 1 if index else ''}.png"
            Image.new("RGB", (width, height), (40 * index, 200, 90)).save(path)
        (folder / f"{name}.cap").write_text("make it blue")
    return folder


@pytest.fixture
def train(tiny_klein_folder, folder, tmp_path):
    def run(name: str, *args: object) -> int:
        return sdlab("train-flux2", *options(tiny_klein_folder, folder, tmp_path / "tuned" / name), *args)

    return run


def options(model: Path, images: Path, run: Path) -> list[object]:
    return [
        "--images", images, "--load-model", model, "--save-model", run, "--image-size", 64, "--batch", 2,
        "--steps", 4, "--lr", "1e-3", "--lr-schedule", "constant", "--warmup", 0, "--save-every", 2,
        "--device", "cpu", "--preview-every", 0, "--preview-prompt", "dog",
    ]  # fmt: skip


def digests(run: Path) -> dict[str, str]:
    """sha256 of what a run's seed determines: the last checkpoint's tensors, the result and the log."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    results = [run / "pytorch_lora_weights.safetensors", *(run / "transformer").glob("*.safetensors")]
    files = [*sorted(newest.glob("*.safetensors")), *[p for p in results if p.exists()], run / "log.jsonl"]
    assert len(files) >= 4
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_a_run_leaves_a_pipeline_that_diffusers_opens(train, tiny_klein_folder, tmp_path):
    from diffusers import Flux2KleinPipeline

    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    names = {p.name for p in run.iterdir()}
    assert names >= {"model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "run.json",
                     "log.jsonl", "loss.png", "samples", "checkpoints"}  # fmt: skip
    mine = Flux2KleinPipeline.from_pretrained(run, dtype=torch.float32)
    base = Flux2KleinPipeline.from_pretrained(tiny_klein_folder, dtype=torch.float32)
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(mine, part).state_dict(), getattr(base, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    ours, theirs = mine.transformer.state_dict(), base.transformer.state_dict()
    changed = [n for n in theirs if not torch.equal(ours[n], theirs[n])]
    assert len(changed) > 0.9 * len(theirs)
    said = record(run)
    assert said["state"] == "finished" and said["adapter"] == {"kind": "full"} and said["family"] == "flux2"
    assert said["objective"] == {"sampling": "logit-normal", "shift": 5.0}  # of small models; see below
    assert resolve(str(run), training=False).family == "flux2"


@pytest.mark.parametrize("base", ["flux2-klein-base-4b", "flux2-klein-base-9b", "flux2-dev"])
def test_the_released_models_are_shifted_by_the_pictures_size(base):
    assert train_flux2.parse_shift(recommended_for(base, 1024).shift) is None
    assert train_flux2.parse_shift("3") == 3.0


def test_the_old_names_work(tiny_klein_folder, folder, tmp_path):
    run = tmp_path / "old"
    assert sdlab("train-flux2", "--load-model", tiny_klein_folder, "--train-dir", folder, "--output-model", run,
                 "--epochs", 1, "--lr", "1e-5", "--batch-size", 1, "--preview-prompt", "dog") == 0  # fmt: skip
    config = record(run)["config"]
    assert (config["epoch"], config["lr"], config["batch"], record(run)["steps"]) == (1, 1e-5, 1, 3)


def test_vae_and_text_encoder_are_never_there_together_and_gone_before_the_transformer(train, monkeypatch):
    alive: dict[str, weakref.ref] = {}
    module_of, load_denoiser = Flux2Encoders._module, Flux2.load_denoiser

    def remember(self, part, dtype):
        module = module_of(self, part, dtype)
        gc.collect()
        alive[part.name] = weakref.ref(module)
        assert [name for name, ref in alive.items() if ref() is not None] == [part.name]
        return module

    def check(self, device, dtype):
        gc.collect()
        assert set(alive) == {"vae", "text_encoder"} and all(ref() is None for ref in alive.values())
        return load_denoiser(self, device, dtype)

    monkeypatch.setattr(Flux2Encoders, "_module", remember)
    monkeypatch.setattr(Flux2, "load_denoiser", check)
    assert train("a") == 0


def test_a_lora_run_leaves_its_lora_and_is_a_model_to_draw_with(train, tiny_klein_folder, tmp_path, capsys):
    assert train("a", *LORA) == 0
    err = capsys.readouterr().err
    assert "LoRA of rank 4 on 28 layers" in err and "scale 0.5" in err
    run = tmp_path / "tuned" / "a"
    assert not (run / "model_index.json").exists() and not (run / "transformer").exists()
    said = record(run)
    assert said["adapter"]["kind"] == "lora" and (said["adapter"]["rank"], said["adapter"]["scale"]) == (
        4,
        0.5,
    )
    assert said["model"]["path"] == str(tiny_klein_folder.resolve())
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    trained = load_file(newest / "weights.safetensors")
    assert len(trained) == len(tensors) == 2 * 28
    for name, tensor in trained.items():
        written = tensors["transformer." + name.replace(".default", "")]
        assert torch.equal(written, tensor * (0.5 if "lora_B" in name else 1.0)) and tensor.abs().max() > 0
    model = resolve(str(run), training=False)
    assert model.lora == run / "pytorch_lora_weights.safetensors" and model.path == tiny_klein_folder
    assert newest_run(tmp_path / "tuned") == run
    family = open_family(model)
    pipeline = family.pipeline(family.load_denoiser(torch.device("cpu"), torch.float32))
    apply_loras(pipeline, [(model.lora, 1.0)])
    layer = pipeline.transformer.get_submodule(targets_of(family)[0])
    assert torch.equal(
        layer.lora_A["default"].weight, tensors[f"transformer.{targets_of(family)[0]}.lora_A.weight"]
    )


def targets_of(family) -> list[str]:
    return targets(family.load_denoiser(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_kill_9_and_resume_gives_the_same_bits(train, tiny_klein_folder, folder, tmp_path, extra):
    assert train("straight", *extra) == 0
    run = tmp_path / "tuned" / "killed"
    args = ["train-flux2", *options(tiny_klein_folder, folder, run), *extra, "--cache-dir", tmp_path / "cold"]
    process = start(*args)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) >= 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert record(run)["state"] == "running"
    assert sdlab("train-flux2", "--save-model", run, "--resume") == 0  # its own options are remembered
    assert digests(run) == digests(tmp_path / "tuned" / "straight")


def stopped_after_three(train, monkeypatch, name: str, *extra: object) -> None:
    from sdlab.training import loop

    calls = iter([0, 0, signal.SIGTERM])
    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: next(calls))
    assert train(name, *extra) == 143
    monkeypatch.undo()


@pytest.mark.parametrize(
    "extra",
    [
        LEAN,
        ["--optimizer", "adamw8bit", "--weights", "bf16"],
        [*LORA, "--dtype", "bf16", "--ema", "--grad-checkpointing"],
    ],
    ids=["adafactor fused bf16", "8-bit bf16", "lora on bf16"],
)  # fmt: skip
def test_the_lean_ways_learn_and_resume_exactly_too(train, edits, monkeypatch, tmp_path, extra):
    assert train("straight", *extra) == 0
    straight = tmp_path / "tuned" / "straight"
    stopped_after_three(train, monkeypatch, "a", *extra)
    assert train("a", *extra, "--resume") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(straight)
    weights = load_file(sorted((straight / "checkpoints").iterdir())[-1] / "weights.safetensors")
    wanted = torch.float32 if "lora" in extra else torch.bfloat16
    assert {t.dtype for t in weights.values()} == {wanted}


def test_checkpointing_changes_no_number(train, tmp_path):
    logs = []
    for name, extra in (("with", ["--grad-checkpointing"]), ("without", [])):
        assert train(name, *LORA, *extra) == 0
        logs.append((tmp_path / "tuned" / name / "log.jsonl").read_bytes())
    assert logs[0] == logs[1]


def test_a_distilled_klein_is_refused_or_warned_of_with_the_reason(tiny_flux2, folder, tmp_path, capsys):
    model = tiny_flux2("distilled", is_distilled=True)
    args = ["train-flux2", *options(model, folder, tmp_path / "tuned" / "a"), "--steps", 1]
    assert sdlab(*args) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "four steps" in err and "--allow-distilled" in err and "flux2-klein-base-4b" in err
    assert not (tmp_path / "tuned" / "a").exists()
    calls = drawn(args[1:], tmp_path, "--allow-distilled")
    assert "four steps" in capsys.readouterr().err
    assert {(c["num_inference_steps"], c["guidance_scale"]) for c in calls} == {(4, 1.0)}


def drawn(args: list[object], tmp_path: Path, *more: object) -> list[dict]:
    """What a run's previews asked of the pipeline, which is not really called."""
    calls = []

    def pipeline(self, denoiser, conds=None):
        def call(**asked):
            assert asked["prompt"] in conds and "" in conds
            calls.append(asked)
            return SimpleNamespace(images=[Image.new("RGB", (asked["width"], asked["height"]))])

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux2, "pipeline", pipeline)
        assert sdlab("train-flux2", *args, *more) == 0
    return calls


def test_previews_have_the_models_steps_and_guidance_and_edit_with_references(
    tiny_klein_folder, edits, tmp_path
):
    args = options(tiny_klein_folder, edits, tmp_path / "tuned" / "a")[:-2]
    calls = drawn([*args, "--steps", 1], tmp_path)
    assert {(c["num_inference_steps"], c["guidance_scale"]) for c in calls} == {(15, 4.0)}
    by_prompt = {c["prompt"]: c for c in calls}
    assert set(by_prompt) == {"make it blue", "red cat"}
    assert "image" not in by_prompt["red cat"]
    assert (by_prompt["red cat"]["height"], by_prompt["red cat"]["width"]) == (64, 64)
    edit = by_prompt[
        "make it blue"
    ]  # of the first sample, dog/c: two references, itself twice as wide as high
    assert [image.size for image in edit["image"]] == [
        (64, 64),
        (96, 192),
    ]  # twice: pipelines refuse sides below 64
    assert (edit["height"], edit["width"]) == (48, 96)
    with Image.open(tmp_path / "tuned" / "a" / "samples" / "step-000001.png") as sheet:
        assert min(sheet.size) > 2 * 96  # four tiles: two references, an edit, a picture


def test_edits_are_trained_with_their_references_and_stay_the_same_when_resumed(
    train, edits, tmp_path, monkeypatch, capsys
):
    seen = []
    loss = Flux2.loss

    def look(self, denoiser, batch, rng):
        seen.append(sorted(name for name in batch.cond if name.startswith("reference_")))
        return loss(self, denoiser, batch, rng)

    monkeypatch.setattr(Flux2, "loss", look)
    assert train("a") == 0
    monkeypatch.undo()
    assert "3 pictures (2 with reference pictures)" in capsys.readouterr().err
    assert [] in seen and ["reference_0"] in seen and ["reference_0", "reference_1"] in seen
    assert record(tmp_path / "tuned" / "a")["dataset"]["with_references"] == 2
    stopped_after_three(train, monkeypatch, "b")
    Image.new("RGB", (64, 64), "white").save(edits / "red_cat" / "a.ref.png")
    capsys.readouterr()
    assert train("b", "--resume") == 2
    assert "1 changed: red_cat/a.png" in capsys.readouterr().err.splitlines()[-1]


def test_the_memory_is_told_before_anything_is_loaded(train, edits, monkeypatch, capsys):
    def never(self, device, dtype):
        raise AssertionError("loaded")

    monkeypatch.setattr(train_flux2, "LARGE", 0)
    monkeypatch.setattr(Flux2, "load_denoiser", never)
    monkeypatch.setattr(Flux2, "load_encoders", never)
    assert train("a") == 1
    err = capsys.readouterr().err
    assert err.index("GiB of the card's memory") < err.index("loaded")


@pytest.mark.parametrize(
    ("extra", "fits"),
    [({}, "--adapter full --optimizer adafactor"), ({"adapter": "lora"}, ""), ({"image_size": 2048}, "")],
)
def test_a_card_that_is_too_small_is_told_what_would_fit(monkeypatch, capsys, extra, fits):
    from sdlab.dataset.buckets import Item
    from sdlab.models.bases import RECOMMENDED
    from sdlab.training.record import settle

    size = SimpleNamespace(
        num_parameters=9_078_581_248,
        num_blocks=32,
        width=4096,
        num_lora_parameters=lambda rank: 2_718_720 * rank,
    )
    monkeypatch.setattr(train_flux2, "_card_gib", lambda device: 24.0)
    config = train_flux2.TrainFlux2Config(optimizer="adamw8bit", **{"adapter": "full", **extra})
    settled = settle(config, RECOMMENDED["flux2-klein-base-9b"])
    side = settled.image_size
    sample = SimpleNamespace(id="a", references=())
    tell = train_flux2.memory_teller(settled, size, grid=16, window=512)
    tell([Item(sample, (side, side), reference_sizes=((side, side),))], torch.device("cuda"))
    err = capsys.readouterr().err
    assert "GiB of the card's memory" in err
    assert ("less than the run needs" in err) == (settled.adapter == "full")
    assert fits in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--shift", "wide"], "--shift"),
        (["--shift", "0"], "--shift"),
        (["--timestep-sampling", "cubic"], "cubic"),
        (["--rank", "8"], "--rank is of a LoRA"),
        (["--adapter", "lora", "--weights", "bf16"], "--weights"),
        (["--image-size", "60"], "60"),
        (["--load-model", "mini-sd"], "Use sdlab train-sd"),
        (["--fused-backward", "--grad-accum", "2"], "--grad-accum"),
        (["--resume", "--overwrite"], "Give one of the two"),
    ],
)
def test_wrong_settings_end_in_one_line_and_exit_2(train, args, said, capsys):
    assert train("a", *args) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and "Traceback" not in err


def test_a_run_is_not_taken_for_what_it_is_not(train, tmp_path, capsys):
    """A LoRA's run is no model to train on, and never replaces the model it starts from."""
    assert train("lora", *LORA, "--steps", 1) == 0
    assert train("b", "--load-model", tmp_path / "tuned" / "lora") == 2
    assert "cannot be trained on" in capsys.readouterr().err.splitlines()[-1]
    assert train("lora", *LORA) == 2
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert train("lora", "--overwrite", "--steps", 1) == 0
    assert not (tmp_path / "tuned" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "tuned" / "lora" / "model_index.json").exists()


def test_dev_trains_a_lora(tiny_dev_folder, folder, tmp_path):
    assert sdlab("train-flux2", *options(tiny_dev_folder, folder, tmp_path / "dev"), *LORA, "--steps", 2) == 0
    log = [json.loads(line) for line in (tmp_path / "dev" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(0 < entry["loss"] < 100 for entry in log)


def test_the_disk_is_checked_for_all_that_is_copied(tiny_klein_folder):
    family = open_family(resolve(str(tiny_klein_folder), training=True))
    files = [
        *tiny_klein_folder.glob("vae/*.safetensors"),
        *tiny_klein_folder.glob("text_encoder/*.safetensors"),
    ]
    assert frozen_bytes(family.parts) == sum(path.stat().st_size for path in files) > 0
