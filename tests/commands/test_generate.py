"""`sdlab generate` as a user meets it: files, exit codes, and the same picture again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlab import cli
from sdlab.inference.record import container, metadata

QUICK = ["--steps", "3", "--seed", "7"]


@dataclass(frozen=True)
class Ran:
    code: int
    paths: list[Path]
    err: str


@pytest.fixture
def sdlab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run the program in tmp_path: ``sdlab("generate", "--prompt", "x")`` gives code, printed paths, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*args: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        told = capsys.readouterr()
        return Ran(int(ended.value.code or 0), [Path(line) for line in told.out.splitlines()], told.err)

    return run


@pytest.fixture
def model(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """The name of a copy of the tiny model in tmp_path, where `sdlab` runs."""
    shutil.copytree(tiny_sd_folder, tmp_path / "models" / "tiny")
    return Path("models/tiny")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def rewritten(path: Path, target: Path, **changes: Any) -> Path:
    """A copy of the picture with another recipe."""
    about = {**metadata.read(path), **changes}
    with Image.open(path) as image:
        target.write_bytes(container.png(image, container.texts(about)))
    return target


def damage(path: Path) -> None:
    """Change one byte of the last tensor, size and header kept."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_files_are_named_printed_and_hold_their_recipe(sdlab: Callable[..., Ran], model: Path) -> None:
    ran = sdlab(
        "generate", "--load-model", model, "--prompt", "red star", "--num", 2, "--negative", "ugly", *QUICK
    )
    assert ran.code == 0 and [path.exists() for path in ran.paths] == [True, True]
    assert [path.parent for path in ran.paths] == [Path("output")] * 2
    assert all(
        path.name.startswith("sd_") and path.stem.endswith(f"_000{i}") for i, path in enumerate(ran.paths)
    )
    about = metadata.read(ran.paths[1])
    assert about["prompt"] == "red star" and about["negative"] == "ugly" and about["seed"] == 8
    assert about["prompt_sent"] == "(masterpiece), best quality, best composition, red star"
    assert (about["width"], about["height"], about["steps"], about["guidance"]) == (64, 64, 3, 7.0)
    assert about["model"]["asked"] == "models/tiny" and about["versions"]["torch"]
    assert "models/tiny" in ran.err and "seed 7" in ran.err
    assert not list(Path("output").glob(".*"))


def test_seed_is_random_and_printed_when_not_given(sdlab: Callable[..., Ran], model: Path) -> None:
    ran = [sdlab("generate", "--load-model", model, "--prompt", "x", "--steps", 1) for _ in range(2)]
    seeds = [metadata.read(one.paths[0])["seed"] for one in ran]
    assert seeds[0] != seeds[1] and all(
        f"seed {seed}" in one.err for seed, one in zip(seeds, ran, strict=True)
    )


@pytest.mark.parametrize(
    ("flags", "sent"),
    [(["--no-prefix"], "cat"), (["--prefix", "sks, "], "sks, cat"), (["--prefix", ""], "cat")],
)
def test_prefix_rule(sdlab: Callable[..., Ran], model: Path, flags: list[str], sent: str) -> None:
    ran = sdlab("generate", "--load-model", model, "--prompt", "cat", *flags, *QUICK)
    assert metadata.read(ran.paths[0])["prompt_sent"] == sent


