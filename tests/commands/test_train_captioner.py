"""``sdlab train-captioner`` as a user runs it, on six drawn pictures and tiny models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdlab.testing.scenes import Scene, draw
from tests.models.helpers import edit_json
from tests.program import sdlab, start

SCENES = (
    Scene("circle", "red", "blue"), Scene("square", "green", "white"), Scene("star", "yellow", "black"),
    Scene("heart", "purple", "orange"), Scene("cross", "blue", "yellow"), Scene("ring", "white", "red"),
)  # fmt: skip
CAPTIONS = [f"a {scene.colour} {scene.shape} on {scene.background}" for scene in SCENES]
SIZES = ((64, 64), (48, 80), (80, 48), (64, 64), (90, 90), (33, 64))
TINY = {
    "model_type": "blip",
    "text_config": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 24,
    },
    "vision_config": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures: two with .cap files, two with .txt files, two whose folder says it."""
    root = tmp_path / "images"
    for number, (scene, caption, size) in enumerate(zip(SCENES, CAPTIONS, SIZES, strict=True)):
        place = root / (caption.replace(" ", "_") if number > 3 else "heap")
        place.mkdir(parents=True, exist_ok=True)
        draw(scene, size).save(place / f"{number}.png")
        if number <= 3:
            (place / f"{number}.{'cap' if number < 2 else 'txt'}").write_text(f"# by hand\n{caption}\n")
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def options(images: Path, run: Path, **changed: object) -> list[object]:
    settled = {
        "images": images, "save_model": run, "steps": 6, "batch": 4, "lr": "1e-2", "warmup": 2, "device": "cpu",
        "label_smoothing": 0, "save_every": 2, "preview_every": 3, **changed,
    }  # fmt: skip
    return [word for name, value in settled.items() for word in (f"--{name.replace('_', '-')}", value)]


