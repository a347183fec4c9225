"""Sixty nasty files among two hundred good ones: every good one is done, every nasty one is named with a reason."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.nasty import Heap, heap
from tests.program import sdlab

PICTURES = {".jpg", ".png", ".webp", ".bmp", ".gif"}


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Heap:
    """Two hundred good pictures and more than sixty files that are not; treat it as read-only."""
    made = heap(tmp_path_factory.mktemp("nasty") / "heap")
    assert made.num_nasty >= 60
    return made


def told(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and stderr of a command."""
    code = sdlab(*args, "--json")
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def hashes(root: Path) -> dict[str, str]:
    """The sha256 of every regular file below a folder, by its path in it; links are not followed."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[path.relative_to(root).as_posix()] = sha256(path.read_bytes()).hexdigest()
    return found


def reasons(summary: dict[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["reason"] for entry in summary["refused"]}


def test_categorize_does_all_good_ones_and_names_the_others(
    nasty: Heap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(nasty.root)
    sorted_to = tmp_path / "sorted"
    args = ("categorize", nasty.root, "--organize", "--caption", "--sheet", "--output-dir", sorted_to)
    code, summary, err = told(capsys, *args)
    assert code == 0, err
    assert {entry["path"] for entry in summary["pictures"]} == nasty.good
    assert set(reasons(summary)) == nasty.refused
    assert all(reasons(summary).values())
    assert hashes(nasty.root) == before
    placed = Counter(digest for name, digest in hashes(sorted_to).items() if not name.startswith("__"))
    assert not Counter(before[id] for id in nasty.good) - placed
    code, summary, err = told(capsys, *args)
    assert (code, summary["counts"]["asked"], summary["counts"]["operations"]) == (0, 0, 0), err
    assert sdlab("categorize", "--undo", sorted_to) == 0
    assert not sorted_to.exists()
    assert hashes(nasty.root) == before


def test_crop_does_all_good_ones_and_names_the_others(
    nasty: Heap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(nasty.root)
    cut = tmp_path / "cut"
    code, summary, err = told(
        capsys, "crop", nasty.root, "--size", 64, "--output", cut, "--preview", tmp_path / "preview.png"
    )
    assert code == 0, err
    assert {entry["path"] for entry in summary["pictures"]} == nasty.good
    assert set(reasons(summary)) == nasty.refused
    assert all(reasons(summary).values())
    assert hashes(nasty.root) == before
    made = [name for name in hashes(cut) if Path(name).suffix.lower() in PICTURES]
    assert len(made) == len(nasty.good)
    assert len({entry["result"] for entry in summary["pictures"]}) == len(nasty.good)
