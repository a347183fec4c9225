"""A folder of diffusers out of a single file: whole, complete, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, StableDiffusionPipeline
from safetensors.torch import load_file

from sdlab.convert import folder_out, stream
from sdlab.models.bases import builtin_folder
from sdlab.models.pieces import Pieces, read_pieces
from tests.models.helpers import UNET
from tests.program import sdlab, start

MINI = builtin_folder("mini-sd")


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mini-sd as one file."""
    file = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", file) == 0
    return file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)} {n}": t for f in files for n, t in load_file(f).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def test_there_and_back_gives_every_tensor_of_the_folder(mini_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "back"
    assert sdlab("convert", "--model-path", mini_file, "--checkpoint-path", folder) == 0
    assert same(tensors(folder), tensors(MINI))
    again = tmp_path / "again.safetensors"
    assert sdlab("convert", "--model-path", folder, "--checkpoint-path", again) == 0
    assert load_file(again).keys() == load_file(mini_file).keys()
    assert all(torch.equal(t, load_file(mini_file)[n]) for n, t in load_file(again).items())


def test_diffusers_opens_the_folder_and_draws_the_same(mini_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "back"
    assert sdlab("convert", "--model-path", mini_file, "--checkpoint-path", folder) == 0
    pictures = []
    for path in (MINI, folder):
        pipeline = StableDiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        drawn = pipeline("red star", num_inference_steps=2, generator=generator, height=64, width=64)
        pictures.append(drawn.images[0].tobytes())
    assert pictures[0] == pictures[1]


def test_a_file_becomes_a_folder_beside_it_with_the_names_older_tools_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", file) == 0
    assert sdlab("convert", "--model-path", file) == 0
    names = load_file(tmp_path / "mine" / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)
    assert (tmp_path / "mine" / "tokenizer" / "vocab.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.safetensors"]


def test_half_is_one_rounding_in_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    assert sdlab("convert", "--model-path", MINI, "--half", "--checkpoint-path", folder) == 0
    source = tensors(MINI)
    assert same(tensors(folder), {n: t.half() if t.is_floating_point() else t for n, t in source.items()})


@pytest.mark.parametrize("base", ["mini-sd", "mini-flux2"])
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_the_text_encoders_configuration_names_the_type_of_its_weights(
    base: str, dtype: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "brain"
    assert sdlab("convert", "--model-path", base, "--dtype", dtype, "--checkpoint-path", folder) == 0
    said = json.loads((folder / "text_encoder" / "config.json").read_text())
    source = json.loads((builtin_folder(base) / "text_encoder" / "config.json").read_text())
    assert said == {**source, "dtype": name}


def test_configurations_within_a_configuration_name_the_type_too() -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "layers": 2}, "vision": {}}
    wanted = {"dtype": "float16", "text_config": {"torch_dtype": "float16", "layers": 2}, "vision": {}}
    assert folder_out._retyped(config, "F16") == wanted


def test_an_inpainting_model_is_named_so(tmp_path: Path) -> None:
    pieces = read_pieces(MINI)
    unet = pieces.networks["unet"]
    wider = replace(unet, config={**unet.config, "in_channels": 9})
    inpainting = replace(pieces, networks={**pieces.networks, "unet": wider})
    for made, name in ((pieces, "StableDiffusionPipeline"), (inpainting, "StableDiffusionInpaintPipeline")):
        folder = tmp_path / name
        folder.mkdir()
        folder_out.write_rest(folder, pieces=made, dtype=None)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == name


def test_every_file_and_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    name = folder_out._name

    def check(staged: Path, path: Path) -> None:
        assert {p.stat().st_ino for p in (staged, *staged.rglob("*"))} <= synced
        name(staged, path)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(folder_out, "_name", check)
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", tmp_path / "x") == 0


def test_a_folder_that_is_being_written_survives_anothers_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rest, seen = folder_out.write_rest, []

    def swept(staged: Path, *, pieces: Pieces, dtype: str | None) -> None:
        before = sorted(staged.rglob("*"))
        folder_out.sweep(tmp_path)  # a lock of this process is in its own way too
        seen.append(before == sorted(staged.rglob("*")) and bool(before))
        write_rest(staged, pieces=pieces, dtype=dtype)

    monkeypatch.setattr(folder_out, "write_rest", swept)
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", tmp_path / "x") == 0
    assert seen == [True]


