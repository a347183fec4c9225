"""Files get a name that is free, or stay as they were."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sdlab.dataset.disk import name_new

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a rename does not replace there")


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_is_gone_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        name_new(str(tmp_path / "a"), str(tmp_path / "b"), marker=str(tmp_path / "marker"))
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_that_goes_while_it_is_named_without_hard_links_leaves_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def too_late(source: str, target: str) -> None:
        os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    (tmp_path / "a").write_bytes(b"words")
    with pytest.raises(FileNotFoundError):
        name_new(str(tmp_path / "a"), str(tmp_path / "b"))
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_hard_links")
def test_a_share_that_renames_and_says_that_it_failed_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def done_and_denied(source: str, target: str) -> None:
        replace(source, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "replace", done_and_denied)
    (tmp_path / "a").write_bytes(b"words")
    with pytest.raises(FileNotFoundError):
        name_new(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"words"


@pytest.mark.usefixtures("no_hard_links")
def test_nothing_is_replaced_without_hard_links_either(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        name_new(str(tmp_path / "a"), str(tmp_path / "b"), marker=str(tmp_path / "marker"))
    assert (tmp_path / "b").read_text() == "b" and names(tmp_path) == ["a", "b"]
