"""LoRAs given to `sdlab convert`: other layouts, merged, extracted; a LoRA's run too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlab.models.bases import builtin_folder
from sdlab.models.files import Stored, read_header, write_safetensors
from tests.program import sdlab

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
WEIGHT = f"model.diffusion_model.middle_block.1.{LAYER.removeprefix('mid_block.attentions.0.')}.weight"


def lora_of(tensor: torch.Tensor, path: Path, *, rank: int = 2) -> Path:
    """A LoRA in diffusers' layout on one layer of mini-sd, whose weight is `tensor`."""
    generator = torch.Generator().manual_seed(3)
    halves = {
        f"unet.{LAYER}.lora_A.weight": torch.randn(rank, tensor.shape[1], generator=generator) / 10,
        f"unet.{LAYER}.lora_B.weight": torch.randn(tensor.shape[0], rank, generator=generator) / 10,
    }
    stored = {n: Stored(n, "F32", tuple(t.shape), path, nbytes=t.nbytes, tensor=t) for n, t in halves.items()}
    write_safetensors(path, stored, metadata={"trained.by": "me", "lora_adapter_metadata": "{}"})
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    weights = load_file(builtin_folder("mini-sd") / "unet" / "diffusion_pytorch_model.safetensors")
    return lora_of(weights[f"{LAYER}.weight"], tmp_path / "mine.safetensors")


def test_a_lora_in_kohyas_names_and_back_is_the_same(lora: Path, tmp_path: Path) -> None:
    assert sdlab("convert", "--model-path", lora) == 0
    kohya = tmp_path / "mine-kohya.safetensors"
    assert f"lora_unet_{LAYER.replace('.', '_')}.alpha" in load_file(kohya)
    said = read_header(kohya).metadata
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["trained.by"] == "me"
    assert "lora_adapter_metadata" not in said  # the strength is in the tensors now
    back = tmp_path / "back.safetensors"
    assert (
        sdlab("convert", "--model-path", kohya, "--lora-layout", "diffusers", "--checkpoint-path", back) == 0
    )
    assert load_file(back).keys() == load_file(lora).keys()
    assert all(torch.equal(t, load_file(lora)[n]) for n, t in load_file(back).items())


def test_a_folder_of_pefts_has_its_settings(lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    assert sdlab("convert", "--model-path", lora, "--lora-layout", "peft", "--checkpoint-path", folder) == 0
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert (folder / "adapter_model.safetensors").is_file()


def test_merged_and_extracted_again_is_the_same_product(lora: Path, tmp_path: Path) -> None:
    plain, merged, taken = (tmp_path / f"{n}.safetensors" for n in ("plain", "merged", "taken"))
    fp32 = ("--dtype", "fp32", "--checkpoint-path")
    assert sdlab("convert", "--model-path", "mini-sd", *fp32, plain) == 0
    assert sdlab("convert", "--model-path", "mini-sd", "--lora", f"{lora}:0.5", *fp32, merged) == 0
    halves = load_file(lora)
    product = 0.5 * halves[f"unet.{LAYER}.lora_B.weight"] @ halves[f"unet.{LAYER}.lora_A.weight"]
    before, after = load_file(plain), load_file(merged)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {WEIGHT}
    assert torch.allclose(after[WEIGHT], before[WEIGHT] + product, atol=1e-6)
    assert read_header(merged).metadata["modelspec.merged_from"] == "mini-sd, mine:0.5"
    command = ("convert", "--model-path", merged, "--extract-lora", plain, "--rank", "2")
    assert sdlab(*command, "--lora-layout", "diffusers", "--checkpoint-path", taken) == 0
    found = load_file(taken)
    again = found[f"unet.{LAYER}.lora_B.weight"] @ found[f"unet.{LAYER}.lora_A.weight"]
    assert len(found) == 2 and torch.allclose(again, product, atol=1e-5)


def test_a_loras_run_becomes_its_lora_beside_it(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "tuned" / "cats"
    run.mkdir(parents=True)
    lora.rename(run / "pytorch_lora_weights.safetensors")
    about = {
        "state": "finished",
        "ended": "2026-11-23T10:00:00Z",
        "adapter": {"kind": "lora"},
        "model": {"kind": "builtin", "name": "mini-sd"},
    }
    (run / "run.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    assert sdlab("convert", "--half") == 0
    assert {t.dtype for t in load_file(tmp_path / "tuned" / "cats.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora", "{lora}"), "cannot be merged into one"),
        (("--lora-layout", "bfl"), "FLUX.2"),
        (("--lora-layout", "peft", "--checkpoint-path", "x.safetensors"), "names another thing"),
        (("--extract-lora", "mini-sd"), "is a LoRA already"),
        (("--base", "mini-flux2"), "no "),
        (("--only", "vae"), "--only"),
        (("--no-vae",), "--no-vae"),
    ],
)
def test_what_cannot_be_done_with_a_lora_is_said(
    flags: tuple[str, ...], words: str, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(lora.parent.iterdir())
    given = [flag.format(lora=lora) for flag in flags]
    assert sdlab("convert", "--model-path", lora, *given) == 2
    assert words in capsys.readouterr().err
    assert sorted(lora.parent.iterdir()) == before


def test_equal_models_have_no_lora_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sdlab("convert", "--model-path", "mini-sd", "--extract-lora", "mini-sd") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--base", "mini-sd"), ("--with-vae", "x"), ("--prediction-type", "epsilon"), ("--ema", None)],
)
def test_extraction_passes_over_no_option(option: str, value: str | None, tmp_path: Path) -> None:
    given = [option] if value is None else [option, value]
    file = tmp_path / "x.safetensors"
    command = ("convert", "--model-path", "mini-sd", "--extract-lora", "mini-sd", "--checkpoint-path", file)
    assert sdlab(*command, *given) == 2


def test_a_pickled_base_is_read_where_that_is_allowed(lora: Path, tmp_path: Path) -> None:
    base, file = tmp_path / "base.ckpt", tmp_path / "x.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", base) == 0
    command = ("convert", "--model-path", lora, "--base", base, "--checkpoint-path", file)
    assert sdlab(*command) == 2
    assert sdlab(*command, "--allow-pickle") == 0


@pytest.mark.parametrize("alpha", ["1" + "0" * 400, "1e400"])
def test_an_absurd_alpha_is_refused(alpha: str, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(lora)
    stored = {
        n: Stored(n, "F32", tuple(t.shape), lora, nbytes=t.nbytes, tensor=t) for n, t in tensors.items()
    }
    lora.unlink()
    write_safetensors(lora, stored, metadata={"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'})
    assert sdlab("convert", "--model-path", lora) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
