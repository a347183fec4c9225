"""`sdlab generate` with FLUX.2, LoRAs and other VAEs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlab.inference.record import metadata
from tests import factories
from tests.commands.test_generate import AGAIN, Ran, damage, pixels, sdlab

__all__ = ["sdlab"]

QUICK = ["--steps", "2", "--seed", "7", "--width", "64", "--height", "80"]


@pytest.fixture(scope="module")
def stock(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_klein_folder: Path,
    tiny_dev_folder: Path,
    tiny_sd_folder: Path,
) -> Path:
    """Tiny models, a LoRA for klein and two pictures; read-only."""
    root = tmp_path_factory.mktemp("stock")
    for source, name in [(tiny_klein_folder, "klein"), (tiny_dev_folder, "dev"), (tiny_sd_folder, "sd")]:
        shutil.copytree(source, root / "models" / name)
    factories.tiny_flux2(root / "models" / "other", seed=3)
    factories.tiny_flux2(root / "models" / "distilled", is_distilled=True)
    write_lora(root / "models" / "pen.safetensors", seed=1)
    Image.effect_mandelbrot((96, 80), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(root / "a.png")
    Image.linear_gradient("L").resize((128, 64)).convert("RGB").save(root / "b.jpg")
    return root


@pytest.fixture
def models(stock: Path, tmp_path: Path) -> Path:
    """A copy of the stock in tmp_path, where `sdlab` runs; the folder of the models in it."""
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    return Path("models")


def write_lora(path: Path, *, seed: int) -> None:
    """A LoRA of rank 4 on two layers, strong enough to be seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"):
        wide = 32 if name.endswith("to_q") else 128
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, wide, generator=draw)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(32, 4, generator=draw)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "steps", "guidance"), [("klein", 15, 4.0), ("dev", 15, 4.0), ("distilled", 4, 1.0)]
)
def test_steps_and_guidance_suit_the_model(
    sdlab: Callable[..., Ran], models: Path, name: str, steps: int, guidance: float
) -> None:
    ran = sdlab("generate", "--load-model", models / name, "--prompt", "x", "--image-size", 64)
    about = metadata.read(ran.paths[0])
    assert (ran.code, about["steps"], about["guidance"]) == (0, steps, guidance)
    assert about["model"]["family"] == "flux2" and about["prompt_sent"] == "x"
    with Image.open(ran.paths[0]) as made:
        assert made.size == (64, 64)
        assert "Sampler: Euler, Schedule type: Simple" in made.text["parameters"]


