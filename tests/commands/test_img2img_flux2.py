"""`sdlab img2img` with FLUX.2: folders of edits that can be stopped and gone on with."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlab.inference.record import metadata
from sdlab.keyed import key
from tests.commands.test_generate import Ran, pixels, sdlab
from tests.commands.test_img2img import tree
from tests.program import start

__all__ = ["sdlab"]

QUICK = ["--steps", "2", "--guidance", "1", "--seed", "7"]


@pytest.fixture
def klein(tiny_klein_folder: Path, tmp_path: Path) -> Path:
    """The name of a copy of the tiny model in tmp_path, where `sdlab` runs."""
    shutil.copytree(tiny_klein_folder, tmp_path / "models" / "klein")
    return Path("models/klein")


def photos(root: Path, names: list[str]) -> Path:
    """A folder of 64x64 pictures that differ in colour and pattern."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:64, :64]
        colours = (
            np.stack([x * (1 + key(name, 0) % 4), y * (1 + key(name, 1) % 4), x + y], -1) + key(name, 2) % 90
        )
        Image.fromarray((colours % 256).astype(np.uint8)).save(path)
    return root


def test_forty_pictures_three_broken_and_a_kill(
    sdlab: Callable[..., Ran], klein: Path, tmp_path: Path
) -> None:
    names = [f"{'trip/' * (i % 3 == 0)}p{i:02d}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(40)]
    source = photos(tmp_path / "photos", names)
    broken = [source / names[i] for i in (3, 17, 32)]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"no picture at all")
    broken[2].write_bytes(b"")
    before = tree(source)
    job = ["img2img", "--load-model", klein, "--input", "photos", "--prompt", "Make it winter", *QUICK]

    running = start(*job, "--output", "edited", cwd=tmp_path)
    assert running.stdout is not None
    for _ in range(12):
        assert running.stdout.readline()
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    halfway = {name: data for name, data in tree(Path("edited")).items() if name.endswith(".png")}
    assert 12 <= len(halfway) < 37
    for name in halfway:
        assert metadata.read(Path("edited") / name)["prompt"] == "Make it winter"  # whole, to the last pixel

    ran = sdlab(*job, "--output", "edited")
    assert ran.code == 3 and len(ran.paths) == 37 - len(halfway)
    assert f"{len(halfway)} of 40 results are there already" in ran.err and "3 failed" in ran.err
    assert all(path.name in ran.err for path in broken) and "warning" not in ran.err
    made = {name: data for name, data in tree(Path("edited")).items() if name.endswith(".png")}
    good = sorted(Path(name).with_suffix(".png").as_posix() for name in names if source / name not in broken)
    assert sorted(made) == good and {name: made[name] for name in halfway} == halfway
    assert tree(source) == before

    at_once = sdlab(*job, "--output", "again")
    assert at_once.code == 3 and tree(Path("again")) == made  # bit for bit, recipes too
    assert len(set(made.values())) == 37