def test_exact_gives_the_same_bytes_for_any_batch(sdlab: Callable[..., Ran], model: Path) -> None:
    job = ["generate", "--load-model", model, "--prompt", "red", "--prompt", "blue", "--num", 2, *QUICK]
    job += ["--scheduler", "euler a"]
    runs = [sdlab(*job, "--exact", "--batch", size, "--output", f"b{size}").paths for size in (1, 3)]
    first = [path.read_bytes() for path in runs[0]]
    assert len(set(first)) == 4
    assert [[path.read_bytes() for path in paths] for paths in runs[1:]] == [first]
    together = sdlab(*job, "--batch", 3, "--output", "together").paths
    for one, other in zip(runs[0], together, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


AGAIN = """
import sys
from sdlab import cli
for picture in sys.argv[1:]:
    try:
        cli.main(["generate", "--from", picture, "--output", "again"])
    except SystemExit as ended:
        assert not ended.code, ended.code
"""


def test_any_picture_is_made_again_bit_for_bit_in_a_new_process(
    sdlab: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    first: list[Path] = []
    for name, extra in [
        ("", ["--num", 3, "--batch", 3, "--prompt", "two\nlines"]),
        ("euler a", ["--num", 2, "--batch", 2, "--width", 96]),
        ("dpm++ 2m sde karras", ["--exact", "--no-prefix"]),
    ]:
        job = ["generate", "--load-model", model, "--prompt", "猫 cat", "--scheduler", name, *QUICK, *extra]
        first.append(sdlab(*job).paths[-1])
    edit = ["img2img", "--load-model", model, "--prompt", "b", "--init-image", first[0], "--scheduler", "lcm"]
    first.append(sdlab(*edit, "--num", 2, "--batch", 2, "--steps", 8).paths[-1])
    ran = subprocess.run(
        [sys.executable, "-c", AGAIN, *map(str, first)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # the recipe's one thread must win
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "differ" not in ran.stderr
    again = [tmp_path / line for line in ran.stdout.splitlines()]
    assert len(again) == 4
    for one, other in zip(first, again, strict=True):
        assert (pixels(one) == pixels(other)).all()
        assert metadata.read(one) == metadata.read(other)
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_changed_file_is_named_and_nothing_is_made(sdlab: Callable[..., Ran], model: Path, name: str) -> None:
    picture = sdlab("generate", "--load-model", model, "--prompt", "x", *QUICK).paths[0]
    if name.endswith(".json"):
        text = (model / name).read_text()
        (model / name).write_text(text.replace("0.012", "0.013"))
    else:
        damage(model / name)
    ran = sdlab("generate", "--from", picture, "--output", "again")
    assert ran.code == 2 and ran.paths == [] and f"models/tiny/{name} has changed" in ran.err
    assert not list(Path("again").glob("*"))


def test_model_that_moved_is_taken_from_where_it_is_now(
    sdlab: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = sdlab("generate", "--load-model", model, "--prompt", "x", *QUICK).paths[0].absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # found from the picture's own place
    assert (pixels(sdlab("generate", "--from", picture).paths[0]) == pixels(picture)).all()
    monkeypatch.chdir(tmp_path)
    model.rename("moved")
    ran = sdlab("generate", "--from", picture)
    assert ran.code == 2 and "models/tiny is no longer there" in ran.err and "--load-model" in ran.err
    again = sdlab("generate", "--from", picture, "--load-model", "moved").paths[0]
    assert (pixels(again) == pixels(picture)).all()


def test_folder_named_like_a_model_is_still_the_folder(sdlab: Callable[..., Ran], model: Path) -> None:
    model.rename("mini-sd")
    made = sdlab("generate", "--load-model", "./mini-sd", "--prompt", "x", *QUICK).paths[0]
    assert metadata.read(made)["model"]["asked"] == "mini-sd"
    assert (pixels(sdlab("generate", "--from", made).paths[0]) == pixels(made)).all()


def test_swapped_unet_is_recorded_checked_and_used_again(
    sdlab: Callable[..., Ran], model: Path, tiny_sd: Callable[..., Path]
) -> None:
    other = tiny_sd("other", seed=1).relative_to(Path.cwd())
    job = ["generate", "--load-model", model, "--prompt", "x", *QUICK]
    plain, swapped = sdlab(*job).paths[0], sdlab(*job, "--unet", other / "unet").paths[0]
    assert (pixels(plain) != pixels(swapped)).any()
    assert metadata.read(swapped)["unet"]["asked"] == "other/unet"
    assert (pixels(sdlab("generate", "--from", swapped).paths[0]) == pixels(swapped)).all()
    damage(other / "unet" / "diffusion_pytorch_model.safetensors")
    ran = sdlab("generate", "--from", swapped)
    assert ran.code == 2 and "other/unet/diffusion_pytorch_model.safetensors has changed" in ran.err


def test_other_versions_and_hardware_are_warned_of(sdlab: Callable[..., Ran], model: Path) -> None:
    picture = sdlab("generate", "--load-model", model, "--prompt", "x", *QUICK).paths[0]
    versions = {**metadata.read(picture)["versions"], "torch": "1.0"}
    rewritten(picture, Path("old.png"), versions=versions, hardware="abacus", device="cuda", dtype="float32")
    ran = sdlab("generate", "--from", "old.png")
    assert ran.code == 0
    for difference in ("torch version was 1.0", "hardware was abacus", "device was cuda, is cpu"):
        assert difference in ran.err


def test_from_takes_everything_from_the_picture(sdlab: Callable[..., Ran], model: Path) -> None:
    picture = sdlab("generate", "--load-model", model, "--prompt", "x", *QUICK).paths[0]
    ran = sdlab("generate", "--from", picture, "--steps", 9, "--prompt", "y")
    assert ran.code == 2 and "--prompt" in ran.err and "--steps" in ran.err and len(ran.err.splitlines()) == 1
    ran = sdlab("generate", "--from", "gone.png")
    assert ran.code == 2 and "gone.png" in ran.err


def test_nan_gives_an_error_and_no_file(sdlab: Callable[..., Ran], model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"] = weights["conv_out.weight"] * 0 + 3e38  # finite, but not what it gives
    save_file(weights, path, metadata={"format": "pt"})
    ran = sdlab("generate", "--load-model", model, "--prompt", "x", "--num", 50, "--grid", *QUICK)
    assert ran.code == 3 and ran.paths == [] and "not finite" in ran.err
    assert [path.name for path in Path("output").iterdir()] == ["report.json"]


def test_ctrl_c_keeps_what_is_finished(
    sdlab: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlab.inference.engines.sd import Sampler

    sample = Sampler.sample

    def until_the_third(self: Sampler, batch: Any, spec: Any, **settings: Any) -> Any:
        if batch[0].index == 2:
            raise KeyboardInterrupt
        return sample(self, batch, spec, **settings)

    monkeypatch.setattr(Sampler, "sample", until_the_third)
    ran = sdlab("generate", "--load-model", model, "--prompt", "x", "--num", 5, *QUICK)
    assert ran.code == 130 and "2 of 5 pictures are made" in ran.err
    assert sorted(Path("output").glob("*.png")) == ran.paths and len(ran.paths) == 2


def test_flagged_picture_is_not_a_silent_success(
    sdlab: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    def flags(self: object, image: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, list[bool]]:
        return torch.zeros_like(image), [True]

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", flags)
    ran = sdlab("generate", "--load-model", model, "--prompt", "x", *QUICK)
    assert ran.code == 3 and "safety checker" in ran.err
    assert metadata.read(ran.paths[0])["safety"] == "flagged"


def test_grid_has_its_own_file(sdlab: Callable[..., Ran], model: Path) -> None:
    ran = sdlab("generate", "--load-model", model, "--prompt", "x", "--num", 3, "--grid", *QUICK)
    assert ran.code == 0 and len(ran.paths) == 4 and ran.paths[3].stem.endswith("_grid")
    with Image.open(ran.paths[3]) as sheet:
        assert sheet.size == (128, 128)
    again = sdlab("generate", "--from", ran.paths[3])
    assert again.code == 2 and "is a grid" in again.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["no prompt", "--prompt "]),
        (["--prompt", "x", "--width", "100"], ["--width 100", "96 or 104"]),
        (["--prompt", "x", "--image-size", "33", "--height", "65"], ["32 or 40", "64 or 72"]),
        (["--prompt", "x", "--guidance", "nan"], ["--guidance"]),
        (["--prompt", "x", "--guidance", "inf"], ["--guidance"]),
        (["--prompt", "x", "--prefix", "a", "--no-prefix"], ["exclude"]),
        (["--prompt", "x", "--scheduler", "eular a"], ["did you mean 'euler a'"]),
        (["--prompt", "x", "--seed", str(2**53 - 1), "--num", "2"], ["largest seed"]),
        (["--prompt", "x", "--seed", str(2**53)], ["seed"]),
        (["--prompt", "x", "--steps", "0"], ["steps"]),
        (["--prompt", "x", "--num", "0"], ["num"]),
        (["--prompt", "x", "--output", "file"], ["file: cannot write there"]),
        (["--prompt", "x", "--load-model", "nowhere/model"], ["nowhere/model"]),
        (["--prompt", "x", "--unet", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--prompt", "x", "--device", "tpu"], ["--device"]),
        (["--prompt", "x", "--dtype", "int4"], ["--dtype"]),
        (["--prompt", "x", "--scheduler", "lcm", "--steps", "400"], ["lcm", "--steps"]),
        (["--prompt-file", "none.txt"], ["none.txt"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    sdlab: Callable[..., Ran], model: Path, flags: list[str], words: list[str]
) -> None:
    Path("file").write_text("in the way")
    flags = flags if "--load-model" in flags else [*flags, "--load-model", str(model)]
    ran = sdlab("generate", *flags)
    assert ran.code == 2 and ran.paths == [] and not list(Path("output").glob("*"))
    assert len([line for line in ran.err.splitlines() if "error" in line]) == 1
    for word in words:
        assert word in ran.err


def test_no_word_of_a_long_prompt_is_lost(sdlab: Callable[..., Ran], model: Path) -> None:
    job = ["generate", "--load-model", model, "--no-prefix", *QUICK]
    ran = sdlab(*job, "--prompt", "a " * 150 + "zebra", "--prompt", "a " * 150 + "house")
    assert ran.code == 0 and "cut off" not in ran.err
    zebra, house = (sdlab(*job, "--prompt", "a " * 150 + word).paths[0] for word in ("zebra", "house"))
    assert (pixels(zebra) != pixels(house)).any()


def test_no_folder_of_the_user_is_named_in_a_picture(
    sdlab: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "alice-marker" / "project"
    home.mkdir(parents=True)
    shutil.copytree(model, home / "tiny")
    monkeypatch.chdir(home)
    made = sdlab("generate", "--load-model", home / "tiny", "--prompt", "x", *QUICK).paths
    made += sdlab(
        "img2img", "--load-model", home / "tiny", "--init-image", made[0].absolute(), "--prompt", "x", *QUICK
    ).paths
    assert len(made) == 2
    for path in made:
        assert b"alice-marker" not in path.read_bytes()


def test_newest_finished_run_is_the_default(sdlab: Callable[..., Ran], model: Path) -> None:
    for name, ended in [("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-02-01T00:00:00+00:00")]:
        shutil.copytree(model, Path("tuned") / name)
        (Path("tuned") / name / "run.json").write_text(json.dumps({"state": "finished", "ended": ended}))
    ran = sdlab("generate", "--prompt", "x", *QUICK)
    assert ran.code == 0 and "tuned/new" in ran.err
    assert metadata.read(ran.paths[0])["model"]["asked"] == "tuned/new"
    assert (pixels(sdlab("generate", "--from", ran.paths[0]).paths[0]) == pixels(ran.paths[0])).all()


def test_settings_come_from_a_file_too(sdlab: Callable[..., Ran], model: Path) -> None:
    Path("job.toml").write_text(
        f'prompt = ["a", "b"]\nsteps = 2\nload-model = "{model}"\nno-prefix = true\nnum = 2\n'
    )
    ran = sdlab("generate", "--config", "job.toml", "--num", 1)
    assert [metadata.read(path)["prompt_sent"] for path in ran.paths] == ["a", "b"]
    Path("job.toml").write_text("step = 2\n")
    ran = sdlab("generate", "--config", "job.toml")
    assert ran.code == 2 and "did you mean 'steps'" in ran.err
