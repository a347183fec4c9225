"""A job of the program itself: killed and begun again it ends as if nothing had been; one bad line ends nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.program import sdlab, start

KILLED_AFTER_SEVEN = """
import os, signal
from sdlab.inference.jobs.journal import Journal
note_made = Journal.note_made
def noted(self, index, key, path):
    note_made(self, index, key, path)
    if self.num_noted == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.note_made = noted
from sdlab.cli import main
main()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(folder: Path) -> list[str]:
    """Hash of each picture, in the order of the job."""
    hashes = []
    for path in sorted(folder.glob("sd_*.png")):
        with Image.open(path) as picture:
            hashes.append(hashlib.sha256(picture.tobytes()).hexdigest())
    return hashes


def command(model: Path, output: str, *more: object) -> list[object]:
    return ["generate", "--load-model", model, "--prompt-file", "prompts.txt", "--output", output,
            "--image-size", 32, "--steps", 2, "--seed", 7, *more]  # fmt: skip


def test_twenty_pictures_killed_after_seven_are_the_same_twenty(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"a picture of {i}" + (" --steps 1" if i % 5 == 0 else "") for i in range(20)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    batch = ("--batch", 2)
    killed = start(*command(tiny_sd_folder, "cut", *batch), module=("-c", KILLED_AFTER_SEVEN))
    assert sdlab(*command(tiny_sd_folder, "whole", *batch)) == 0
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and len(pixels(tmp_path / "cut")) == 7
    capsys.readouterr()
    assert sdlab(*command(tiny_sd_folder, "cut", *batch)) == 0
    told = capsys.readouterr()
    assert len(told.out.split()) == 13 and "7 of 20 pictures are made" in told.err
    assert pixels(tmp_path / "cut") == pixels(tmp_path / "whole") and len(set(pixels(tmp_path / "cut"))) == 20
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert (len(report["made"]), report["already"], report["failed"]) == (13, 7, [])
    assert not [name for name in os.listdir(tmp_path / "cut") if name.startswith(".sdlab")]


def test_a_bad_line_costs_one_picture_and_is_made_when_it_is_mended(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"a picture of {i}" for i in range(20)]
    bad = [*lines[:4], "a picture of 4 --steps many", *lines[5:]]
    (tmp_path / "prompts.txt").write_text("\n".join(bad))
    assert sdlab(*command(tiny_sd_folder, "out")) == 3
    assert "prompts.txt:5" in capsys.readouterr().err and len(pixels(tmp_path / "out")) == 19
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(one["where"], one["index"]) for one in report["failed"]] == [("prompts.txt:5", 4)]
    assert len(report["made"]) == 19
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert sdlab(*command(tiny_sd_folder, "out")) == 0
    assert len(capsys.readouterr().out.split()) == 1 and len(pixels(tmp_path / "out")) == 20