def digests(run: Path) -> dict[str, str]:
    """sha256 of what a run's seed determines."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = [
        *sorted(newest.glob("*.safetensors")),
        *(run / n for n in ("model.safetensors", "log.jsonl", "tokenizer.json")),
    ]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_from_nothing_it_learns_to_say_six_captions(
    folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run, new = tmp_path / "tuned" / "six", tmp_path / "new"
    args = options(folder, run, init=tiny, steps=70, batch=6, held_out=0, preview_every=0, save_every=0)
    assert sdlab("train-captioner", *args) == 0
    told = capsys.readouterr().err
    assert "6 pictures, 0 held out; 6 captions (2 from .cap files, 2 from folders, 2 from .txt files)" in told
    assert f"--load-model {run}" in told
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    names = {path.name for path in run.iterdir()}
    assert names == {
        "run.json", "log.jsonl", "loss.png", "samples", "checkpoints", "dataset.json", "config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "preprocessor_config.json",
    } | (names & {"special_tokens_map.json", "generation_config.json"})  # fmt: skip
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-000000.png", "step-000070.png"]
    new.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.png"), key=lambda p: p.name)):
        shutil.copy(path, new / f"{number}.png")
    assert sdlab("categorize", new, "--caption", "--load-model", run, "--device", "cpu") == 0
    assert [(new / f"{n}.cap").read_text().strip() for n in range(6)] == CAPTIONS
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished" and record["step"] == record["steps"] == 70
    assert record["family"] == "blip" and record["dataset"]["captions"] == 6
    assert sdlab("generate", "a", "--load-model", run) == 2  # it is no model that draws


def test_a_known_captioner_learns_on_and_is_measured_on_what_it_has_not_seen(
    folder: Path, tiny_blip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tuned" / "on"
    args = options(folder, run, load_model=tiny_blip_folder, held_out=0.34, lr="3e-3")
    assert sdlab("train-captioner", *args, "--half", "--flip") == 0
    told = capsys.readouterr().err
    assert "2 held out" in told
    log = log_of(run)
    assert [line["step"] for line in log if "val_loss" in line] == [3, 6]
    assert all(0 <= line["val_exact"] <= 1 for line in log if "val_exact" in line)
    assert log[-1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"step-00000{n}.png" for n in (0, 3, 6)]
    assert json.loads((run / "config.json").read_text())["dtype"] == "float16"
    assert (run / "tokenizer.json").read_bytes() == (tiny_blip_folder / "tokenizer.json").read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (tiny_blip_folder, run))
    assert before.keys() - after.keys() <= {"text_decoder.cls.predictions.decoder.weight",
                                            "text_decoder.cls.predictions.decoder.bias"}  # fmt: skip
    assert (
        sdlab("train-captioner", *options(folder, tmp_path / "tuned" / "more", load_model=run, steps=1)) == 0
    )


@pytest.mark.parametrize("how", ["fresh", pytest.param("known", marks=pytest.mark.slow)])
def test_a_signal_saves_and_resume_gives_the_same_bits(
    folder: Path, tiny: Path, tiny_blip_folder: Path, tmp_path: Path, how: str
) -> None:
    source = {"init": tiny} if how == "fresh" else {"load_model": tiny_blip_folder}
    straight, stopped = tmp_path / "tuned" / "straight", tmp_path / "tuned" / "stopped"
    settings = {**source, "steps": 24, "preview_every": 8, "held_out": 0.3, "save_every": 0}
    flags = ["--flip", "--ema", "--num-workers", 2]
    assert sdlab("train-captioner", *options(folder, straight, **settings), *flags) == 0
    process = start("train-captioner", *options(folder, stopped, **settings), *flags)
    log = stopped / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) > 2):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "--resume" in err.splitlines()[-1] and len(log_of(stopped)) < 24
    assert sdlab("categorize", folder, "--load-model", stopped) == 2  # there is no result yet
    assert sdlab("train-captioner", "--save-model", stopped, "--resume") == 0
    assert digests(stopped) == digests(straight)


def test_another_caption_or_other_words_stop_a_resume(
    folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=2)) == 0
    edit_json(run / "run.json", state="stopped")
    (folder / "heap" / "0.cap").write_text("a zebra")
    capsys.readouterr()
    assert sdlab("train-captioner", "--save-model", run, "--resume") == 2
    assert "1 changed: heap/0.png" in capsys.readouterr().err


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that was told, which is the refusal."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("sdlab: error:")
    return lines[-1]


def test_pictures_without_captions_are_left_out_and_none_at_all_is_refused(
    pictures: Callable[..., Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = pictures({"a.png": (40, 40), "_b/c.png": (40, 40)}), tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(root, run, init=tiny)) == 2
    assert "no picture has a caption" in one_line(capsys)
    assert not run.exists()
    (root / "a.txt").write_text("a cat")
    assert sdlab("train-captioner", *options(root, run, init=tiny), "--no-txt") == 2
    assert "no picture has a caption" in one_line(capsys)
    assert sdlab("train-captioner", *options(root, run, init=tiny, steps=1)) == 0  # one picture is enough
    assert "left out, as they have no caption: 1 picture" in capsys.readouterr().err


def test_what_of_the_captions_cannot_be_learned_is_told(
    folder: Path, tiny_blip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "heap" / "1.cap").write_text("a ☃")
    (folder / "heap" / "0.cap").write_text("a ☃ on " + " ".join(["blue"] * 30))
    args = options(folder, tmp_path / "tuned" / "a", load_model=tiny_blip_folder, steps=1)
    assert sdlab("train-captioner", *args) == 0
    told = capsys.readouterr().err
    assert "cut, as the captioner can say no more: 1 caption, such as 'a ☃ on blue" in told
    assert "not in the captioner's vocabulary, so not learned: 4 words, such as ☃, " in told


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--image-size", 64], "the captioner sees squares of 32 px"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "Give one of the two"),
        (["--load-model", "mini-sd"], "makes pictures and does not describe them"),
        (["--init", "huge"], "no size that we know"),
        (["--init", "small", "--image-size", 100], "100 is not a multiple of 12.*Try 108"),
        (["--init", "small", "--image-size", 17], "17 is not a multiple of 12.*Try 24"),
        (["--images", "nowhere"], "no such folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    folder: Path, tiny_blip_folder: Path, tmp_path: Path, args: list[object], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    run = tmp_path / "tuned" / "a"
    source = [] if "--init" in args else ["--load-model", tiny_blip_folder]
    assert sdlab("train-captioner", *options(folder, run), *source, *args) == 2
    assert re.search(said, one_line(capsys))
    assert not run.exists()


def test_a_run_is_not_written_over_and_neither_is_its_source(
    folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=1)) == 0
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=1)) == 2
    assert "holds a run already" in one_line(capsys)
    assert sdlab("train-captioner", *options(folder, run, load_model=run), "--overwrite") == 2
    assert "is what to start from" in one_line(capsys)
    assert sdlab("train-captioner", *options(folder, run, init=run), "--overwrite") == 2
    assert "is what to start from" in one_line(capsys)
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=2), "--overwrite") == 0
    assert len(log_of(run)) == 2
    captioner = tmp_path / "own"
    captioner.mkdir()
    (captioner / "config.json").write_text("{}")
    assert sdlab("train-captioner", *options(folder, captioner, init=tiny)) == 2
    assert "not a run's" in one_line(capsys) and (captioner / "config.json").read_text() == "{}"


def test_a_picture_that_does_not_open_is_refused_before_the_first_step(
    folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "heap" / "0.png"
    path.write_bytes(path.read_bytes()[:-40])
    run = tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=2)) == 0
    assert "heap/0.png: a damaged PNG file" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["dataset"]["pictures"] == 5


def test_copies_of_a_picture_are_on_one_side_and_a_new_captioner_learns_no_held_out_word(
    folder: Path, tiny: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.with_suffix(".cap").write_text(f"one word{chr(97 + number)}x")
        shutil.copy(path, path.with_name(f"copy{number}.png"))
        path.with_name(f"copy{number}.cap").write_text(f"two word{chr(97 + number)}y")
    run = tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=2, held_out=0.3)) == 0
    assert json.loads((run / "run.json").read_text())["dataset"]["held_out"] == 4
    words = {word for word in (run / "vocab.txt").read_text().splitlines() if word.startswith("word")}
    assert len(words) == 8
    assert {word[:-1] + "x" for word in words} <= words


def test_the_file_that_makes_a_folder_a_captioner_is_moved_in_last(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, replace = list[str](), os.replace

    def watched(source: Path, target: Path) -> None:
        if ".export-" in str(source):
            moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert sdlab("train-captioner", *options(folder, tmp_path / "tuned" / "a", init=tiny, steps=1)) == 0
    assert "model.safetensors" in moved and moved[-1] == "config.json"


@pytest.mark.parametrize(
    "flags", [["--grad-checkpointing"], ["--dtype", "bf16"], ["--optimizer", "adafactor"]]
)
def test_options_of_other_trainers_work_here(
    folder: Path, tiny: Path, tmp_path: Path, flags: list[str]
) -> None:
    run = tmp_path / "tuned" / "a"
    assert sdlab("train-captioner", *options(folder, run, init=tiny, steps=12), *flags) == 0
    log = log_of(run)
    assert log[-1]["loss"] < log[0]["loss"]
