"""Tests of the recipes run in a folder of their own, and leave the package's models and the repository alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from recipes.mini.disk import digests
from recipes.mini.text import clip, qwen

from sdlab.models.bases import builtin_folder

ROOT = Path(__file__).parents[2]
SCORES = ROOT / "recipes" / "mini" / "scores"
BUILTIN = builtin_folder("mini-sd").parent
LEFT_BY_TOOLS = {".mypy_cache", ".pytest_cache", ".ruff_cache", ".coverage"}


def standing() -> tuple[dict[str, str], dict[str, str], set[str]]:
    """What no test may change: the built-in models, their scores, and the names in the repository's root."""
    return digests(BUILTIN), digests(SCORES), {path.name for path in ROOT.iterdir()} - LEFT_BY_TOOLS


@pytest.fixture(scope="module", autouse=True)
def _package_is_left_alone() -> Iterator[None]:
    before = standing()
    yield
    assert standing() == before, "a test has written into the package or the repository"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written without a folder is not written into the repository."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mini-sd's text encoder and tokenizer, written once; treat it as read-only."""
    folder = tmp_path_factory.mktemp("clip")
    clip.write(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mini-flux2's text encoder and tokenizer, written once; treat it as read-only."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen.write(folder)
    return folder
