"""What is shipped is small, tidy and reaches its score; nothing below it gets into the package."""

from __future__ import annotations

import json
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
from recipes.mini import __main__ as program
from recipes.mini import shipping
from recipes.mini.disk import digests
from recipes.mini.figures import Figure, failed
from recipes.mini.models import RECIPES
from recipes.mini.recipe import Command, Recipe
from recipes.mini.shipping import install, model_files, ship
from safetensors.torch import load_file, save_file

from sdlab.dataset.disk import hold
from sdlab.errors import SdlabError
from sdlab.models.bases import builtin_folder

GOOD, BAD = Figure("prompts", 0.93, at_least=0.9), Figure("prompts", 0.89, at_least=0.9)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a pipeline in it."""
    folder = tmp_path / "tuned" / "model"
    files = {
        "model_index.json": {"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]},
        "unet/config.json": {"_name_or_path": "/home/me/unet", "width": 3},
        "run.json": {"state": "finished"},
        "checkpoints/step-1/manifest.json": {},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"a": torch.full((3,), 1.5), "n": torch.tensor(7)}, folder / "unet" / "weights.safetensors")
    save_file({"a": torch.ones(3)}, folder / "checkpoints" / "step-1" / "weights.safetensors")
    return folder


@pytest.fixture
def builtin(tmp_path: Path) -> Path:
    """A package's folder of models."""
    for name in shipping.SHIPPED:
        (tmp_path / "builtin" / name).mkdir(parents=True)
        (tmp_path / "builtin" / name / "old.json").write_text("{}")
    return tmp_path / "builtin"


@pytest.fixture
def package(builtin: Path, tmp_path: Path) -> program.Package:
    return program.Package(builtin, tmp_path / "scores-of-the-package")


def test_the_model_alone_is_shipped_in_half_and_without_this_computer(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        made = ship(run, tmp_path / "shipped")
    assert sorted(digests(made)) == ["model_index.json", "unet/config.json", "unet/weights.safetensors"]
    tensors = load_file(made / "unet" / "weights.safetensors")
    assert tensors["a"].dtype == torch.float16 and tensors["a"].tolist() == [1.5] * 3
    assert tensors["n"].dtype == torch.int64 and tensors["n"] == 7
    assert json.loads((made / "unet" / "config.json").read_text()) == {"width": 3}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_of_one_folder_is_shipped_without_what_is_the_runs(tmp_path: Path) -> None:
    for name in ("config.json", "run.json", "dataset.json", "log.jsonl", "vocab.txt"):
        (tmp_path / name).write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in model_files(tmp_path)] == ["config.json", "model.safetensors", "vocab.txt"]


def test_what_fp16_cannot_hold_is_told(run: Path, tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1e6])}, run / "unet" / "weights.safetensors")
    with pytest.raises(SdlabError, match="a has values that fp16 cannot hold"):
        ship(run, tmp_path / "shipped")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_below_its_score_a_model_is_not_installed(run: Path, tmp_path: Path, builtin: Path) -> None:
    made, before = ship(run, tmp_path / "shipped"), digests(builtin)
    with pytest.raises(SdlabError, match=r"is not installed: prompts: 89\.0% .must reach 90\.0%"):
        install(made, [GOOD, BAD], name="mini-sd", builtin=builtin)
    assert digests(builtin) == before
    install(made, [GOOD], name="mini-sd", builtin=builtin)
    assert digests(builtin / "mini-sd") == digests(made)
    assert sorted(path.name for path in builtin.iterdir()) == sorted(shipping.SHIPPED)


