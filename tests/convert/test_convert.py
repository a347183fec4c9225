"""A model as one file: every tensor as it was, under the names that other tools read."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdlab.convert import stream
from sdlab.convert.cast import Piece
from sdlab.convert.plan import Output
from sdlab.models.bases import builtin_folder
from sdlab.models.files import read_header
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve
from tests.models.helpers import copied, edit_tensors
from tests.program import sdlab


@pytest.fixture
def broken(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return copied(tiny_sd_folder, tmp_path / "broken")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def states(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of the three networks."""
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}


def test_diffusers_reads_the_file_with_every_bit_of_the_folder(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = tiny_sd_folder
    file = tmp_path / "one.safetensors"
    assert sdlab("convert", "--model-path", folder, "--checkpoint-path", file) == 0
    settings = {"safety_checker": None, "dtype": torch.float32, "local_files_only": True}
    whole = states(StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **settings))
    source = states(StableDiffusionPipeline.from_pretrained(folder, **settings))
    assert whole.keys() == source.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in source.items())


def test_half_is_one_rounding_of_the_model_and_opens_again(tmp_path: Path) -> None:
    file = tmp_path / "mini.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--half", "--checkpoint-path", file) == 0
    assert {stored.dtype for stored in read_header(file).tensors.values()} == {"F16"}
    source = open_family(resolve("mini-sd", training=False)).parts
    again = open_family(resolve(str(file), training=False)).parts
    for part in ("unet", "vae", "text_encoder"):
        one, other = getattr(source, part).weights, getattr(again, part).weights
        names = {name for name in one if not name.endswith("position_ids")}
        assert names == {name for name in other if not name.endswith("position_ids")}
        for name in names:
            assert torch.equal(one[name].read().half(), other[name].read()), name


def test_a_flux2_transformer_opens_in_diffusers_and_here(tmp_path: Path) -> None:
    file = tmp_path / "flux2.safetensors"
    assert sdlab("convert", "--model-path", "mini-flux2", "--checkpoint-path", file) == 0
    folder = builtin_folder("mini-flux2")
    wanted = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
    theirs = Flux2Transformer2DModel.from_single_file(
        str(file), config=str(folder), subfolder="transformer", dtype=torch.float32
    )
    ours = open_family(resolve(str(file), training=False)).parts.transformer.weights
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
        assert torch.equal(tensor, ours[name].read().float()), name