def test_any_picture_is_made_again_bit_for_bit_in_a_new_process(
    sdlab: Callable[..., Ran], models: Path, tmp_path: Path
) -> None:
    klein = ["--load-model", models / "klein", "--prompt", "猫 cat", *QUICK]
    edit = ["img2img", *klein[:-4], "--init-image", "a.png"]
    ran = [
        sdlab("generate", *klein, "--num", 3, "--batch", 3, "--negative", "ugly"),
        sdlab("generate", *klein, "--ref", "a.png", "--ref", "b.jpg"),
        sdlab(
            "generate",
            *klein,
            "--lora",
            models / "pen.safetensors",
            "--lora",
            f"{models}/pen.safetensors:-0.3",
        ),
        sdlab("generate", *klein, "--transformer", models / "other", "--vae", models / "other"),
        sdlab(*edit, "--ref", "b.jpg", "--num", 2, "--batch", 2),
        sdlab(*edit, "--strength", 0.5, "--ref", "b.jpg"),
        sdlab("generate", "--load-model", models / "dev", "--prompt", "x", "--ref", "b.jpg", *QUICK),
    ]
    assert [one.code for one in ran] == [0] * 7, [one.err for one in ran]
    first = [one.paths[-1] for one in ran]
    again = subprocess.run(
        [sys.executable, "-c", AGAIN, *map(str, first)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "differ" not in again.stderr
    for one, other in zip(first, again.stdout.splitlines(), strict=True):
        assert one.read_bytes() == (tmp_path / other).read_bytes(), again.stderr
    kinds = [metadata.read(path)["kind"] for path in first]
    assert kinds == ["txt2img", "edit", "txt2img", "txt2img", "edit", "img2img", "edit"]
    assert [one["weight"] for one in metadata.read(first[2])["loras"]] == [1.0, -0.3]
    assert len({path.read_bytes() for path in first}) == 7


def test_lora_counts_by_its_weight(sdlab: Callable[..., Ran], models: Path) -> None:
    job = ["generate", "--load-model", models / "klein", "--prompt", "x", *QUICK]
    pen = models / "pen.safetensors"
    made = [
        pixels(sdlab(*job, *(["--lora", f"{pen}:{w}"] if w else [])).paths[0]) for w in ("", "0", "0.4", "1")
    ]
    assert (made[0] == made[1]).all()
    away = [np.abs(one - made[0]).mean() for one in made]
    assert 0 < away[2] < away[3]


def test_run_that_trained_a_lora_is_its_base_with_it(sdlab: Callable[..., Ran], models: Path) -> None:
    run = Path("tuned/mine")
    write_lora(run / "pytorch_lora_weights.safetensors", seed=1)
    base = {"name": "klein", "kind": "folder", "path": str((models / "klein").absolute()), "source": "klein"}
    about = {
        "state": "finished",
        "ended": "2026-01-01T00:00:00+00:00",
        "adapter": {"kind": "lora"},
        "model": base,
    }
    (run / "run.json").write_text(json.dumps(about))
    ran = sdlab("generate", "--prompt", "x", *QUICK)  # it is the newest run, too
    recipe = metadata.read(ran.paths[0])
    assert recipe["model"]["asked"] == "tuned/mine" and recipe["loras"] == []
    asked = ["generate", "--load-model", models / "klein", "--prompt", "x", *QUICK, "--lora"]
    for lora in (models / "pen.safetensors", run):
        assert (pixels(sdlab(*asked, lora).paths[0]) == pixels(ran.paths[0])).all()
    assert (pixels(sdlab("generate", "--from", ran.paths[0]).paths[0]) == pixels(ran.paths[0])).all()
    damage(run / "pytorch_lora_weights.safetensors")
    ran = sdlab("generate", "--from", ran.paths[0])
    assert ran.code == 2 and "tuned/mine/pytorch_lora_weights.safetensors has changed" in ran.err


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("b.jpg", ["--ref", "a.png", "--ref", "b.jpg"]),
        ("models/pen.safetensors", ["--lora", "models/pen.safetensors:0.5"]),
        ("models/other/vae/diffusion_pytorch_model.safetensors", ["--vae", "models/other"]),
        (
            "models/other/transformer/diffusion_pytorch_model.safetensors",
            ["--unet", "models/other/transformer"],
        ),
        ("models/klein/text_encoder/model.safetensors", []),
    ],
)
def test_changed_file_is_named_and_nothing_is_made(
    sdlab: Callable[..., Ran], models: Path, file: str, flags: list[str]
) -> None:
    made = sdlab("generate", "--load-model", models / "klein", "--prompt", "x", *QUICK, *flags).paths[0]
    damage(Path(file))
    ran = sdlab("generate", "--from", made, "--output", "again")
    assert ran.code == 2 and f"{file} has changed" in ran.err and not list(Path("again").glob("*"))


