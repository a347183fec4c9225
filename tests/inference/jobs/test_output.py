"""Files are whole or absent, and none is ever overwritten."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from sdlab.errors import OutOfResources, SdlabError
from sdlab.inference.jobs import output

WRITER = """
import sys
from pathlib import Path
from sdlab.inference.jobs import output
for n in range(60):
    output.write_new(Path(sys.argv[1]), output.numbered("now", n), sys.argv[2].encode() * 1000)
"""


def test_two_processes_at_once_write_all_their_files(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), mark]) for mark in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    contents = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(contents) == 120
    assert {bytes([c[0]]) * 1000 == c for c in contents} == {True}
    assert sorted(os.listdir(tmp_path))[-1] == "sd_now_0119.png"


def test_names_go_on_to_the_next_free_one() -> None:
    assert list(islice(output.numbered("t", 7), 2)) == ["sd_t_0007.png", "sd_t_0008.png"]
    assert list(islice(output.mirrored("a"), 3)) == ["a.png", "a_2.png", "a_3.png"]


def test_taken_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    os.symlink("nowhere", tmp_path / "a_2.png")
    made = output.write_new(tmp_path, output.mirrored("a"), b"new")
    assert made.name == "a_3.png" and made.read_bytes() == b"new"
    assert (tmp_path / "a.png").read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()


def test_only_name_that_is_taken_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    assert output.write_new(tmp_path, ["a.png"], b"new") is None
    assert sorted(os.listdir(tmp_path)) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        (["a.jpg", "x/a.jpg"], 1, [["a.png"], ["x/a.png"]]),
        (["a.jpg", "a.png", "b.png"], 1, [["a_jpg.png"], ["a_png.png"], ["b.png"]]),
        (["A.PNG", "a.jpg"], 1, [["A_PNG.png"], ["a_jpg.png"]]),
        (["a.jpg", "a.png", "a_jpg.gif"], 1, [["a_jpg.png"], ["a_png.png"], ["a_jpg_2.png"]]),
        (["a.jpg", "a_2.jpg"], 2, [["a.png", "a_3.png"], ["a_2.png", "a_2_2.png"]]),
        (["a.jpg"], 3, [["a.png", "a_2.png", "a_3.png"]]),
        (["caf\u00e9.jpg", "cafe\u0301.png"], 1, [["caf\u00e9_jpg.png"], ["cafe\u0301_png.png"]]),
    ],
)
def test_results_in_a_folder_are_kept_apart(names: list[str], count: int, expected: list[list[str]]) -> None:
    planned = output.planned([Path(name) for name in names], count)
    assert [[path.as_posix() for path in paths] for paths in planned] == expected
    more = output.planned([Path(name) for name in names], count + 1)
    assert [paths[:1] for paths in more] == [paths[:1] for paths in planned]


def test_what_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "whole.png").write_bytes(b"x")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.symlink("nowhere", tmp_path / "link.png")
    there = {
        name: output.is_there(tmp_path / f"{name}.png") for name in ("whole", "folder", "link", "empty", "no")
    }
    assert there == {"whole": True, "folder": True, "link": True, "empty": False, "no": False}
    assert not (tmp_path / "empty.png").exists() and (tmp_path / "whole.png").exists()
    assert not output.is_there(tmp_path / "whole.png" / "below.png") and not output.is_there(
        tmp_path / ("x" * 300)
    )


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for name, age_s in [(".sdlab-1-a.tmp", 7200), (".sdlab-2-b.tmp", 60), ("mine.tmp", 7200)]:
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    output.make_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".sdlab-2-b.tmp", "mine.tmp"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        made = output.write_new(tmp_path, output.mirrored("a"), b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o640


@pytest.mark.parametrize("broken", ["write", "name"])
def test_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def names() -> Iterator[str]:
        full()
        yield "never"

    if broken == "write":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfResources, match="No space"):
        output.write_new(tmp_path, names() if broken == "name" else ["a.png"], b"x" * 100)
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_links_is_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a.png").write_bytes(b"mine")
    assert output.write_new(tmp_path, output.mirrored("a"), b"new").name == "a_2.png"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a_2.png"]
    assert (tmp_path / "a.png").read_bytes() == b"mine"


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SdlabError, match="cannot write there"):
        output.make_folder(tmp_path / "file" / "below")
    output.make_folder(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(8, 8)], (8, 8)), ([(8, 8)] * 3, (16, 16)), ([(8, 4), (4, 8)], (16, 8)), ([(4000, 8)] * 4, (4096, 8))],
)
def test_grid_holds_all_pictures_within_its_limit(
    tmp_path: Path, sizes: list[tuple[int, int]], expected: tuple[int, int]
) -> None:
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size, "red").save(paths[-1])
    sheet = output.grid(paths)
    assert sheet.size == expected
    assert (255, 0, 0) in {colour for _, colour in sheet.getcolors(1 << 24)}
