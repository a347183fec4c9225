"""What training saves: a whole pipeline folder that other tools open, with the frozen parts as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlab.models.export import save_pipeline
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve
from tests.models.helpers import TEXT, UNET, VAE, bfl_file, bfl_vae_file, copied, single_file

CPU, F32 = torch.device("cpu"), torch.float32


def family_of(folder: Path) -> Any:
    return open_family(resolve(str(folder), training=True))


def trained(family: Any) -> torch.nn.Module:
    """The UNet, changed a little."""
    unet = family.load_denoiser(CPU, F32)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    return unet


def pictures(pipeline: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    return pipeline("red star", generator=torch.Generator().manual_seed(1), **settings).images


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_saved_pipeline_is_the_trained_one_for_us_and_for_diffusers(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    family = family_of(tiny_sd_folder)
    unet = trained(family)
    save_pipeline(family, unet, tmp_path / "out")
    saved = family_of(tmp_path / "out")
    ours = pictures(family.pipeline(unet))
    assert torch.equal(pictures(saved.pipeline(saved.load_denoiser(CPU, F32))), ours)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=F32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert torch.allclose(pictures(theirs), ours, atol=1e-5)
    assert saved.fingerprint == family.fingerprint


def test_frozen_parts_keep_their_bytes(tiny_sd_folder: Path, tmp_path: Path) -> None:
    family = family_of(tiny_sd_folder)
    save_pipeline(family, trained(family), tmp_path / "out")
    same = [VAE, "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"]
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (tiny_sd_folder / name).read_bytes(), name
    before, after = load_file(tiny_sd_folder / TEXT), load_file(tmp_path / "out" / TEXT)
    assert after.keys() == {f"text_model.{n.removeprefix('text_model.')}" for n in before}
    assert all(
        torch.equal(after[f"text_model.{n.removeprefix('text_model.')}"], t) for n, t in before.items()
    )


def test_saving_twice_changes_no_byte(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """A run that starts from a run keeps the same frozen files: the text encoder is then copied whole."""
    family = family_of(tiny_sd_folder)
    unet = trained(family)
    save_pipeline(family, unet, tmp_path / "one")
    save_pipeline(family_of(tmp_path / "one"), unet, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_older_tools_find_vocab_and_merges(tiny_sd_folder: Path, tmp_path: Path) -> None:
    family = family_of(tiny_sd_folder)
    save_pipeline(family, trained(family), tmp_path / "out")
    whole = json.loads((tiny_sd_folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((tmp_path / "out/tokenizer/vocab.json").read_text(encoding="utf-8")) == whole["vocab"]
    assert (tmp_path / "out/tokenizer/merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_modes_of_the_umask(tiny_sd_folder: Path, tmp_path: Path) -> None:
    family = family_of(tiny_sd_folder)
    old = os.umask(0o027)
    try:
        save_pipeline(family, trained(family), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {oct(0o640)}


def test_a_single_file_base_is_saved_as_a_whole_folder(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlab.models import sniff

    monkeypatch.setattr(sniff, "known_configs", lambda: {"tiny": tiny_sd_folder})
    family = family_of(single_file(tiny_sd_folder, tmp_path / "m.safetensors", text_prefix=False))
    save_pipeline(family, trained(family), tmp_path / "out")
    assert family_of(tmp_path / "out").fingerprint == family_of(tiny_sd_folder).fingerprint
    assert load_file(tmp_path / "out" / VAE).keys() == load_file(tiny_sd_folder / VAE).keys()


def test_another_unet_and_its_schedule_are_saved(tiny_sd: Any, tmp_path: Path) -> None:
    base, other = tiny_sd("base"), tiny_sd("other", seed=1, prediction_type="v_prediction")
    family = open_family(resolve(str(base), training=True), unet=str(other))
    save_pipeline(family, family.load_denoiser(CPU, F32), tmp_path / "out")
    assert family_of(tmp_path / "out").prediction_type == "v_prediction"
    wanted, saved = load_file(other / UNET), load_file(tmp_path / "out" / UNET)
    assert all(torch.equal(saved[n], wanted[n]) for n in wanted)


def test_nothing_saved_tells_where_the_model_lay(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_sd_folder, tmp_path / "model")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "_name_or_path": "/home/anna/unet"}))
    family = family_of(folder)
    save_pipeline(family, trained(family), tmp_path / "out")
    for name in files(tmp_path / "out"):
        assert b"anna" not in (tmp_path / "out" / name).read_bytes(), name


def with_safety_checker(folder: Path) -> Path:
    """Add a tiny safety checker to a model folder, as SD 1.5 has one."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "feature_extractor"
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps({**index, "requires_safety_checker": True}))
    return folder


