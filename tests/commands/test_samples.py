"""`sdlab samples` as a user meets it: sheets, cells, exit codes, going on, and drawing again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlab import cli
from sdlab.inference.jobs import output
from sdlab.inference.record import metadata

QUICK = ["--load-model", "models/tiny", "--steps", "1", "--seed", "7"]


@dataclass(frozen=True)
class Ran:
    code: int
    paths: list[Path]
    err: str

    @property
    def folder(self) -> Path:
        return self.sheets[0].parent

    @property
    def sheets(self) -> list[Path]:
        return [path for path in self.paths if path.name.startswith("sheet")]

    @property
    def cells(self) -> list[Path]:
        return sorted((self.folder / "cells").iterdir())


@pytest.fixture
def sdlab(
    tmp_path: Path, tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run the program in tmp_path, where models/tiny is the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_sd_folder, tmp_path / "models" / "tiny")

    def run(*args: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        told = capsys.readouterr()
        return Ran(int(ended.value.code or 0), [Path(line) for line in told.out.splitlines()], told.err)

    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_rows_are_prompts_and_columns_seeds(sdlab: Callable[..., Ran]) -> None:
    ran = sdlab("samples", *QUICK, "--prompt", "red", "--prompt", "blue", "--num", 3)
    assert ran.code == 0, ran.err
    assert [path.name for path in ran.cells] == [f"000{i}.png" for i in range(6)]
    recipes = [metadata.read(path) for path in ran.cells]
    assert [(one["prompt"], one["seed"]) for one in recipes] == [
        (p, s) for p in ("red", "blue") for s in (7, 8, 9)
    ]
    told = json.loads((ran.folder / "samples.json").read_text())["sheets"][0]
    assert told["rows"] == ["red", "blue"] and told["columns"] == ["seed 7", "seed 8", "seed 9"]
    assert told["common"] == "tiny · 64x64 · 1 step · guidance 7"
    assert ran.sheets == [ran.folder / "sheet.png"]


def test_axes_as_typed_and_a_sheet_for_each_prompt(
    sdlab: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlab.inference import load

    loads = []
    kept = load.load
    monkeypatch.setattr(
        load, "load", lambda opened, *a, **k: (loads.append(opened), kept(opened, *a, **k))[1]
    )
    shutil.copytree("models/tiny", "models/other")
    ran = sdlab(
        *("samples", "--grid", "x:guidance=1,4,7", "y:checkpoint=models/tiny,models/other", "--steps", 1),
        *("--seed", 7, "--prompt", "red", "--prompt", "blue", "--batch", 4),
    )
    assert ran.code == 0, ran.err
    assert [path.name for path in ran.sheets] == ["sheet.png", "sheet_2.png"]
    assert len(loads) == 2  # each model once, though both are on both sheets
    recipes = [metadata.read(path) for path in ran.cells]
    wanted = [(p, m, g) for p in ("red", "blue") for m in ("tiny", "other") for g in (1, 4, 7)]
    assert [(one["prompt"], one["model"]["name"], one["guidance"]) for one in recipes] == wanted
    assert {one["seed"] for one in recipes} == {7}
    told = json.loads((ran.folder / "samples.json").read_text())["sheets"]
    assert [one["title"] for one in told] == ["red", "blue"]
    assert told[0]["rows"] == ["tiny", "other"] and told[0]["common"] == "64x64 · 1 step · seed 7"


def test_a_cell_is_remade_from_its_own_recipe(sdlab: Callable[..., Ran]) -> None:
    ran = sdlab("samples", *QUICK[:2], "--seed", 3, "--prompt", "red", "--grid", "x:steps=1,2", "y:cfg=1,7")
    again = sdlab("generate", "--from", ran.cells[3], "--output", "again")
    assert again.code == 0, again.err
    assert (pixels(again.paths[0]) == pixels(ran.cells[3])).all()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--grid", "x:guidance=1..100", "y:steps=1..150"], "pictures, more than 10,000"),
        (["--grid", "x:guidance=1..60", "y:steps=1..60", "--hires", "4", "--prompt", "a"], "--cell 128"),
        (["--grid", "x:guidance=1,2", "x:steps=1,2"], "two axes have the place x"),
        (["--grid", "x:guidance=1,2", "--guidance", "3"], "leave it out"),
        (["--grid", "x:output=a,b"], "does not change"),
        (["--grid", "x:model=models/tiny,models/none", "--prompt", "a"], "models/none"),
        (["--explain"], "generate --explain"),
    ],
)
def test_what_cannot_be_is_refused_at_once_and_leaves_nothing(
    sdlab: Callable[..., Ran], args: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: object, **options: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("sdlab.inference.load.open_chosen", opened)
    model = [] if "x:model" in " ".join(args) else QUICK[:2]
    began = time.process_time()
    ran = sdlab("samples", *model, *args)
    assert time.process_time() - began < 1.0
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1
    assert not Path("output").exists()


def test_a_failed_picture_is_a_red_frame_and_the_others_are_made(sdlab: Callable[..., Ran]) -> None:
    Path("prompts.txt").write_text("red\nblue --width 10000\ngreen\n")
    ran = sdlab("samples", *QUICK, "--prompt-file", "prompts.txt", "--num", 2)
    assert ran.code == 3 and "prompts.txt:2" in ran.err
    assert [path.name for path in ran.cells] == ["0000.png", "0001.png", "0004.png", "0005.png"]
    told = json.loads((ran.folder / "samples.json").read_text())["sheets"][0]["cells"]
    assert [bool(cell["fault"]) for row in told for cell in row] == [False, False, True, True, False, False]
    assert "10000" in told[1][0]["fault"]
    assert (pixels(ran.sheets[0]) == (0xC8, 0x10, 0x2E)).all(axis=2).any()
    assert json.loads((ran.folder / "report.json").read_text())["failed"][0]["index"] == 2


def test_a_stopped_job_goes_on_and_ends_with_the_same_bytes(
    sdlab: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["samples", *QUICK, "--prompt", "red", "--grid", "x:cfg=1,4,7", "y:seed=1,2"]
    job = [part for part in job if part not in ("--seed", "7")]
    whole = sdlab(*job, "--output", "whole")
    assert whole.code == 0, whole.err
    kept, count = output.write_new, []

    def stopping(*args: object, **options: object) -> Path | None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return kept(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(output, "write_new", stopping)
        stopped = sdlab(*job, "--output", "parts")
    assert stopped.code == 130 and "--redraw parts/samples_" in stopped.err
    [folder] = Path("parts").glob("samples_*")
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert len(made) == 2
    redrawn = sdlab("samples", "--redraw", folder)
    assert redrawn.code == 3 and redrawn.sheets == [folder / "sheet.png"]
    rest = sdlab(*job, "--output", "parts")
    assert rest.code == 0 and rest.folder == folder
    assert all((folder / "cells" / name).stat().st_mtime_ns == when for name, when in made.items())
    assert (folder / "sheet.png").read_bytes() == whole.sheets[0].read_bytes()
    for one, other in zip(rest.cells, whole.cells, strict=True):
        assert (pixels(one) == pixels(other)).all()
    assert not list(Path("parts").glob(".*"))


def test_the_same_command_again_makes_new_sheets(sdlab: Callable[..., Ran]) -> None:
    job = ["samples", *QUICK, "--prompt", "red", "--num", 2]
    first, second = sdlab(*job), sdlab(*job)
    assert first.folder != second.folder and len(second.cells) == 2


def test_redraw_names_cells_that_are_not_what_was_made(sdlab: Callable[..., Ran]) -> None:
    ran = sdlab("samples", "--prompt", "x", "--num", 3, *QUICK)
    gone, foreign, _ = ran.cells
    gone.unlink()
    Image.new("RGB", (64, 64), "red").save(foreign)
    again = sdlab("samples", "--redraw", ran.folder)
    assert again.code == 3 and again.sheets == [ran.folder / "sheet.png"]
    assert "0000.png is not there" in again.err and "0001.png is not the picture that was made" in again.err


def test_redraw_gives_the_same_bytes_without_a_model(sdlab: Callable[..., Ran]) -> None:
    ran = sdlab("samples", *QUICK, "--prompt", "red", "--num", 2, "--cell", 32, "--format", "webp")
    assert ran.code == 0, ran.err
    before = ran.sheets[0].read_bytes()
    ran.sheets[0].unlink()
    shutil.rmtree("models")
    again = sdlab("samples", "--redraw", ran.folder)
    assert again.code == 0 and again.paths == ran.sheets and ran.sheets[0].read_bytes() == before
    refused = sdlab("samples", "--redraw", ran.folder, "--steps", 3)
    assert refused.code == 2 and "leave out --steps" in refused.err


def test_without_a_prompt_the_default_ones_are_shown(sdlab: Callable[..., Ran]) -> None:
    ran = sdlab("samples", *QUICK, "--num", 1, "--batch", 8)
    assert ran.code == 0 and len(ran.cells) == 8
    assert "fisherman" in metadata.read(ran.cells[0])["prompt"]


def a_run(folder: Path) -> Path:
    """A finished run of the tiny model, with a checkpoint whose weights are other ones; the checkpoint."""
    shutil.copytree("models/tiny", folder)
    about = {"state": "finished", "ended": "2026-01-31T12:00:00Z", "adapter": {"kind": "full"}}
    model = {"kind": "folder", "path": str(Path("models/tiny").absolute())}
    (folder / "run.json").write_text(json.dumps({**about, "model": model}))
    checkpoint = folder / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 0.9 for name, tensor in weights.items()}, checkpoint / "weights.safetensors")
    (checkpoint / "manifest.json").write_text("{}")
    return checkpoint


def test_a_checkpoint_of_a_run_is_a_model_like_any_other(sdlab: Callable[..., Ran]) -> None:
    checkpoint = a_run(Path("tuned/cats"))
    ran = sdlab(
        *("samples", "--grid", f"x:checkpoint=models/tiny,tuned/cats,{checkpoint}"),
        *("--prompt", "red", "--steps", 1, "--seed", 7),
    )
    assert ran.code == 0, ran.err
    told = json.loads((ran.folder / "samples.json").read_text())["sheets"][0]
    assert told["columns"] == ["models/tiny", "cats", "cats step 10"]
    base, run, step = (pixels(path).astype(int) for path in ran.cells)
    assert (base == run).all() and (base != step).any()
    as_unet = sdlab(
        *("generate", "--load-model", "tuned/cats", "--unet", checkpoint / "weights.safetensors"),
        *("--prompt", "red", "--steps", 1, "--seed", 7),
    )
    assert (pixels(as_unet.paths[0]) == step).all()
    again = sdlab("generate", "--from", ran.cells[2], "--output", "again")
    assert again.code == 0 and (pixels(again.paths[0]) == step).all()
