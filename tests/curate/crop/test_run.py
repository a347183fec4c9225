"""A folder cut into another: the same pixels as training's, nothing of the user's touched, done work kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdlab.curate.crop.results import INDEX, PARTS, Results
from sdlab.curate.crop.run import Outcome, Settings, crop_pictures
from sdlab.curate.crop.sizes import Wanted
from sdlab.dataset import tree
from sdlab.dataset.buckets import bucket_sizes, nearest
from sdlab.dataset.picture import cover, open_picture
from sdlab.errors import SdlabError
from sdlab.testing.planted import photo, planted

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SMALL = Settings(Wanted(side_px=32), focus="center", format="png")


def run(images: Path, output: Path, settings: Settings = SMALL, **given: object) -> list[Outcome]:
    with Results(output) as results:
        results.begin(settings.as_json())
        return crop_pictures(
            tree.scan(images),
            results,
            settings,
            max_pixels=64_000_000,
            num_workers=2,
            **given,  # type: ignore[arg-type]
        )


def content(root: Path) -> dict[str, str]:
    """Hash of every file below a folder but the index, by its path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != INDEX
    }


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Pictures with everything that goes along, in folders of every kind."""
    root = tmp_path / "images"
    for name, seed in (
        ("girl/a.jpg", 1),
        ("girl/a.png", 2),
        ("_v2/b.webp", 3),
        ("c.bmp", 4),
        ("__no/d.png", 5),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        planted(seed).image.resize((120, 90)).save(root / name)
    (root / "girl/a.cap").write_bytes(b"\xef\xbb\xbfher\r\n")
    (root / "_v2/b.txt").write_bytes("猫".encode("cp932"))
    planted(6).image.resize((120, 90)).save(root / "c.ref.jpg")
    planted(7).image.resize((60, 45)).save(root / "c.ref2.png")
    (root / "notes.md").write_text("not a picture")
    return root


def test_the_tree_is_mirrored_with_captions_and_references(images: Path, tmp_path: Path) -> None:
    before, output = content(images), tmp_path / "out"
    run(images, output)
    made = content(output)
    assert set(made) == {
        "_v2/b.png", "_v2/b.txt", "c.png", "c.ref.png", "c.ref2.png", "girl/a.cap", "girl/a.png", "girl/a_2.cap",
        "girl/a_2.png",
    }  # fmt: skip
    assert made["girl/a.cap"] == made["girl/a_2.cap"] == before["girl/a.cap"]
    assert made["_v2/b.txt"] == before["_v2/b.txt"]
    assert content(images) == before
    prompts = {sample.prompt for sample in tree.scan(output).samples}
    assert prompts == {sample.prompt for sample in tree.scan(images).samples}
    assert (output / INDEX).exists() and not (output / PARTS).exists()


def test_the_centre_of_a_bucket_is_bit_for_bit_what_training_cuts(tmp_path: Path) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    sizes = bucket_sizes(64, grid=8)
    for seed, size in enumerate([(300, 200), (64, 64), (131, 257), (640, 100), (90, 91)]):
        planted(seed).image.resize(size).save(root / f"{seed}.png")
    outcomes = run(root, output, Settings(Wanted(side_px=64, buckets=True), focus="center"))
    assert len(outcomes) == 5
    for one in outcomes:
        image = open_picture(one.task.sample.path)
        expected = cover(image, nearest((image.height, image.width), sizes))
        assert np.array_equal(pixels(output / one.result), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_cut_as_they_are_seen(tmp_path: Path, orientation: int) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    image = Image.new("RGB", (120, 80), "blue")
    image.paste("red", (0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(root / "a.png", exif=exif)
    run(root, output, Settings(Wanted(side_px=40), focus="center"))
    assert np.array_equal(
        pixels(output / "a.png"), np.asarray(cover(open_picture(str(root / "a.png")), (40, 40)))
    )
    with Image.open(output / "a.png") as cut:
        assert cut.getexif().get(0x112, 1) == 1


@pytest.mark.parametrize("focus", ["center", "saliency"])
def test_a_large_jpeg_differs_from_the_exact_result_by_less_than_two_steps(
    tmp_path: Path, focus: str
) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    photo(1, (1200, 1600)).save(root / "a.jpg", quality=92)
    (one,) = run(root, output, Settings(Wanted(side_px=224), focus=focus, format="png"))
    assert one.cut
    exact = cover(open_picture(str(root / "a.jpg")), (224, 224), one.cut.place)
    difference = np.abs(pixels(output / "a.png").astype(float) - np.asarray(exact)).mean()
    assert 0 < difference < 2  # 0 would say that the JPEG was decoded in full


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_the_colours_are_srgb_and_no_other_profile_is_left_on_them(tmp_path: Path, format: str) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.new("LAB", (32, 32), (128, 60, 200)).save(root / "a.tiff", icc_profile=profile)
    exif = Image.Exif()
    exif[0x10F] = "a camera"
    Image.new("RGB", (40, 32), "red").save(root / "b.png", icc_profile=SRGB, exif=exif, dpi=(300, 300))
    Image.new("RGBA", (40, 32), (255, 0, 0, 0)).save(root / "c.png")
    run(root, output, Settings(Wanted(side_px=32), focus="center", format=format, background=(0, 0, 255)))
    assert len(list(output.glob("?.*"))) == 3
    for path in output.glob("?.*"):
        with Image.open(path) as image:
            assert image.mode == "RGB" and not {"icc_profile", "exif", "transparency"} & set(image.info)
    seen = pixels(next(output.glob("a.*"))).astype(int)
    assert np.abs(seen - np.asarray(open_picture(str(root / "a.tiff")))).max() <= 12
    assert np.abs(pixels(next(output.glob("c.*"))).astype(int) - (0, 0, 255)).max() <= 12


def test_a_reference_of_the_same_shape_is_cut_where_its_picture_is(tmp_path: Path) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    place = (10, 300, 90, 380)
    for name, ground, scale in (
        ("a.png", "white", 1),
        ("a.ref.png", "white", 0.5),
        ("a.ref2.png", "white", 1),
    ):
        image = Image.new("RGB", (120, 400), ground)
        image.paste("red", place if name == "a.png" else (10, 10, 90, 90))
        image = image if name != "a.ref2.png" else image.crop((0, 0, 120, 200))
        image.resize((round(image.width * scale), round(image.height * scale))).save(root / name)
    run(root, output, Settings(Wanted(side_px=56), focus="saliency"))
    red = {path.name: (pixels(path)[..., 1] < 100).mean() for path in output.glob("*.png")}
    assert red["a.png"] > 0.3 and red["a.ref2.png"] > 0.3  # its own shape: cut by what stands out in it
    assert red["a.ref.png"] == 0  # cut where the picture is, and its subject is elsewhere


def test_a_second_run_does_nothing_and_a_changed_picture_is_cut_anew(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(images, output)
    first = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert all(one.was_done for one in run(images, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == first
    planted(99).image.save(images / "c.bmp")
    os.utime(images / "girl/a.jpg")  # touched, but the same
    (images / "_v2/b.txt").write_text("a dog")
    again = {one.task.sample.id: one.was_done for one in run(images, output)}
    assert again == {"c.bmp": False, "girl/a.jpg": True, "girl/a.png": True, "_v2/b.webp": False}
    assert (output / "_v2/b.txt").read_text() == "a dog"
    assert np.array_equal(
        pixels(output / "c.png"), np.asarray(cover(open_picture(str(images / "c.bmp")), (32, 32)))
    )


def test_what_the_user_changed_in_the_output_is_left_and_named(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(images, output)
    (output / "girl/a.cap").write_text("mine")
    (output / "c.png").write_bytes(b"mine")
    (output / "_v2/b.png").unlink()
    planted(99).image.save(images / "c.bmp")
    outcomes = {one.task.sample.id: one for one in run(images, output)}
    assert outcomes["girl/a.jpg"].edited == ("girl/a.cap",) and outcomes["c.bmp"].edited == ("c.png",)
    assert (output / "girl/a.cap").read_text() == "mine" and (output / "c.png").read_bytes() == b"mine"
    assert (output / "_v2/b.png").exists()


def test_files_that_are_not_ours_are_never_replaced(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "girl").mkdir(parents=True)
    (output / "c.png").write_bytes(b"a stranger")
    (output / "girl/a.cap").write_bytes((images / "girl/a.cap").read_bytes())  # the very same: no harm
    outcomes = {one.task.sample.id: one for one in run(images, output)}
    assert "is not ours" in outcomes["c.bmp"].reason and outcomes["c.bmp"].cut is None
    assert (output / "c.png").read_bytes() == b"a stranger" and not (output / "c.ref.png").exists()
    assert outcomes["girl/a.jpg"].cut


def test_a_linked_folder_in_the_output_leads_nowhere(images: Path, tmp_path: Path) -> None:
    output, before = tmp_path / "out", content(images)
    output.mkdir()
    (output / "girl").symlink_to(images / "girl")
    outcomes = {one.task.sample.id: one for one in run(images, output)}
    assert "is a link that leads elsewhere" in outcomes["girl/a.jpg"].reason
    assert content(images) == before


def test_other_settings_replace_what_is_ours_and_drop_the_old_names(images: Path, tmp_path: Path) -> None:
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    other = Settings(Wanted(side_px=24), focus="center", format="webp")
    run(images, output)
    (output / "c.png").write_bytes(b"mine now")
    run(images, output, other)
    run(images, fresh, other)
    assert content(output) == {**content(fresh), "c.png": hashlib.sha256(b"mine now").hexdigest()}


@pytest.mark.parametrize("damage", ["lost", "torn", "empty result", "garbage"])
def test_a_run_after_a_kill_ends_like_one_that_was_not_killed(
    images: Path, tmp_path: Path, damage: str
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    run(images, whole)
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        return done == 3

    assert len(run(images, output, stop=stop)) == 3
    index = output / INDEX
    if damage == "lost":
        index.unlink()
    elif damage == "torn":
        index.write_bytes(index.read_bytes()[:-20])
    elif damage == "garbage":
        index.write_bytes(index.read_bytes() + b"123\n\xff\xfe\n[]\n{}\n")
    else:
        next(output.rglob("*.png")).write_bytes(b"")
    (output / PARTS).mkdir()
    (output / PARTS / "7.part").write_bytes(b"half a pic")
    run(images, output)
    assert content(output) == content(whole)
    assert all(one.was_done for one in run(images, output))


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    with Results(tmp_path / "out") as first, Results(tmp_path / "out") as second:
        first.begin({})
        with pytest.raises(SdlabError, match="another sdlab is at work"):
            second.begin({})
    with Results(tmp_path / "out") as third:
        third.begin({})


def test_results_do_not_depend_on_workers_and_keep_their_names(images: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    for output, num_workers in ((one, 0), (many, 5)):
        with Results(output) as results:
            results.begin(SMALL.as_json())
            crop_pictures(tree.scan(images), results, SMALL, max_pixels=10**7, num_workers=num_workers)
    assert content(one) == content(many)
    shutil.copy(images / "_v2/b.webp", images / "_v2/b.bmp.png")
    planted(8).image.save(images / "_v2/b.gif")  # sorts before b.webp, yet b.png stays that of b.webp
    before = content(one)
    run(images, one)
    assert before.items() <= content(one).items() and "_v2/b_2.png" in content(one)


def test_names_that_are_long_or_not_utf8_are_kept_safe(tmp_path: Path) -> None:
    root, output = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    data = (planted(1).image.resize((50, 40)), "あ" * 66, os.fsdecode(b"\x93\xfa\x96{"), "CON", "a.b c")
    for stem in data[1:]:
        data[0].save(root / f"{stem}.gif")
        (root / f"{stem}.txt").write_text("x")
    outcomes = run(root, output)
    assert all(one.cut for one in outcomes)
    found = tree.scan(output)
    assert (
        len(found.samples) == 4 and not found.refused and {sample.prompt for sample in found.samples} == {"x"}
    )
    assert all(one.was_done for one in run(root, output))


def test_a_picture_with_a_damaged_reference_is_refused_with_both_named(images: Path, tmp_path: Path) -> None:
    (images / "c.ref2.png").write_bytes((images / "c.ref2.png").read_bytes()[:50])
    outcomes = {one.task.sample.id: one for one in run(images, tmp_path / "out")}
    assert outcomes["c.bmp"].reason.startswith("its reference c.ref2.png: ")
    assert not (tmp_path / "out/c.png").exists()


def test_the_index_is_readable_lines(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / INDEX).read_text().splitlines()]
    assert lines[0]["settings"]["side_px"] == 32
    assert [line["id"] for line in lines[1:]] == [sample.id for sample in tree.scan(images).samples]


def test_the_factory_of_pictures_is_cut_too(pictures: Callable[..., Path], tmp_path: Path) -> None:
    root = pictures({"a/b.png": (64, 48), "a/c.jpg": (30, 100), "d.png": (7, 100)})
    outcomes = {one.task.sample.id: one for one in run(root, tmp_path / "out")}
    assert outcomes["a/b.png"].cut and outcomes["a/b.png"].cut.plan.size_px == (32, 32)
    small = outcomes["a/c.jpg"].cut
    assert small and small.plan.own_scale and small.plan.size_px == (24, 24)
    assert outcomes["d.png"].reason == "100 x 7 is smaller than 8 x 8, the least that is kept"
