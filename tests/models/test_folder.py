"""A model folder that is broken anywhere is refused before a weight is used, in one line that names the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.models.opening import open_family
from sdlab.models.parts import load
from sdlab.models.resolve import resolve
from tests.models.helpers import TEXT, UNET, VAE, copied, edit_json, edit_tensors

CPU = torch.device("cpu")
CONV = "conv_in.weight"


def index(**parts: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **parts)


def config(part: str, **values: object) -> Callable[[Path], None]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit_json(folder / part / name, **values)


def removed(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / file, change)


def pickled(folder: Path) -> None:
    (folder / UNET).unlink()
    torch.save({CONV: torch.ones(1)}, folder / "unet/diffusion_pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (removed("model_index.json"), "no model_index.json"),
    "index is a web page": (written("model_index.json", b"<html>"), "web page"),
    "index of SDXL": (index(_class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline"),
    "index of FLUX.2": (index(_class_name="Flux2KleinKVPipeline"), "a kind of FLUX.2 model which"),
    "index without class": (index(_class_name="-"), "no class"),
    "part of another class": (index(unet=["diffusers", "UNet3DConditionModel"]), "its unet is of a class"),
    "part of own code": (index(unet=["my_code", "Evil"]), "its unet is of a class"),
    "part that climbs out": (
        index(**{"../../x": ["diffusers", "UNet2DConditionModel"]}),
        "unknown part '../../x'",
    ),
    "part with path for a class": (index(vae=["../evil", "AutoencoderKL", "x"]), "its vae is of a class"),
    "part not named": (index(vae=[None, None]), "names no vae"),
    "no vae folder": (removed("vae"), "vae/ is missing"),
    "no unet weights": (removed(UNET), r"no diffusion_pytorch_model\.safetensors"),
    "no text encoder weights": (removed(TEXT), r"no model\.safetensors"),
    "no unet config": (removed("unet/config.json"), r"unet/config\.json: cannot be read"),
    "no scheduler config": (removed("scheduler/scheduler_config.json"), "cannot be read"),
    "no vocabulary": (removed("tokenizer/tokenizer.json"), r"neither vocab\.json"),
    "lfs pointer": (written(UNET, b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "cut file": (
        lambda f: (f / VAE).write_bytes((f / VAE).read_bytes()[:-100]) and None,
        "is cut short: 100 of",
    ),
    "pickle": (pickled, "--allow-pickle"),
    "missing unet tensor": (
        tensors(UNET, lambda t: t.pop(CONV)),
        r"'conv_in\.weight' of the unet is missing",
    ),
    "missing text tensor": (
        tensors(TEXT, lambda t: t.pop(next(k for k in t if k.endswith("final_layer_norm.bias")))),
        r"final_layer_norm\.bias' of the text_encoder is missing",
    ),
    "missing vae tensor": (
        tensors(VAE, lambda t: t.pop("quant_conv.bias")),
        r"'quant_conv\.bias' of the vae",
    ),
    "misshapen tensor": (
        tensors(UNET, lambda t: t.update({CONV: torch.zeros(32, 9, 3, 3)})),
        r"'conv_in\.weight' has the shape \[32, 9, 3, 3\], configured is \[32, 4, 3, 3\]",
    ),
    "tensor too many": (tensors(UNET, lambda t: t.update(extra=torch.zeros(1))), "'extra' has no place"),
    "weights of another part": (
        lambda f: shutil.copy(f / VAE, f / UNET) and None,
        "holds none of the 322 tensors",
    ),
    "whole numbers": (tensors(UNET, lambda t: t.update({CONV: t[CONV].to(torch.int8)})), "stored as I8"),
    "config of another width": (config("unet", cross_attention_dim=64), "configured is"),
    "config with text for a number": (config("unet", cross_attention_dim="wide"), "does not describe"),
    "config of unknown blocks": (config("unet", down_block_types=["Evil"] * 3), "does not describe"),
    "config that takes a year": (config("unet", layers_per_block=1_000_000), "layers_per_block is 1000000"),
    "huge sample size": (config("unet", sample_size=1_000_000_000), "sample_size is 1000000000"),
    "zero heads": (config("text_encoder", num_attention_heads=0), "num_attention_heads is 0"),
    "unknown activation": (config("text_encoder", hidden_act="evil"), "does not describe a CLIPTextModel"),
    "endless list": (config("unet", block_out_channels=[32] * 1000), "has 1000 entries"),
    "betas beyond 1": (config("scheduler", beta_end=1e9), "betas are not between 0 and 1"),
    "text for a beta": (config("scheduler", beta_start="low"), "betas are not between 0 and 1"),
    "no timesteps": (config("scheduler", num_train_timesteps=0), "num_train_timesteps is 0"),
    "unknown prediction": (config("scheduler", prediction_type="flow"), "prediction_type is 'flow'"),
    "unknown schedule": (config("scheduler", beta_schedule="evil"), "unknown beta_schedule 'evil'"),
    "another latent width": (config("vae", latent_channels=16), "configured is"),
    "tokenizer of no words": (written("tokenizer/tokenizer.json", b"{}"), "no vocabulary"),
    "vocabulary is a list": (written("tokenizer/vocab.json", b'{"a": "b"}'), "no vocabulary"),
    "tokenizer of other numbers": (written("tokenizer/vocab.json", b'{"a": 99999}'), "numbers up to 99999"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_before_loading(tiny_sd_folder: Path, tmp_path: Path, name: str) -> None:
    change, said = BROKEN[name]
    folder = copied(tiny_sd_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(SdlabError, match=said) as raised:
        open_family(resolve(str(folder), training=True))
    line = str(raised.value)
    assert line.startswith(str(folder)) and "\n" not in line and len(line) < 400


BAD_VALUES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "nan": (
        UNET,
        lambda t: t[CONV].view(-1)[3].fill_(float("nan")),
        r"'conv_in\.weight' holds values that are not",
    ),
    "infinity": (UNET, lambda t: t[CONV].view(-1)[3].fill_(float("inf")), "not finite"),
    "all zero": (UNET, lambda t: [v.zero_() for v in t.values()], "nothing but zeros"),
    "too large for half": (UNET, lambda t: t[CONV].view(-1)[3].fill_(1e6), "too large for float16"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_weights_that_are_no_numbers_are_refused_naming_the_tensor(
    tiny_sd_folder: Path, tmp_path: Path, name: str
) -> None:
    file, change, said = BAD_VALUES[name]
    folder = copied(tiny_sd_folder, tmp_path / "model")
    edit_tensors(folder / file, change)
    family = open_family(resolve(str(folder), training=True))
    with pytest.raises(SdlabError, match=said) as raised:
        family.load_denoiser(CPU, torch.float16)
    assert "\n" not in str(raised.value)


def test_large_values_that_fit_are_not_taken_for_infinite(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Their sum overflows float32, which the quick test alone would take for infinity."""
    folder = copied(tiny_sd_folder, tmp_path / "model")
    edit_tensors(folder / UNET, lambda t: t[CONV].fill_(3e38))
    family = open_family(resolve(str(folder), training=True))
    assert family.load_denoiser(CPU, torch.float32).conv_in.weight.isfinite().all()