def test_the_same_model_gives_the_same_bytes_and_is_not_written_twice(
    tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        assert sdlab("convert", "--model-path", tiny_sd_folder, "--half", "--checkpoint-path", file) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    at = files[0].stat().st_mtime_ns
    capsys.readouterr()
    command = ("convert", "--model-path", tiny_sd_folder, "--half", "--checkpoint-path", files[0], "--json")
    assert sdlab(*command) == 0
    said = capsys.readouterr()
    assert "already" in said.err
    assert files[0].stat().st_mtime_ns == at
    assert json.loads(said.out)["sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    files[0].unlink()
    assert sdlab(*command) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(said.out)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "differs from it in tensor"),
        (lambda data: data + b"\0", "is there already"),
        (lambda data: data[:-1], "is there already"),
    ],
)
def test_a_damaged_file_is_not_taken_for_one_made_already(
    spoil: Callable[[bytes], bytes],
    words: str,
    tiny_sd_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "x.safetensors"
    command = ("convert", "--model-path", tiny_sd_folder, "--half", "--checkpoint-path", file)
    assert sdlab(*command) == 0
    file.write_bytes(spoil(file.read_bytes()))
    spoiled = file.read_bytes()
    assert sdlab(*command) == 2
    assert words in capsys.readouterr().err and file.read_bytes() == spoiled


def test_a_model_that_changed_since_is_not_taken_for_the_one_in_the_file(
    broken: Path, tmp_path: Path
) -> None:
    command = ("convert", "--model-path", broken, "--checkpoint-path", tmp_path / "x.safetensors")
    assert sdlab(*command) == 0
    edit_tensors(
        broken / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors["conv_in.bias"].add_(1),
    )
    assert sdlab(*command) == 2


@pytest.mark.parametrize(
    ("flags", "prefixes"),
    [
        (("--no-vae",), {"model.diffusion_model", "cond_stage_model.transformer"}),
        (("--no-text-encoder",), {"model.diffusion_model", "first_stage_model"}),
        (("--no-vae", "--no-text-encoder"), {"model.diffusion_model"}),
    ],
)
def test_parts_are_left_out_where_that_is_asked(
    flags: tuple[str, ...], prefixes: set[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", file, *flags) == 0
    assert all(name.startswith(tuple(prefixes)) for name in read_header(file).tensors)
    assert all(any(name.startswith(p) for name in read_header(file).tensors) for p in prefixes)


def test_a_model_that_lacks_a_tensor_is_refused(broken: Path, tmp_path: Path) -> None:
    edit_tensors(broken / "vae" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias"))
    file = tmp_path / "x.safetensors"
    assert sdlab("convert", "--model-path", broken, "--checkpoint-path", file) == 2
    assert not file.exists()


def test_another_file_is_never_replaced(tiny_sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"my own")
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", file) == 2
    assert file.read_bytes() == b"my own"


def test_the_file_lies_beside_the_run_and_says_what_it_is(
    tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_sd_folder, tmp_path / "my-run")
    assert sdlab("convert", "--model-path", folder, "--half", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    header = read_header(tmp_path / "my-run.safetensors")
    assert said["num_tensors"] == len(header.tensors)
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert (tmp_path / "my-run.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_value_that_does_not_fit_is_an_error_and_leaves_nothing(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(
        broken / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors["conv_in.bias"].fill_(1e6),
    )
    before = sorted(tmp_path.iterdir())
    assert sdlab("convert", "--model-path", broken, "--half") == 2
    assert "does not fit F16" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_of_nothing_but_zeros_is_not_passed_on(broken: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        file = broken / part / "diffusion_pytorch_model.safetensors"
        edit_tensors(file, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    before = names_in(tmp_path)
    assert sdlab("convert", "--model-path", broken) == 2
    assert names_in(tmp_path) == before


def test_a_file_that_reads_back_otherwise_is_not_kept(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = stream.again

    def differing(outputs: Iterable[Output]) -> Iterator[Piece]:
        for piece in again(outputs):
            yield replace(piece, data=memoryview(bytes([piece.data[0] ^ 1]) + bytes(piece.data[1:])))

    monkeypatch.setattr(stream, "again", differing)
    assert (
        sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", tmp_path / "x.safetensors") == 2
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_not_replaced(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, pieces = tmp_path / "x.safetensors", stream.pieces

    def late(outputs: Iterable[Output]) -> Iterator[Piece]:
        file.write_bytes(b"my own")
        yield from pieces(outputs)

    monkeypatch.setattr(stream, "pieces", late)
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", file) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == b"my own" and names_in(tmp_path) == ["x.safetensors"]


def test_no_space_is_said_before_anything_is_written(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(stream, "part_beside", None)
    file = tmp_path / "x.safetensors"
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", file) == 4


HOLD_A_PART = """
import pathlib, sys
from sdlab.convert import stream
from sdlab.convert.cast import Piece
with stream.part_beside(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_goes_at_the_next_and_that_of_a_live_one_stays(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    mine = (
        ".x.safetensors.1.part",
        ".x.safetensors.0a1b2c3d.sdlab-part.txt",
        "x.safetensors.0a1b2c3d.sdlab-part",
    )
    for name in mine:
        (tmp_path / name).write_bytes(b"somebody's")
    command = ("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", tmp_path / "x.safetensors")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_PART, str(tmp_path / "x.safetensors")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline().strip() == b"held"
    assert sdlab(*command) == 0
    assert len(names_in(tmp_path)) == len(mine) + 2
    child.kill()
    child.communicate()
    assert sdlab(*command) == 0
    assert names_in(tmp_path) == sorted((*mine, "x.safetensors"))


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert sdlab("convert", "--half", "--dtype", "bf16") == 2
    ckpt = ("convert", "--model-path", "mini-sd", "--checkpoint-path", tmp_path / "x.ckpt")
    assert sdlab(*ckpt, "--use-safetensors") == 2
    assert sdlab("convert", "--model-path", "mini-sd", "--lora-layout", "kohya") == 2
    assert sdlab("convert", "--model-path", "mini-sd", "--rank", "4") == 2
    assert not names_in(tmp_path)


def test_old_underscore_spellings_work(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    old = ("--model_path", "mini-sd", "--checkpoint_path", file, "--half", "--use_safetensors")
    assert sdlab("convert", *old) == 0
    assert file.is_file()


def test_what_a_file_says_of_itself_is_carried_on(tmp_path: Path) -> None:
    first, folder, second = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", first) == 0
    tensors = load_file(first)
    own = {
        "modelspec.author": "me",
        "modelspec.license": "CC0",
        "modelspec.hash_sha256": "0xold",
        "note": "kept",
    }
    save_file(tensors, first, {**read_header(first).metadata, **own})
    assert sdlab("convert", "--model-path", first, "--half", "--checkpoint-path", second) == 0
    said = read_header(second).metadata
    assert (said["modelspec.author"], said["modelspec.license"], said["note"]) == ("me", "CC0", "kept")
    assert "modelspec.hash_sha256" not in said  # it was of other tensors
    assert sdlab("convert", "--model-path", first, "--checkpoint-path", folder) == 0
    unet = read_header(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert unet.metadata["modelspec.author"] == "me"


def test_what_a_file_holds_beside_the_model_is_not_dropped_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", file) == 0
    save_file({**load_file(file), "alphas_cumprod": torch.zeros(1000)}, file)
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", tmp_path / "folder") == 0
    assert "left out, as no part of the model: 1 tensors, the first alphas_cumprod" in capsys.readouterr().out


def test_the_prediction_type_asked_for_is_in_the_result(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    command = ("convert", "--model-path", "mini-sd", "--prediction-type", "v_prediction")
    assert sdlab(*command, "--checkpoint-path", file) == 0
    assert read_header(file).metadata["modelspec.prediction_type"] == "v"
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", folder) == 0
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert open_family(resolve(str(file), training=False)).prediction_type == "v_prediction"


def test_another_vae_is_put_in(tmp_path: Path) -> None:
    vae, file = tmp_path / "vae.safetensors", tmp_path / "a.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--only", "vae", "--checkpoint-path", vae) == 0
    edit_tensors(vae, lambda tensors: tensors["decoder.conv_in.bias"].add_(1))
    assert sdlab("convert", "--model-path", "mini-sd", "--with-vae", vae, "--checkpoint-path", file) == 0
    put_in = load_file(file)["first_stage_model.decoder.conv_in.bias"]
    assert torch.equal(put_in, load_file(vae)["decoder.conv_in.bias"])


def test_a_part_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--no-vae", "--checkpoint-path", file) == 0
    assert sdlab("convert", "--model-path", file) == 2
    assert "--with-vae" in capsys.readouterr().err
    folder = tmp_path / "whole"
    given = ("--with-vae", builtin_folder("mini-sd") / "vae", "--checkpoint-path", folder)
    assert sdlab("convert", "--model-path", file, *given) == 0
    assert (folder / "model_index.json").is_file()


def test_a_part_goes_beside_its_model_and_not_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(builtin_folder("mini-sd"), tmp_path / "cats")
    assert sdlab("convert", "--model-path", model / "vae") == 0
    assert sdlab("convert", "--model-path", model, "--only", "unet") == 0
    monkeypatch.chdir(model)
    assert sdlab("convert", "--model-path", ".") == 0
    assert names_in(tmp_path) == ["cats", "cats-unet.safetensors", "cats-vae.safetensors", "cats.safetensors"]
    assert sdlab("convert", "--checkpoint-path", model / "unet" / "x.safetensors", "--model-path", model) == 2
    assert names_in(model / "unet") == names_in(builtin_folder("mini-sd") / "unet")


def test_an_index_of_shards_is_read_as_its_folder_is(tmp_path: Path) -> None:
    folder = copied(builtin_folder("mini-sd") / "unet", tmp_path / "shards")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = {name: f"part-{at % 2}.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").unlink()
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert sdlab("convert", "--model-path", index, "--checkpoint-path", one) == 0
    assert sdlab("convert", "--model-path", folder, "--checkpoint-path", other) == 0
    assert load_file(one).keys() == load_file(other).keys() and len(load_file(one)) == len(tensors)


def test_one_tensor_made_of_several_types_holds_all_their_numbers(tmp_path: Path) -> None:
    folder = copied(builtin_folder("mini-flux2"), tmp_path / "mixed")
    name = "transformer_blocks.0.attn.to_k.weight"
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    edit_tensors(weights, lambda tensors: tensors.update({name: tensors[name].float() + 1e-4}))
    file, back = tmp_path / "x.safetensors", tmp_path / "back"
    assert sdlab("convert", "--model-path", folder, "--checkpoint-path", file) == 0
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", back) == 0
    again = load_file(back / "diffusion_pytorch_model.safetensors")
    assert torch.equal(again[name], load_file(weights)[name])


def test_a_link_to_nothing_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "nothing")
    file = ("--checkpoint-path", tmp_path / "x.safetensors")
    assert sdlab("convert", "--model-path", "mini-sd", *file) == 2
    assert names_in(tmp_path) == ["x.safetensors"]


def test_header_text_that_no_file_can_hold_is_left_behind(tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", file) == 0
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table["__metadata__"] |= {"bad": "\ud800", "good": "kept"}
    head = json.dumps(table).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])
    assert sdlab("convert", "--model-path", file, "--half", "--checkpoint-path", other) == 0
    assert read_header(other).metadata["good"] == "kept" and "bad" not in read_header(other).metadata


def test_a_closed_stdout_is_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdlab", "convert", "--model-path", "mini-sd", "--checkpoint-path"]
    line = " ".join([*map(str, command), str(tmp_path / "x.safetensors"), ">&-"])
    assert subprocess.run(line, shell=True, stderr=subprocess.PIPE).returncode == 0
    assert names_in(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("option", ["--model-path", "--checkpoint-path"])
def test_a_name_that_is_too_long_is_no_fault_of_ours(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("convert", option, str(tmp_path / ("x" * 300))) == 2
    assert "fault of sdlab" not in capsys.readouterr().err
