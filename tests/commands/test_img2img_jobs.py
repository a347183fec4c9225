"""Jobs of `sdlab img2img` that meet bad lines, changed folders, masks and other settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sdlab.inference.jobs import drawing, output
from sdlab.inference.record import metadata
from tests.commands.test_generate import QUICK, Ran, model, pixels, sdlab

__all__ = ["model", "sdlab"]


class Killed(BaseException):
    """Ends the process where nothing is caught or tidied up."""


@pytest.fixture
def folder(pictures: Callable[..., Path]) -> Path:
    return Path(pictures({"a.png": (64, 64), "b.png": (64, 64)}).name)


def killed_at_the_second(patch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Run the job, which is killed before it writes its second picture; its journal stays."""
    begin, write_new = drawing.begin, output.write_new
    begun: list[drawing.Begun] = []
    written: list[object] = []

    def noted(*args: Any, **given: Any) -> drawing.Begun:
        begun.append(begin(*args, **given))
        return begun[-1]

    def write_one(*args: Any) -> Path | None:
        if written:
            raise Killed
        written.append(args)
        return write_new(*args)

    patch.setattr(drawing, "begin", noted)
    patch.setattr(output, "write_new", write_one)
    with pytest.raises(Killed):
        run()
    assert begun[0].journal is not None and begun[0].journal.path.exists()
    begun[0].journal.let_go()  # as the end of its process does


def test_a_bad_line_ends_nothing_and_is_named_for_each_picture(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    Path("p.txt").write_text("a red circle\na blue star --strength 0.1\n")
    job = ["img2img", "--load-model", model, "--input", folder, "--prompt-file", "p.txt", *QUICK]
    ran = sdlab(*job)
    assert ran.code == 3
    assert sorted(path.name for path in ran.paths) == ["a.png", "b.png"]
    report = json.loads(Path("output/report.json").read_text())
    assert [(one["where"], one["index"], one["prompt"]) for one in report["failed"]] == [
        ("p.txt:2", 1, "a blue star"),
        ("p.txt:2", 3, "a blue star"),
    ]


def test_a_picture_that_came_later_is_made_though_it_sorts_first(
    sdlab: Callable[..., Ran], model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["img2img", "--load-model", model, "--input", folder, "--prompt", "x", *QUICK]
    with monkeypatch.context() as patch:
        killed_at_the_second(patch, lambda: sdlab(*job))
    [first] = Path("output").glob("*.png")
    before = first.read_bytes()
    (folder / "0.png").write_bytes((folder / "a.png").read_bytes())  # in the place that a.png had
    ran = sdlab(*job)
    assert first.name == "a.png" and ran.code == 0 and "going on with the job" in ran.err
    assert [path.name for path in ran.paths] == ["0.png", "b.png"]
    assert [metadata.read(path)["init"]["name"] for path in ran.paths] == ["0.png", "b.png"]
    assert first.read_bytes() == before


def test_each_recipe_of_a_batch_names_what_its_batch_was_made_with(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    width = json.loads((model / "text_encoder" / "config.json").read_text())["hidden_size"]
    save_file({"emb_params": torch.randn(2, width)}, "zork.safetensors")
    job = ["img2img", "--load-model", model, "--input", folder / "a.png", "--embedding", "zork.safetensors"]
    ran = sdlab(*job, "--prompt", "a star", "--prompt", "a zork star", "--batch", 2, *QUICK)
    assert ran.code == 0
    again = sdlab("img2img", "--from", ran.paths[1], "--output", "again")
    assert again.code == 0 and (pixels(again.paths[0]) == pixels(ran.paths[1])).all()


@pytest.mark.parametrize(
    "other",
    [
        ["--steps", 4],
        ["--seed", 8],
        ["--guidance", 2],
        ["--strength", 0.5],
        ["--negative", "ugly"],
        ["--scheduler", "euler"],
        ["--clip-skip", 2],
        ["--mask", "mask.png"],
    ],
)
def test_results_made_with_other_settings_are_told(
    sdlab: Callable[..., Ran], model: Path, folder: Path, other: list[object]
) -> None:
    job = ["img2img", "--load-model", model, "--input", folder, "--limit", 1, "--prompt", "x", *QUICK]
    assert sdlab(*job).code == 0
    Image.new("L", (64, 64), 255).save("mask.png")
    same, changed = sdlab(*job), sdlab(*job, *other)
    assert "warning" not in same.err and same.paths == []
    assert "settings" in changed.err and changed.paths == []


def test_a_mask_keeps_what_is_black_and_any_bright_paint_counts(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    start = Image.effect_noise((64, 64), 80).convert("RGB")
    start.save("start.png")
    mask = Image.new("RGB", (64, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), fill="red")
    mask.save("red.png")
    job = ["img2img", "--load-model", model, "--init-image", "start.png", "--prompt", "x", *QUICK]
    [path] = sdlab(*job, "--mask", "red.png", "--mask-blur", 0).paths
    changed = (pixels(path) != pixels(Path("start.png"))).any(axis=-1)
    assert not changed[:, 32:].any() and changed[:, :32].mean() > 0.9
    recipe = metadata.read(path)
    assert recipe["mask"]["name"] == "red.png"
    again = sdlab("img2img", "--from", path, "--output", "again")
    assert (pixels(again.paths[0]) == pixels(path)).all()


@pytest.mark.parametrize("blur", [0, 4])
def test_red_paint_is_as_good_as_white_and_dark_grey_as_black(
    sdlab: Callable[..., Ran], model: Path, blur: int
) -> None:
    Image.effect_noise((64, 64), 80).convert("RGB").save("start.png")
    for name, paint, rest in (("red.png", "red", (127, 127, 127)), ("white.png", "white", (0, 0, 0))):
        mask = Image.new("RGB", (64, 64), rest)
        ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), fill=paint)
        mask.save(name)
    job = ["img2img", "--load-model", model, "--init-image", "start.png", "--prompt", "x", *QUICK]
    job += ["--mask-blur", blur, "--mask"]
    red, white = (pixels(sdlab(*job, name).paths[0]) for name in ("red.png", "white.png"))
    changed = (red != pixels(Path("start.png"))).any(axis=-1)
    assert (red == white).all()
    assert not changed[:, 32:].any() and changed[:, :16].mean() > 0.9


def test_a_mask_of_nothing_or_of_another_shape_is_refused(
    sdlab: Callable[..., Ran], model: Path, folder: Path
) -> None:
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (64, 64), 127).save("grey.png")
    Image.new("L", (64, 32), 255).save("wide.png")
    job = ["img2img", "--load-model", model, "--init-image", folder / "a.png", "--prompt", "x", *QUICK]
    everywhere = "black everywhere"
    for mask, said in (("black.png", everywhere), ("grey.png", everywhere), ("wide.png", "is 64x32")):
        ran = sdlab(*job, "--mask", mask)
        assert ran.code == 2 and said in ran.err and ran.paths == []