def test_a_folder_stays_where_the_disk_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".x.safetensors.0a1b2c3d.sdlab-part"
    lock.touch()
    staged = Path(f"{lock}-folder")
    staged.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(stream, "hold", lambda handle: False)
        folder_out.sweep(tmp_path)
        assert lock.exists() and staged.exists()
    folder_out.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_space_for_the_whole_folder_is_known_before_its_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_bytes = sum(t.nbytes for t in tensors(MINI).values())
    nearly = shutil.disk_usage(tmp_path)._replace(free=num_bytes - 1)  # enough for each file of it
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly)
    monkeypatch.setattr(stream, "part_beside", None)
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", tmp_path / "x") == 4
    assert f"{num_bytes / 1e6:,.1f} MB are needed" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_a_name_that_is_too_long_is_one_line(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("x" * (247 - len(ending)) + ending)
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", path) == 2
    said = capsys.readouterr().err
    assert "name is too long" in said and "--checkpoint-path" in said and "fault of sdlab" not in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(mini_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("my own")
    assert sdlab("convert", "--model-path", mini_file, "--checkpoint-path", folder) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and (folder / "a.txt").read_text() == "my own"


def test_a_flux2_folder_in_half_is_whole_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "flux2"
    assert sdlab("convert", "--model-path", "mini-flux2", "--dtype", "bf16", "--checkpoint-path", folder) == 0
    source = builtin_folder("mini-flux2")
    assert {p.relative_to(folder) for p in folder.rglob("*.json")} == {
        p.relative_to(source) for p in source.rglob("*.json")
    }
    generate = ("generate", "--load-model", folder, "--prompt", "red star", "--steps", "1")
    assert sdlab(*generate, "--output", tmp_path / "out") == 0


@pytest.mark.parametrize("prefix", [(), ("--comfyui",)])
def test_a_flux2_transformer_there_and_back_is_the_same(prefix: tuple[str, ...], tmp_path: Path) -> None:
    file, folder = tmp_path / "t.safetensors", tmp_path / "back"
    assert sdlab("convert", "--model-path", "mini-flux2", "--checkpoint-path", file, *prefix) == 0
    names = load_file(file).keys()
    assert all(name.startswith("model.diffusion_model.") == bool(prefix) for name in names)
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", folder) == 0
    opened = Flux2Transformer2DModel.from_pretrained(folder, dtype=torch.float32)
    source = Flux2Transformer2DModel.from_pretrained(
        builtin_folder("mini-flux2"), subfolder="transformer", dtype=torch.float32
    )
    assert same(opened.state_dict(), source.state_dict())


@pytest.mark.parametrize(("base", "kind"), [("mini-sd", AutoencoderKL), ("mini-flux2", AutoencoderKLFlux2)])
def test_a_vae_alone_there_and_back_is_the_same(base: str, kind: type, tmp_path: Path) -> None:
    file, folder = tmp_path / "vae.safetensors", tmp_path / "back"
    assert sdlab("convert", "--model-path", base, "--only", "vae", "--checkpoint-path", file) == 0
    assert "encoder.conv_in.weight" in load_file(file)
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", folder) == 0
    opened = kind.from_pretrained(folder, dtype=torch.float32)
    source = kind.from_pretrained(builtin_folder(base), subfolder="vae", dtype=torch.float32)
    assert same(opened.state_dict(), source.state_dict())


def test_a_kill_leaves_no_folder_and_the_next_run_sweeps(tmp_path: Path) -> None:
    folder = tmp_path / "back"
    command = ("convert", "--model-path", MINI, "--checkpoint-path", folder)
    child = start(*command)
    for _ in range(2000):
        if list(tmp_path.glob(".back*-folder/unet/*")):
            break
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not folder.exists() and list(tmp_path.glob(".back*"))
    assert sdlab(*command) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["back"]
    assert (folder / UNET).is_file()


def test_a_fault_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(staged: Path, **about: object) -> None:
        raise OSError(28, "No space left on device", str(staged))

    monkeypatch.setattr(folder_out, "write_rest", fails)
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", tmp_path / "x") == 4
    assert not list(tmp_path.iterdir())


def test_the_report_names_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    assert sdlab("convert", "--model-path", MINI, "--checkpoint-path", folder, "--json") == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {folder / name for name in files} == set(folder.rglob("*.safetensors"))
