"""`sdlab crop` as a user runs it: refused with the way on, stopped and gone on, a heap of nasty files survived."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlab.curate.crop.results import INDEX, PARTS, Results
from sdlab.testing.planted import planted
from tests.program import sdlab, start


def content(root: Path) -> dict[str, str]:
    return {
        os.fsdecode(os.path.relpath(path, root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != INDEX
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(6):
        folder = root / f"thing_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        planted(number).image.resize((100, 80)).save(folder / f"{number}.{'jpg' if number % 3 else 'png'}")
    (root / "thing_1/1.cap").write_text("one")
    return root


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_folder_is_cut_beside_itself_and_left_as_it_is(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(images)
    assert sdlab("crop", images, "--size", 64, "--json") == 0
    made = report(capsys)
    output = images.parent / "__images_cropped"
    assert made["output"] == str(output) and made["counts"]["made"] == 6
    assert made["sizes"] == [{"width": 64, "height": 64, "pictures": 6}]
    assert set(content(output)) == set(before)
    for path in output.rglob("*.[pj]*g"):
        with Image.open(path) as image:
            assert image.size == (64, 64) and image.format == ("PNG" if path.suffix == ".png" else "JPEG")
    assert content(images) == before
    assert sdlab("crop", images, "--size", 64, "--json") == 0
    assert report(capsys)["counts"] | {"made": 0, "done_before": 6} == made["counts"] | {
        "made": 0,
        "done_before": 6,
    }


def test_lines_say_what_happened(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "thing_0/bad.png").write_bytes(b"")
    (images / "__later").mkdir()
    assert sdlab("crop", images, "--size", 96, "--preview", images.parent / "p.png") == 0
    said = capsys.readouterr()
    assert "6 pictures cut" in said.out and "80 x 80" in said.out
    assert "6 pictures smaller than asked for: cut to the shape, not enlarged (--upscale)" in said.out
    assert "refused: 1\n  thing_0/bad.png: an empty file (0 bytes)" in said.out
    assert "p.png: 6 of 6 pictures" in said.err
    with Image.open(images.parent / "p.png") as sheet:
        assert (np.asarray(sheet) == (255, 60, 0)).all(axis=-1).sum() > 500  # the frames


def test_a_dry_run_writes_nothing_but_the_preview(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(images.parent.rglob("*"))
    assert (
        sdlab("crop", images, "--size", 64, "--dry-run", "--preview", images.parent / "p.png", "--json") == 0
    )
    dry = report(capsys)
    assert set(images.parent.rglob("*")) - set(before) == {images.parent / "p.png"}
    assert sdlab("crop", images, "--size", 64, "--json") == 0
    assert dry["pictures"] == report(capsys)["pictures"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--aspect", "2:3", "--buckets"], "--aspect and --buckets are different ways: give one"),
        (["--max-side", 64, "--size", 64], "--max-side only shrinks, so --size means nothing beside it"),
        (["--max-side", 64, "--focus", "center"], "--focus means nothing"),
        (["--size", 100, "--grid", 16], "--size 100 is no multiple of --grid 16: try 96 or 112"),
        (["--format", "png", "--quality", 90], "PNG has no --quality"),
        (["--aspect", "tall"], "tall is no width:height. Try 2:3"),
        (["--background", "nice"], "unknown colour 'nice'"),
        (["--output", "images"], "is the folder of the pictures itself"),
        (["--output", "."], "holds the pictures"),
        (
            ["--output", "images/cut"],
            "lies among the pictures, which would be found twice. "
            "Give one outside, or one whose name starts with __, as images/__cropped",
        ),
        (["--output", "images/thing_1/../../images"], "is the folder of the pictures itself"),
        (["--output", "images/thing_1/1.cap"], "is there and is not a folder"),
        (["--output", "file"], "is there and is not a folder"),
        (["--output", "file/x"], "file: is there and is not a folder. Give another --output"),
        (["--preview", "images/p.png"], "lies inside the dataset"),
        (["--preview", "__images_cropped/p.png"], "lies inside the dataset"),
        (["--preview", "p.jpg"], ".png file"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(
    images: Path,
    options: list[object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(images.parent)
    Path("file").touch()
    before = sorted(images.parent.rglob("*"))
    assert sdlab("crop", *options) == 2
    assert said in capsys.readouterr().err
    assert sorted(images.parent.rglob("*")) == before


def test_an_output_in_the_pictures_may_start_with_underscores(images: Path) -> None:
    assert sdlab("crop", images, "--size", 64, "--output", images / "__cut") == 0
    assert sdlab("crop", images, "--size", 64, "--output", images / "__cut") == 0
    assert len(list((images / "__cut").rglob("*.*g"))) == 6


def test_other_settings_are_refused_with_the_ways_on(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("crop", images, "--size", 64) == 0
    assert sdlab("crop", images, "--size", 32) == 2
    assert "holds results of other settings. Give another --output, or --overwrite" in capsys.readouterr().err
    assert sdlab("crop", images, "--size", 32, "--overwrite") == 0
    with Image.open(images.parent / "__images_cropped/thing_0/0.png") as image:
        assert image.size == (32, 32)


def test_face_without_opencv_names_the_command(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert sdlab("crop", images, "--size", 64, "--focus", "face") == 2
    assert 'pip install "sdlab[face]"' in capsys.readouterr().err
    assert list(images.parent.iterdir()) == [images]


def test_nasty_files_are_named_and_the_good_ones_are_done(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = make_nasty(images / "nasty")
    before = content(images)
    assert sdlab("crop", images, "--size", 64, "--json") == 0
    made = report(capsys)
    assert made["counts"]["made"] == 6 + 1  # an animation is good: its first frame
    refused = {one["path"]: one["reason"] for one in made["refused"]}
    assert {f"nasty/{name}" for name in nasty} <= set(refused)
    assert all(refused.values())
    assert content(images) == before


def make_nasty(folder: Path) -> list[str]:
    """Files that are no good in all sorts of ways; the names of those to be refused."""
    folder.mkdir()
    good = folder.parent / "thing_0/0.png"
    whole = good.read_bytes()
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    for name, data in {
        "zero.jpg": b"",
        "cut.png": whole[: len(whole) // 2],
        "page.jpg": b"<!doctype html><html>",
        "bomb.png": bomb,
        "nothing.webp": bytes(1000),
        "text.gif": b"just text",
    }.items():
        (folder / name).write_bytes(data)
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop").symlink_to(folder.parent)
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "orphan.cap").write_text("nobody's")
    (folder / "moves.ref.png").write_bytes(b"")  # an edit without its reference is no edit
    (folder / "alone.ref.png").write_bytes(whole)
    frames[0].save(folder / "turns.gif", save_all=True, append_images=frames[1:])
    kept = {"turns.gif", "moves.ref.png"}  # the reference is named in its picture's reason
    return [path.name for path in folder.iterdir() if path.name not in kept]


def test_no_good_picture_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    assert sdlab("crop", tmp_path / "images") == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1) and "no pictures" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    (tmp_path / "images/a.png").write_bytes(b"")
    assert sdlab("crop", tmp_path / "images") == 2
    said = capsys.readouterr()
    assert "no usable picture, 1 refused. The first: a.png: an empty file" in said.err
    assert said.out == "refused: 1\n  a.png: an empty file (0 bytes)\n"
    assert sdlab("crop", tmp_path / "image") == 2
    assert "did you mean" in capsys.readouterr().err


def test_settings_of_a_run_without_results_bind_nobody(images: Path, tmp_path: Path) -> None:
    for path in images.rglob("*.*g"):
        path.rename(path.with_suffix(".later"))
    (images / "a.png").write_bytes(b"")
    assert sdlab("crop", images, "--size", 64, "--output", tmp_path / "cut") == 2
    for path in images.rglob("*.later"):
        path.rename(path.with_suffix(".png"))
    assert sdlab("crop", images, "--size", 32, "--output", tmp_path / "cut") == 0


def test_pictures_that_lose_their_ends_to_max_side_are_named(
    pictures: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = pictures({"pole.png": (3000, 20), "beam.png": (20, 3000), "a.png": (200, 100)})
    assert sdlab("crop", images, "--max-side", 64, "--dry-run") == 0
    said = "too long for --max-side 64, so the ends are cut off: 2\n  beam.png\n  pole.png\n"
    assert said in capsys.readouterr().out
    assert sdlab("crop", images, "--max-side", 64, "--json") == 0
    assert report(capsys)["counts"]["ends_cut_off"] == 2


@pytest.mark.parametrize("at", ["_append", "_write_part"])
def test_a_full_disk_is_named_with_its_folder(
    images: Path, at: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Results, at, full)
        assert sdlab("crop", images, "--size", 64, "--output", images.parent / "cut") == 4
    said = capsys.readouterr().err
    assert f"{images.parent / 'cut'}: cannot be written (No space left on device)" in said
    assert "Free some space" in said and "give another --output" in said
    assert sdlab("crop", images, "--size", 64, "--output", images.parent / "cut") == 0


def many(root: Path) -> Path:
    root.mkdir()
    image = planted(1).image.resize((500, 300))
    for number in range(40):
        image.putpixel((0, 0), (number, 0, 0))
        image.save(root / f"{number:03}.png", compress_level=1)
        (root / f"{number:03}.cap").write_text(f"caption {number}")
    return root


def wait_for(output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(output.glob("*.png"))) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    images, output = many(tmp_path / "images"), tmp_path / "out"
    command = ("crop", images, "--size", 128, "--output", output, "--num-workers", 1)
    process = start(*command)
    wait_for(output, 2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on" in said and "Traceback" not in said
    num = len(list(output.glob("*.png")))
    assert 0 < num < 40 and not (output / PARTS).exists()
    assert sdlab(*command) == 0
    assert len(list(output.glob("*.png"))) == len(list(output.glob("*.cap"))) == 40


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_files_and_the_same_command_goes_on(tmp_path: Path) -> None:
    images, output, whole = many(tmp_path / "images"), tmp_path / "out", tmp_path / "whole"
    assert sdlab("crop", images, "--size", 128, "--output", whole) == 0
    expected = content(whole)
    draw = random.Random(1)
    for _ in range(3):
        num_there = len(list(output.glob("*.png")))
        process = start("crop", images, "--size", 128, "--output", output, "--num-workers", 1)
        wait_for(output, num_there + 1)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        left = {name: sha for name, sha in content(output).items() if not name.startswith(PARTS)}
        assert left.items() <= expected.items()
    assert sdlab("crop", images, "--size", 128, "--output", output) == 0
    assert content(output) == expected


def test_a_second_heap_never_takes_the_place_of_the_first_ones_results(
    pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pictures({"x.png": (64, 64)}, "first"), pictures({"x.png": (96, 64)}, "second")
    (first / "x.cap").write_text("mine\n", encoding="utf-8")
    assert sdlab("crop", first, "--size", 32, "--output", tmp_path / "cut") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    capsys.readouterr()
    assert sdlab("crop", second, "--size", 32, "--output", tmp_path / "cut") == 2
    assert "results of other pictures" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == before


def test_a_pole_has_a_preview_too(pictures: Callable[..., Path], tmp_path: Path) -> None:
    images = pictures({"pole.png": (4000, 9), "beam.png": (9, 4000), "a.png": (64, 64)})
    assert sdlab("crop", images, "--size", 96, "--preview", tmp_path / "preview.png") == 0
    assert (tmp_path / "preview.png").stat().st_size
