"""Guards of the shape: imports go one way, `sdlab.cli` is light, a family has six members, docs and options agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sdlab.models.base import Family

SRC = Path(__file__).parents[1] / "src" / "sdlab"
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "spacy", "gradio", "numpy",
         "safetensors")  # fmt: skip
LAYERS = [
    {"errors", "show", "keyed", "options", "progress", "signals"},
    {"dataset"},
    {"models"},
    {"training", "inference", "curate", "convert"},
    {"commands", "web", "cli"},
]


def layer(module: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if module in names), 0)


def imports(path: Path) -> set[str]:
    """The parts of sdlab that a file imports, anywhere in it but for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sdlab"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(SRC)} imports {name}"
        for path in sorted(SRC.rglob("*.py"))
        for name in imports(path)
        if (part := path.relative_to(SRC).parts[0].removesuffix(".py"))
        not in ("testing", "__main__", "__init__")
        and name != part
        and (layer(name) > layer(part) or (layer(name) == layer(part) and layer(part) == 3))
    ]
    assert not wrong


def test_the_program_starts_without_anything_heavy():
    code = "import sys, sdlab.cli; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["train-sd", "--help"],
        ["train-flux2", "--help"],
        ["generate", "--help"],
        ["samples", "--help"],
        ["check", "--help"],
        ["categorize", "--help"],
        ["crop", "--help"],
    ],
)
def test_help_uses_little_cpu(args):
    code = (
        "import resource, sys, subprocess; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-m", "sdlab", *args]
    spent = min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)
    )
    assert spent < (0.5 if args == ["--help"] else 0.7)  # 0.26 alone; 0.4 beside other tests on two cores


def test_a_family_has_six_members():
    members = set(Family.__annotations__) | {n for n in vars(Family) if not n.startswith("_")}
    assert members == {"grid", "fingerprint", "load_encoders", "load_denoiser", "loss", "pipeline"}


def test_training_and_dataset_never_name_a_family():
    for part in ("training", "dataset"):
        for path in (SRC / part).rglob("*.py"):
            assert not {"sd", "flux2"} & {
                n.module.rpartition(".")[2]
                for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("sdlab.models")
            }, path


def test_nothing_unpickles_or_runs_text():
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), path
                for word in node.keywords:
                    value = getattr(word.value, "value", None)
                    assert not (word.arg in ("shell", "trust_remote_code") and value is True), path
                    assert not (word.arg == "weights_only" and value is False), path