def test_too_many_bytes_are_not_installed(
    run: Path, tmp_path: Path, builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MOST_BYTES", 100)
    with pytest.raises(SdlabError, match="all built-in models would be"):
        install(ship(run, tmp_path / "shipped"), [GOOD], name="mini-sd", builtin=builtin)
    assert sorted(digests(builtin / "mini-sd")) == ["old.json"]


def test_figures() -> None:
    assert Figure("a", 0.9, at_least=0.9).passes and not Figure("a", 0.15, below=0.15).passes
    assert not Figure("a", float("nan"), at_least=0.9).passes and Figure("told", 0.0).passes
    assert failed([GOOD, BAD]) == ["prompts: 89.0% (must reach 90.0%)   NOT REACHED"]
    assert str(Figure("VAE", 30.123, at_least=30, unit="dB")) == "VAE: 30.12 dB (must reach 30.00 dB)"


def test_a_score_is_measured_once_for_the_same_files(run: Path, tmp_path: Path) -> None:
    asked = []

    def measure(folder: Path, *, device: str) -> list[Figure]:
        asked.append(device)
        return [BAD]

    recipe = Recipe("mini-sd", (), (Command("model", "train-sd"),), measure)
    for _ in range(2):
        made = ship(recipe.model(tmp_path), tmp_path / "shipped")
        assert program.measured(recipe, made, tmp_path, device="cuda") == [BAD]
    assert asked == ["cuda"]
    assert program.measured(recipe, made, tmp_path, device="cuda", anew=True) == [BAD]
    assert asked == ["cuda"] * 2
    said = json.loads((tmp_path / "scores" / "mini-sd.json").read_text())
    assert not said["passes"] and said["files"] == digests(made)
    assert said["commands"] == {"model": "sdlab train-sd --save-model tuned/model"}


def test_the_program_exits_with_1_below_a_score(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: program.Package
) -> None:
    recipe = Recipe("mini-sd", (), (Command("model", "train-sd"),), lambda folder, device: [BAD])
    monkeypatch.setattr(program, "RECIPES", {"mini-sd": recipe})
    assert program.main(["mini-sd", "--work", str(tmp_path)], package=package) == 1
    assert program.main(["mini-sd", "--work", str(tmp_path), "--install"], package=package) == 2
    assert sorted(digests(package.builtin / "mini-sd")) == ["old.json"] and not package.scores.exists()


def test_one_at_a_time_works_in_a_folder(
    tmp_path: Path, package: program.Package, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / ".lock").open("w") as other:
        assert hold(other.fileno())
        assert program.main(["mini-sd", "--work", str(tmp_path)], package=package) == 2
    assert "is at work on this folder" in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()


def test_what_is_installed_is_measured_by_the_bars_of_today(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: program.Package
) -> None:
    """The score that is kept was good enough for a bar that has been raised since."""
    found = [GOOD]
    recipe = Recipe("mini-sd", (), (Command("model", "train-sd"),), lambda folder, device: found)
    monkeypatch.setattr(program, "RECIPES", {"mini-sd": recipe})
    words = ["mini-sd", "--work", str(tmp_path)]
    assert program.main(words, package=package) == 0
    found[0] = Figure("prompts", 0.93, at_least=0.95)
    assert program.main([*words, "--install"], package=package) == 2
    assert sorted(digests(package.builtin / "mini-sd")) == ["old.json"] and not package.scores.exists()
    found[0] = GOOD
    assert program.main([*words, "--install"], package=package) == 0
    said = json.loads((package.scores / "mini-sd.json").read_text())
    assert said["passes"] and said["files"] == digests(package.builtin / "mini-sd")


def test_only_the_program_itself_knows_the_package() -> None:
    """Whoever imports the recipes has to name a folder to install into."""
    for function, name in ((install, "builtin"), (program.main, "package"), (program.rebuild, "package")):
        assert signature(function).parameters[name].default is Parameter.empty


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shipped_is_what_was_scored(name: str) -> None:
    said = json.loads((program.SCORES / f"{name}.json").read_text(encoding="utf-8"))
    assert said["passes"] and said["files"] == digests(builtin_folder(name))
    assert said["commands"] == {command.name: command.typed for command in RECIPES[name].commands}
