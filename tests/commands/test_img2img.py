"""`sdlab img2img` as a user meets it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlab.inference.record import metadata
from tests.commands.test_generate import QUICK, Ran, model, pixels, sdlab

__all__ = ["model", "sdlab"]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but the report of the last run."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def folder(pictures: Callable[..., Path]) -> Path:
    """Three good pictures, and between them one that is cut short and one that is none."""
    root = pictures(
        {"a.jpg": (64, 64), "deep/er/b.png": (48, 64), "deep/c.webp": (64, 64), "notes/d.png": (64, 64)}
    )
    whole = (root / "deep/er/b.png").read_bytes()
    (root / "deep" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (root / "notes" / "d.png").write_bytes(b"not a picture")
    (root / "notes" / "readme.txt").write_text("x")
    return Path(root.name)


def test_folder_is_mirrored_and_bad_pictures_are_named(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    before = tree(folder)
    ran = sdlab("img2img", "--load-model", model, "--init-image", folder, "--prompt", "blue", *QUICK)
    assert ran.code == 3
    assert list(tree(Path("output"))) == ["a.png", "deep/c.png", "deep/er/b.png"]
    assert sorted(p.as_posix() for p in ran.paths) == [
        "output/a.png",
        "output/deep/c.png",
        "output/deep/er/b.png",
    ]
    assert "deep/broken.png" in ran.err and "notes/d.png" in ran.err and "readme" not in ran.err
    assert "3 pictures made, 2 failed" in ran.err
    assert tree(folder) == before


def test_second_run_makes_what_is_missing_and_overwrites_nothing(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    job = ["img2img", "--load-model", model, "--init-image", folder, "--prompt", "blue", *QUICK]
    sdlab(*job)
    first = tree(Path("output"))
    ran = sdlab(*job, "--num", 2, "--batch", 2)
    second = tree(Path("output"))
    assert ran.code == 3 and "3 of 10 results are there already" in ran.err
    assert {name: second[name] for name in first} == first
    assert sorted(set(second) - set(first)) == ["a_2.png", "deep/c_2.png", "deep/er/b_2.png"]


def test_recipe_names_the_picture_it_came_from(sdlab: Callable[..., Ran], model: Path, folder: Path) -> None:
    start = folder / "deep" / "er" / "b.png"
    ran = sdlab(
        "img2img", "--load-model", model, "--init-image", start, "--prompt", "x", "--strength", 0.5, *QUICK
    )
    assert ran.code == 0 and ran.paths[0].name.startswith("sd_")
    about = metadata.read(ran.paths[0])
    assert about["init"]["name"] == "b.png" and about["init"]["asked"] == "images/deep/er/b.png"
    assert about["init"]["sha256"] == hashlib.sha256(start.read_bytes()).hexdigest()
    assert about["strength"] == 0.5 and about["guidance"] == 5.0
    assert (about["width"], about["height"]) == (64, 48)
    with Image.open(ran.paths[0]) as made:
        assert made.size == (64, 48)
        assert "Denoising strength: 0.5" in made.text["parameters"]


def test_changed_start_picture_is_named(sdlab: Callable[..., Ran], model: Path, folder: Path) -> None:
    start = folder / "a.jpg"
    made = sdlab("img2img", "--load-model", model, "--init-image", start, "--prompt", "x", *QUICK).paths[0]
    assert (pixels(sdlab("img2img", "--from", made).paths[0]) == pixels(made)).all()
    kept = start.read_bytes()
    start.write_bytes(kept + b"\0")
    ran = sdlab("generate", "--from", made)
    assert ran.code == 2 and "images/a.jpg has changed" in ran.err and ran.paths == []
    start.unlink()
    ran = sdlab("generate", "--from", made)
    assert ran.code == 2 and "images/a.jpg, is no longer there" in ran.err
    Path("moved.jpg").write_bytes(kept)
    ran = sdlab("img2img", "--from", made, "--init-image", "moved.jpg")
    assert ran.code == 0 and (pixels(ran.paths[0]) == pixels(made)).all()


@pytest.mark.parametrize(
    ("size", "flags", "expected"),
    [
        ((70, 53), [], (64, 48)),
        ((400, 300), [], (72, 56)),
        ((400, 300), ["--width", "96"], (96, 72)),
        ((400, 300), ["--width", "64", "--height", "64"], (64, 64)),
        ((400, 300), ["--image-size", "128"], (144, 112)),
    ],
)
def test_sizes(
    sdlab: Callable[..., Ran], model: Path, size: tuple[int, int], flags: list[str], expected: tuple[int, int]
) -> None:
    Image.new("RGB", size, "teal").save("start.png")
    ran = sdlab(
        "img2img", "--load-model", model, "--init-image", "start.png", "--prompt", "x", *QUICK, *flags
    )
    with Image.open(ran.paths[0]) as made:
        assert made.size == expected


def test_picture_is_seen_upright_and_on_its_background(sdlab: Callable[..., Ran], model: Path) -> None:
    clear = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
    clear.save("clear.png")
    job = ["img2img", "--load-model", model, "--prompt", "x", "--strength", 0.4, *QUICK]
    for name, colour in [("white", "white"), ("black", "black")]:
        Image.new("RGB", (64, 48), colour).save(f"{name}.png")
        one = sdlab(*job, "--init-image", "clear.png", "--background", name, "--output", name).paths[0]
        other = sdlab(*job, "--init-image", f"{name}.png", "--output", name).paths[0]
        assert (pixels(one) == pixels(other)).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), "teal").save("turned.jpg", exif=exif)
    assert pixels(sdlab(*job, "--init-image", "turned.jpg").paths[0]).shape == (64, 48, 3)


def test_little_strength_keeps_the_picture(sdlab: Callable[..., Ran], model: Path, folder: Path) -> None:
    job = ["img2img", "--load-model", model, "--init-image", folder / "a.jpg", "--prompt", "x", "--steps", 10]
    low, high, other = (
        pixels(sdlab(*job, "--strength", strength, "--seed", seed, "--guidance", 1).paths[0])
        for strength, seed in [(0.1, 1), (1.0, 1), (0.1, 2)]
    )
    assert np.abs(low - other).mean() < np.abs(low - high).mean()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x"], ["--init-image"]),
        (["--init-image", "images/a.jpg"], ["no prompt"]),
        (["--init-image", "gone.png", "--prompt", "x"], ["gone.png"]),
        (["--init-image", "images/deep/broken.png", "--prompt", "x"], ["broken.png"]),
        (["--init-image", "images", "--prompt", "x", "--output", "images"], ["--output"]),
        (["--init-image", "images", "--prompt", "x", "--output", "images/new"], ["inside"]),
        (["--init-image", "images/deep", "--prompt", "x", "--output", "images"], ["lies inside the output"]),
        (["--init-image", "images", "--prompt", "x", "--output", "./images/../images"], ["--output"]),
        (["--init-image", "images/a.jpg", "--prompt", "x", "--strength", "0"], ["change nothing"]),
        (["--init-image", "images/a.jpg", "--prompt", "x", "--strength", "1.5"], ["strength"]),
        (["--init-image", "images/a.jpg", "--prompt", "x", "--strength", "nan"], ["strength"]),
        (
            ["--init-image", "images/a.jpg", "--prompt", "x", "--strength", "0.1", "--steps", "5"],
            ["--steps 10"],
        ),
        (["--init-image", "images/a.jpg", "--prompt", "x", "--background", "reddish"], ["--background"]),
        (["--init-image", "images/a.jpg", "--prompt", "x", "--max-pixels", "100"], ["a.jpg"]),
        (["--init-image", "models", "--prompt", "x"], ["no pictures"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    sdlab: Callable[..., Ran], model: Path, folder: Path, flags: list[str], words: list[str]
) -> None:
    before = tree(folder)
    ran = sdlab("img2img", *flags, "--load-model", model)
    assert ran.code == 2 and ran.paths == [], ran.err
    assert len([line for line in ran.err.splitlines() if "error" in line]) == 1
    for word in words:
        assert word in ran.err
    assert tree(folder) == before and not (folder / "new").exists()