def test_part_that_is_not_used_may_change(sdlab: Callable[..., Ran], models: Path) -> None:
    flags = ["--vae", "models/other", "--unet", "models/other"]
    made = sdlab("generate", "--load-model", models / "klein", "--prompt", "x", *QUICK, *flags).paths[0]
    damage(models / "klein" / "vae" / "diffusion_pytorch_model.safetensors")
    damage(models / "klein" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert (pixels(sdlab("generate", "--from", made).paths[0]) == pixels(made)).all()


def test_files_that_moved_are_said(sdlab: Callable[..., Ran], models: Path) -> None:
    flags = ["--lora", "models/pen.safetensors:0.5", "--ref", "a.png", "--ref", "b.jpg"]
    made = sdlab("generate", "--load-model", models / "klein", "--prompt", "x", *QUICK, *flags).paths[0]
    Path("models/pen.safetensors").rename("ink.safetensors")
    Path("a.png").rename("c.png")
    ran = sdlab("generate", "--from", made)
    assert ran.code == 2 and "models/pen.safetensors is no longer there" in ran.err and "a.png" in ran.err
    ran = sdlab("generate", "--from", made, "--lora", "ink.safetensors", "--ref", "c.png")
    assert ran.code == 2 and "2 pictures, not 1" in ran.err
    ran = sdlab("generate", "--from", made, "--lora", "ink.safetensors", "--ref", "c.png", "--ref", "b.jpg")
    assert ran.code == 0 and (pixels(ran.paths[0]) == pixels(made)).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["klein", "--scheduler", "euler"], ["--scheduler", "flow-matching Euler"]),
        (["dev", "--negative", "ugly"], ["--negative", "dev has no negative prompt"]),
        (["distilled", "--negative", "ugly"], ["--negative", "distilled"]),
        (["klein", "--width", "72"], ["--width 72", "multiple of 16", "64 or 80"]),
        (["klein", "--width", "72", "--scheduler", "ddim"], ["--width", "--scheduler"]),
        (["sd", "--ref", "a.png"], ["--ref", "FLUX.2"]),
        (["klein", "--ref", "gone.png"], ["gone.png"]),
        (["klein", "--ref", "thin.png"], ["thin.png", "cannot be looked at"]),
        (["klein", "--lora", "a.png"], ["a.png"]),
        (["klein", "--lora", "models/pen.safetensors:much"], ["'much' is not a weight"]),
        (["klein", "--lora", "models/other/vae/diffusion_pytorch_model.safetensors"], ["is not a LoRA"]),
        (
            ["sd", "--lora", "models/pen.safetensors"],
            ["pen.safetensors", "is a LoRA of another kind of model"],
        ),
        (["klein", "--vae", "models/gone.safetensors"], ["models/gone.safetensors"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    sdlab: Callable[..., Ran], models: Path, flags: list[str], words: list[str]
) -> None:
    Image.new("RGB", (144, 48)).save("thin.png")
    ran = sdlab("generate", "--prompt", "x", "--load-model", models / flags[0], *flags[1:])
    assert ran.code == 2 and ran.paths == [] and not list(Path("output").glob("*")), ran.err
    assert len([line for line in ran.err.splitlines() if "error" in line]) == 1
    for word in words:
        assert word in ran.err


def test_guidance_without_effect_is_said(sdlab: Callable[..., Ran], models: Path) -> None:
    ran = sdlab("generate", "--load-model", models / "distilled", "--prompt", "x", "--guidance", 3, *QUICK)
    assert ran.code == 0 and "warning: --guidance: this distilled model ignores it" in ran.err


def test_words_the_model_will_not_see_are_named(sdlab: Callable[..., Ran], models: Path) -> None:
    ran = sdlab("generate", "--load-model", models / "klein", "--prompt", "a" * 60 + " zebra", *QUICK)
    assert ran.code == 0 and "longer than 48 tokens" in ran.err and "zebra" in ran.err


def test_picture_that_is_looked_at_settles_the_size(sdlab: Callable[..., Ran], models: Path) -> None:
    job = ["generate", "--load-model", models / "klein", "--prompt", "x", "--steps", 1, "--ref", "b.jpg"]
    for flags, size in [([], (128, 64)), (["--width", 80], (80, 64))]:
        with Image.open(sdlab(*job, *flags).paths[0]) as made:
            assert made.size == size
