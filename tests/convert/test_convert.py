"""A model as one file: every tensor as it was, under the names that other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, StableDiffusionPipeline

from sdlab.convert import stream
from sdlab.models.bases import builtin_folder
from sdlab.models.files import read_header
from sdlab.models.resolve import open_family, resolve
from tests.program import sdlab


def states(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of the three networks."""
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}


def test_diffusers_reads_the_file_with_every_bit_of_the_folder(
    tiny_sd: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_sd()
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
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--half", "--checkpoint-path", files[0]) == 0
    assert "already" in capsys.readouterr().err
    assert files[0].stat().st_mtime_ns == at


def test_another_file_is_never_replaced(tiny_sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"my own")
    assert sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", file) == 2
    assert file.read_bytes() == b"my own"


def test_the_file_lies_beside_the_run_and_says_what_it_is(
    tiny_sd: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_sd("my-run")
    assert sdlab("convert", "--model-path", folder, "--half", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    header = read_header(tmp_path / "my-run.safetensors")
    assert said["num_tensors"] == len(header.tensors)
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert (tmp_path / "my-run.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_value_that_does_not_fit_is_an_error_and_leaves_nothing(
    tiny_sd: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_sd()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.bias"][0] = 1e6
    save_file(state, weights, metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    assert sdlab("convert", "--model-path", folder, "--half") == 2
    assert "does not fit F16" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_reads_back_otherwise_is_not_kept(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast, calls = stream._cast, []

    def differing(output):  # type: ignore[no-untyped-def]
        calls.append(output.name)
        flipped = len(calls) > 100
        yield from (bytes([piece[0] ^ flipped]) + piece[1:] for piece in cast(output))

    monkeypatch.setattr(stream, "_cast", differing)
    assert (
        sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", tmp_path / "x.safetensors") == 2
    )
    assert not list(tmp_path.iterdir())


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert sdlab("convert", "--half", "--dtype", "bf16") == 2
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", tmp_path / "x.ckpt") == 2
