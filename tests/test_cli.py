from __future__ import annotations

import subprocess
import sys

import pytest

from sdlab import __version__, cli
from tests.program import ENVIRONMENT, sdlab


def test_version(capsys):
    assert sdlab("--version") == 0
    assert capsys.readouterr().out.strip() == f"sdlab {__version__}"


def test_help_shows_the_commands_in_groups(capsys):
    assert sdlab("--help") == 0
    out = capsys.readouterr().out
    for word in ("Train", "Make pictures", "Datasets", "train-sd", "generate", "img2img", "check"):
        assert word in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generte"], "generate"),
        (["train-sd", "--stepz", "3"], "did you mean '--steps'"),
        (["train-sd", "--steps", "x"], "--steps"),
        (["train-sd", "--steps", "0"], "--steps"),
        (["check", "/nonexistent/folder"], "/nonexistent/folder"),
    ],
)
def test_a_wrong_line_ends_in_one_line_and_exit_2(args, said, capsys):
    assert sdlab(*args) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("sdlab: error: ") and said in err[0]


def test_an_underscore_is_a_dash_in_command_names_too(capsys):
    assert sdlab("train_sd", "--help") == 0
    assert "--image-size" in capsys.readouterr().out


def test_an_unknown_key_fails_before_torch_is_loaded(tmp_path):
    (tmp_path / "run.toml").write_text("stepz = 3\n")
    code = (
        "import sys\nfrom sdlab.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "train-sd", "--config", str(tmp_path / "run.toml")],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (2, "False")
    assert "unknown key 'stepz', did you mean 'steps'?" in done.stderr


def test_verbose_shows_the_traceback(capsys):
    assert sdlab("check", "/nonexistent/folder", "--verbose") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_told_in_one_line_with_exit_1(monkeypatch, capsys):
    from sdlab.dataset import tree

    monkeypatch.setattr(tree, "scan", lambda *a, **k: 1 // 0)
    monkeypatch.setattr("sdlab.dataset.inspect.scan", lambda *a, **k: 1 // 0, raising=False)
    assert sdlab("check", ".") == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "ZeroDivisionError" in err[0]


def test_shell_completion_is_there(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "sdlab"],
        env={**ENVIRONMENT, "_SDLAB_COMPLETE": "source_bash"},  # the flag looks for the shell that called it
        capture_output=True,
        text=True,
    )
    assert "sdlab" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "out of memory"),
        ("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)", "out of GPU memory"),
    ],
)
def test_too_little_memory_ends_in_one_line_and_exit_4(said, word, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(cli, "app", fail)
    assert sdlab("check") == 4
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and word in err[0]
