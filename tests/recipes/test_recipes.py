"""Every built-in model is made by sdlab's commands, as the page says, and by nothing that trains besides."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import typer
from recipes.mini.models import RECIPES
from recipes.mini.recipe import Command

from sdlab.cli import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "recipes" / "mini" / "README.md"
COMMANDS = {command.name: command for recipe in RECIPES.values() for command in recipe.commands}
TRAINERS = ("sdlab.training", "torch.optim", "torch.autograd", "accelerate")
TRAINING = {"backward", "zero_grad", "requires_grad_", "enable_grad"}  # attributes, called or not
TRAINING_CALLS = {"step", "train"}  # called, of anything


def training_in(source: str) -> list[str]:
    """What in a module's text trains: imports and uses of TRAINERS, and attributes that training needs."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [name for node in nodes for name in _imported(node) if name.startswith(TRAINERS)]
    used = [node for node in nodes if isinstance(node, ast.Attribute)]
    used = [node for node in used if node.attr in TRAINING or ast.unparse(node) in TRAINERS]
    called = [
        node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    called = [node for node in called if node.attr in TRAINING_CALLS]
    return [*imported, *map(ast.unparse, [*used, *called])]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
    return []


def test_there_is_one_for_every_built_in_model() -> None:
    builtin = ROOT / "src" / "sdlab" / "models" / "builtin"
    assert sorted(RECIPES) == sorted(path.name for path in builtin.iterdir() if path.name.startswith("mini-"))


def test_nothing_is_trained_outside_of_sdlab() -> None:
    paths = sorted((ROOT / "recipes").rglob("*.py"))
    assert len(paths) > 20
    found = {path: training_in(path.read_text(encoding="utf-8")) for path in paths}
    assert not {path.relative_to(ROOT): lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "from torch import optim as numbers",
        "import torch.optim.adamw as a",
        "from torch.optim import AdamW",
        "import torch\nwalk = torch.optim.SGD",
        "from sdlab.training.loop import run as draw",
        "from sdlab import training",
        "def f():\n    from accelerate import Accelerator",
        "import importlib\nimportlib.import_module('torch.optim')",
        "loss.backward()",
        "walker.step()",
        "model.train()",
        "self.model.train(True)",
        "go = loss.backward",
        "with torch.enable_grad(): pass",
        "torch.autograd.grad(loss, weights)",
        "from torch.autograd import grad",
    ],
)
def test_a_training_loop_is_seen_under_any_name(source: str) -> None:
    assert training_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "model.eval()",
        "made.training",
        "demo.train",
        "versions = ('accelerate',)",
        "steps = wish.steps",
        "train = 1",
    ],
)
def test_what_does_not_train_is_let_be(source: str) -> None:
    assert not training_in(source)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_every_command_parses(command: Command) -> None:
    words = command.words
    if command.program == "python":
        assert words[0] == "-m" and words[1].startswith("recipes.mini.") and words[-1] == command.makes
        return
    group = typer.main.get_command(app)
    chosen = group.commands[words[0]]  # type: ignore[attr-defined]
    chosen.make_context(words[0], words[1:], parent=group.make_context("sdlab", words[:1]))


def test_the_page_shows_every_command() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").replace("\\\n", " ").split())
    for command in COMMANDS.values():
        assert command.typed in page, command.typed


def test_a_command_starts_from_what_is_made_before_it() -> None:
    for recipe in RECIPES.values():
        made = {dataset.name for dataset in recipe.datasets} | {"mini-sd", "mini-flux2", "clip", "qwen"}
        for command in recipe.commands:
            assert {*command.inputs} <= made, command.name
            made.add(command.folder(Path()).as_posix())