def test_text_encoders_load_with_and_without_the_prefix(tiny_sd_folder: Path, tmp_path: Path) -> None:
    def prefixed(table: dict[str, torch.Tensor]) -> None:
        plain = {name.removeprefix("text_model."): table.pop(name) for name in list(table)}
        table.update({f"text_model.{name}": tensor for name, tensor in plain.items()})
        table["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    folder = copied(tiny_sd_folder, tmp_path / "model")
    edit_tensors(folder / TEXT, prefixed)
    one, two = (open_family(resolve(str(f), training=True)) for f in (tiny_sd_folder, folder))
    assert one.fingerprint == two.fingerprint
    a, b = (load(f.parts.text_encoder, CPU, torch.float32).state_dict() for f in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_vae_with_the_attention_names_of_sd15_loads(tiny_sd_folder: Path, tmp_path: Path) -> None:
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(table: dict[str, torch.Tensor]) -> None:
        for name in list(table):
            for new, was in new_to_old.items():
                if f".{new}." in name:
                    table[name.replace(f".{new}.", f".{was}.")] = table.pop(name)

    folder = copied(tiny_sd_folder, tmp_path / "model")
    edit_tensors(folder / VAE, old)
    family = open_family(resolve(str(folder), training=True))
    assert family.fingerprint == open_family(resolve(str(tiny_sd_folder), training=True)).fingerprint


def test_shards_and_fp16_names_load(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_sd_folder, tmp_path / "model")
    table = load_file(folder / UNET)
    names = sorted(table)
    places = {n: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: table[n] for n in names if places[n] == shard}, folder / "unet" / shard)
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / VAE).rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    family = open_family(resolve(str(folder), training=True))
    loaded = family.load_denoiser(CPU, torch.float32).state_dict()
    assert all(torch.equal(loaded[n], table[n]) for n in names)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({CONV: "../../secret.safetensors"}, "not shards beside it"),
        ({CONV: "no.safetensors"}, "cannot be read"),
        ([], "no weight_map"),
    ],
)
def test_a_bad_index_of_shards_is_refused(
    tiny_sd_folder: Path, tmp_path: Path, places: object, said: str
) -> None:
    folder = copied(tiny_sd_folder, tmp_path / "model")
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(SdlabError, match=said):
        open_family(resolve(str(folder), training=True))


def test_pickled_weights_load_only_when_allowed(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = copied(tiny_sd_folder, tmp_path / "model")
    table = load_file(folder / UNET)
    torch.save(table, folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET).unlink()
    model = resolve(str(folder), training=True)
    with pytest.raises(SdlabError, match="--allow-pickle"):
        open_family(model)
    loaded = open_family(model, allow_pickle=True).load_denoiser(CPU, torch.float32).state_dict()
    assert all(torch.equal(loaded[n], table[n]) for n in table)