def test_picture_is_the_reference_and_ref_adds_more(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.png", "b.png"])
    photos(Path(), ["style.jpg"])
    job = ["img2img", "--load-model", klein, "--init-image", "photos", "--prompt", "x", *QUICK]
    plain = sdlab(*job, "--output", "plain")
    more = sdlab(*job, "--output", "more", "--ref", "style.jpg")
    assert plain.code == more.code == 0
    for one, other in zip(plain.paths, more.paths, strict=True):
        assert (pixels(one) != pixels(other)).any()
    about = metadata.read(more.paths[1])
    assert [seen["asked"] for seen in about["references"]] == ["photos/b.png", "style.jpg"]
    assert about["kind"] == "edit" and about["init"] is None and about["strength"] is None
    alone = sdlab("generate", "--load-model", klein, "--prompt", "x", *QUICK, "--ref", "photos/a.png")
    assert (pixels(alone.paths[0]) == pixels(plain.paths[0])).all()


def test_strength_starts_from_the_picture_instead(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.png"])
    photos(Path(), ["style.jpg"])
    job = ["img2img", "--load-model", klein, "--init-image", "photos/a.png", "--prompt", "x", *QUICK]
    looked, started, both = (
        sdlab(*job, *flags).paths[0]
        for flags in ([], ["--strength", 0.5], ["--strength", 0.5, "--ref", "style.jpg"])
    )
    abouts = [metadata.read(path) for path in (looked, started, both)]
    assert [about["strength"] for about in abouts] == [None, 0.5, 0.5]
    assert [len(about["references"]) for about in abouts] == [1, 0, 1]
    assert abouts[1]["init"]["asked"] == "photos/a.png" and abouts[1]["kind"] == "img2img"
    assert (pixels(looked) != pixels(started)).any() and (pixels(started) != pixels(both)).any()
    with Image.open(started) as made:
        assert "Denoising strength: 0.5" in made.text["parameters"]


def test_some_of_a_folder_are_as_in_the_whole(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.jpg", "a.png", "b/c.png", "d.png"])
    job = ["img2img", "--load-model", klein, "--input", "photos", "--prompt", "x", *QUICK]
    whole = sdlab(*job, "--output", "whole")
    names = [path.relative_to("whole").as_posix() for path in whole.paths]
    assert whole.code == 0 and names == ["a_jpg.png", "a_png.png", "b/c.png", "d.png"]
    some = sdlab(*job, "--output", "some", "--start", 1, "--limit", 2)
    assert [path.relative_to("some").as_posix() for path in some.paths] == names[1:3]
    assert tree(Path("some")) == {
        name: data for name, data in tree(Path("whole")).items() if name in names[1:3]
    }
    assert [metadata.read(path)["seed"] for path in some.paths] == [8, 9]
    for flags, word in [(["--start", 4], "there are 4 pictures"), (["--limit", 0], "limit")]:
        ran = sdlab(*job, "--output", "none", *flags)
        assert ran.code == 2 and word in ran.err
    ran = sdlab(*job[:3], "--input", "photos/a.jpg", *job[5:], "--limit", 2)
    assert ran.code == 2 and "--limit" in ran.err


def test_results_that_are_there_are_told_from_what_is_asked_now(
    sdlab: Callable[..., Ran], klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(Path("photos"), ["a.png", "b.png"])
    job = ["img2img", "--load-model", klein, "--input", "photos", "--output", "out", *QUICK]
    assert sdlab(*job, "--prompt", "x").code == 0
    first = tree(Path("out"))
    more = sdlab(*job, "--prompt", "x", "--num", 2)
    assert sorted(path.name for path in more.paths) == ["a_2.png", "b_2.png"]
    assert {name: tree(Path("out"))[name] for name in first} == first
    Path("out/b_2.png").write_bytes(b"mine")

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to do, so nothing is loaded")

    monkeypatch.setattr("sdlab.inference.jobs.session.open_session", loaded)
    ran = sdlab(*job, "--prompt", "x")
    assert ran.code == 0 and ran.paths == [] and "2 of 2 results are there already" in ran.err
    assert "warning" not in ran.err
    ran = sdlab(*job, "--prompt", "y")
    assert ran.code == 0 and "2 of them are not of this prompt, picture and settings, as out/a.png" in ran.err
    ran = sdlab(*job, "--prompt", "x", "--num", 2)
    assert "2 of them are not of this prompt, picture and settings, as out/b.png" in ran.err  # seed
    assert Path("out/b_2.png").read_bytes() == b"mine"


def test_batch_with_a_result_missing_is_made_as_before(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.png"])
    job = ["img2img", "--load-model", klein, "--input", "photos", "--output", "out", "--prompt", "x", *QUICK]
    job += ["--num", "3", "--batch", "3"]
    sdlab(*job)
    before = tree(Path("out"))
    Path("out/a_2.png").unlink()
    ran = sdlab(*job)
    assert [path.name for path in ran.paths] == ["a_2.png"] and tree(Path("out")) == before


def test_picture_that_cannot_be_looked_at_is_one_that_failed(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.png"])
    Image.new("RGB", (144, 48)).save("photos/long.png")
    ran = sdlab("img2img", "--load-model", klein, "--input", "photos", "--prompt", "x", *QUICK)
    assert ran.code == 3 and [path.name for path in ran.paths] == ["a.png"]
    assert "photos/long.png" in ran.err and "cannot be looked at" in ran.err


def test_picture_that_moved_is_said(sdlab: Callable[..., Ran], klein: Path) -> None:
    photos(Path("photos"), ["a.png"])
    photos(Path(), ["style.jpg"])
    job = ["img2img", "--load-model", klein, "--init-image", "photos/a.png", "--prompt", "x", *QUICK]
    made = sdlab(*job, "--ref", "style.jpg").paths[0]
    Path("photos/a.png").rename("b.png")
    ran = sdlab("img2img", "--from", made)
    assert ran.code == 2 and "photos/a.png, is no longer there" in ran.err
    ran = sdlab("img2img", "--from", made, "--init-image", "b.png", "--ref", "style.jpg")
    assert ran.code == 0 and (pixels(ran.paths[0]) == pixels(made)).all()