def test_the_safety_checker_of_the_base_stays(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = with_safety_checker(copied(tiny_sd_folder, tmp_path / "model"))
    family = family_of(folder)
    save_pipeline(family, trained(family), tmp_path / "out")
    saved = family_of(tmp_path / "out")
    pipeline = saved.pipeline(saved.load_denoiser(CPU, F32))
    result = pipeline("a", num_inference_steps=1, height=64, width=64)
    assert pipeline.safety_checker is not None and len(result.nsfw_content_detected) == 1
    name = "safety_checker/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_a_saved_flux2_is_the_trained_one_for_us_and_for_diffusers(
    tiny_klein_folder: Path, tiny_dev_folder: Path, tmp_path: Path, kind: str
) -> None:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    source, theirs = {
        "klein": (tiny_klein_folder, Flux2KleinPipeline),
        "dev": (tiny_dev_folder, Flux2Pipeline),
    }[kind]
    family = family_of(source)
    transformer = trained(family)
    save_pipeline(family, transformer, tmp_path / "out")
    saved = family_of(tmp_path / "out")
    assert saved.fingerprint == family.fingerprint
    state = transformer.state_dict()
    opened = theirs.from_pretrained(tmp_path / "out", dtype=F32, local_files_only=True)
    for module in (saved.load_denoiser(CPU, F32), opened.transformer):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert opened.text_encoder.config.get_text_config().num_hidden_layers == (29 if kind == "klein" else 32)
    for part in ("vae", "text_encoder", "tokenizer"):
        names = files(source / part)
        assert names and files(tmp_path / "out" / part) == names
        for name in names:
            assert (tmp_path / "out" / part / name).read_bytes() == (source / part / name).read_bytes(), name
    for first, second in ((source, tmp_path / "out"),):
        old, new = (json.loads((f / "model_index.json").read_text(encoding="utf-8")) for f in (first, second))
        assert new == {name: value for name, value in old.items() if name != "_diffusers_version"}


def test_flux2_is_saved_in_the_type_it_has_and_shards_as_they_were(
    tiny_klein_folder: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_klein_folder, tmp_path / "sharded")
    whole = load_file(folder / TEXT)
    names = sorted(whole)
    (folder / TEXT).unlink()
    places = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, folder / "text_encoder" / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    family = family_of(folder)
    save_pipeline(family, family.load_denoiser(CPU, torch.bfloat16), tmp_path / "out")
    assert files(tmp_path / "out/text_encoder") == files(folder / "text_encoder")
    stored = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert family_of(tmp_path / "out").fingerprint == family.fingerprint


def test_a_swapped_vae_and_a_single_files_transformer_are_saved(tiny_flux2: Any, tmp_path: Path) -> None:
    base, other = tiny_flux2("base"), tiny_flux2("other", seed=1)
    vae = bfl_vae_file(other, tmp_path / "vae.safetensors")
    unet = bfl_file(
        other, tmp_path / "unet.safetensors", metadata={"modelspec.architecture": "flux-2-klein-4b"}
    )
    model = resolve(str(base), training=True)
    for asked in (str(vae), str(other)):
        family: Any = open_family(model, unet=str(unet), vae=asked)
        save_pipeline(family, family.load_denoiser(CPU, F32), tmp_path / f"out-{Path(asked).stem}")
        saved = family_of(tmp_path / f"out-{Path(asked).stem}")
        assert saved.parts.is_distilled
        wanted, found = load_file(other / VAE), load_file(tmp_path / f"out-{Path(asked).stem}" / VAE)
        assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
        weights = load_file(other / "transformer/diffusion_pytorch_model.safetensors")
        saved_state = saved.load_denoiser(CPU, F32).state_dict()
        assert all(torch.equal(saved_state[n], weights[n]) for n in weights)
