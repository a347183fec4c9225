"""FLUX.2 from single files: the same tensors as from a folder, sizes told apart, everything else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file

from sdlab.errors import SdlabError
from sdlab.models import bases, bfl
from sdlab.models import resolve as resolve_module
from sdlab.models.files import Header, Stored, read_header
from sdlab.models.flux2_file import read_transformer_file
from sdlab.models.flux2_folder import read_flux2_folder
from sdlab.models.opening import open_family, prompt_window, recommended
from sdlab.models.parts import build_module, load
from sdlab.models.resolve import resolve
from sdlab.models.sniff import flux2_shape, known_flux2_by_shape, recognise, states_distilled
from sdlab.models.vae_file import read_vae_file
from tests.models.helpers import TEXT, VAE, bfl_file, bfl_vae_file, copied, edit_tensors

CPU, F32 = torch.device("cpu"), torch.float32
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
REAL: dict[str, dict[str, Any]] = {
    "flux2-klein-base-4b": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "flux2-klein-base-9b": {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
    "flux2-dev": {},
}  # fmt: skip


def same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


def header_of(base: str, *, original: bool, prefix: str = "", dtype: str = "BF16") -> Header:
    """The header of a file with all tensors of a released transformer."""
    module = build_module("Flux2Transformer2DModel", REAL[base], Path("config.json"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in module.state_dict().items():
        if not original:
            shapes[name] = tuple(tensor.shape)
            continue
        place = bfl.place_of(name)
        rows = tensor.shape[0] * (3 if place.third is not None else 1)
        shapes[place.name] = (rows, *tensor.shape[1:])
    path = Path("flux.safetensors")
    return Header(path, {prefix + n: Stored(prefix + n, dtype, s, path) for n, s in shapes.items()}, {})


@pytest.mark.parametrize("base", REAL)
@pytest.mark.parametrize(("original", "prefix"), [(True, ""), (True, "model.diffusion_model."), (False, "")])
def test_klein_and_dev_are_told_apart_by_their_shapes(base: str, original: bool, prefix: str) -> None:
    header = header_of(base, original=original, prefix=prefix)
    assert recognise(header) == "flux2"
    assert known_flux2_by_shape(header) == base
    assert flux2_shape(header) == bases.FLUX2_SHAPES[base]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_files_are_refused_in_one_line(dtype: str) -> None:
    header = header_of("flux2-klein-base-4b", original=True, dtype=dtype)
    header.tensors["double_blocks.0.img_attn.qkv.weight_scale"] = Stored("s", "F32", (), header.path)
    with pytest.raises(SdlabError, match="quantised") as raised:
        recognise(header)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["klein", "dev"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_gives_the_folders_transformer(
    tiny_klein_folder: Path, tiny_dev_folder: Path, tmp_path: Path, kind: str, prefix: str
) -> None:
    """Checked against diffusers' own conversion of the same file too."""
    folder = {"klein": tiny_klein_folder, "dev": tiny_dev_folder}[kind]
    path = bfl_file(folder, tmp_path / "flux.safetensors", prefix=prefix)
    wanted = load_file(folder / TRANSFORMER)
    plain = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    assert same(convert_flux2_transformer_checkpoint_to_diffusers(plain), wanted)
    part, distilled = read_transformer_file(path, read_flux2_folder(folder).transformer.config)
    assert distilled is None and same(load(part, CPU, F32).state_dict(), wanted)
    assert part.where == path
    for name, stored in part.weights.items():
        assert b"".join(stored.pieces()) == wanted[name].numpy().tobytes(), name


def test_a_file_in_diffusers_naming_works_as_well(tiny_klein_folder: Path) -> None:
    config = read_flux2_folder(tiny_klein_folder).transformer.config
    part, _ = read_transformer_file(tiny_klein_folder / TRANSFORMER, config)
    assert same(load(part, CPU, F32).state_dict(), load_file(tiny_klein_folder / TRANSFORMER))


@pytest.mark.parametrize(
    ("metadata", "stated"),
    [
        ({"modelspec.architecture": "flux-2-klein-base-4b"}, False),
        ({"modelspec.architecture": "flux-2-klein-9b"}, True),
        ({"modelspec.architecture": "flux-2-klein"}, None),
        ({"modelspec.architecture": "Flux.2-klein-4b"}, None),
        ({"modelspec.title": "my-base-mix", "modelspec.description": "klein, distilled from baseball"}, None),
        ({}, None),
    ],
)
def test_distilled_is_what_the_file_says(metadata: dict[str, str], stated: bool | None) -> None:
    assert states_distilled(Header(Path("x"), {}, metadata)) is stated


def test_a_vae_file_gives_the_folders_vae(tiny_klein_folder: Path, tmp_path: Path) -> None:
    base = read_flux2_folder(tiny_klein_folder).vae
    wanted = load_file(tiny_klein_folder / VAE)
    path = bfl_vae_file(tiny_klein_folder, tmp_path / "ae.safetensors")
    assert same(load(read_vae_file(path, base), CPU, F32).state_dict(), wanted)
    plain = {
        n.replace("encoder.quant", "quant").replace("decoder.post", "post"): t
        for n, t in load_file(path).items()
    }
    theirs = convert_ldm_vae_checkpoint(plain, base.config)
    assert theirs and all(torch.equal(tensor, wanted[name]) for name, tensor in theirs.items())
    assert len(theirs) == len(wanted) - 3  # diffusers' conversion knows nothing of the batch norm
    own = read_vae_file(tiny_klein_folder / VAE, base)
    assert same(load(own, CPU, F32).state_dict(), wanted)


def test_swapped_parts_are_used(tiny_flux2: Any, tmp_path: Path) -> None:
    base, other = tiny_flux2("base"), tiny_flux2("other", seed=1)
    single = bfl_file(other, tmp_path / "t.safetensors", prefix="model.diffusion_model.")
    vae = bfl_vae_file(other, tmp_path / "v.safetensors")
    model = resolve(str(base), training=True)
    wanted, wanted_vae = load_file(other / TRANSFORMER), load_file(other / VAE)
    for unet in (str(single), str(other / TRANSFORMER), str(other / "transformer"), str(other)):
        family: Any = open_family(model, unet=unet)
        assert same(family.load_denoiser(CPU, F32).state_dict(), wanted), unet
    for asked in (str(vae), str(other / VAE), str(other / "vae"), str(other)):
        family = open_family(model, vae=asked)
        assert same(load(family.parts.vae, CPU, F32).state_dict(), wanted_vae), asked
        assert family.fingerprint != open_family(model).fingerprint
    assert not same(family.load_denoiser(CPU, F32).state_dict(), wanted)


def test_the_vae_of_stable_diffusion_swaps_as_well(tiny_sd: Any, tmp_path: Path) -> None:
    base, other = tiny_sd("base"), tiny_sd("other", seed=1)
    wanted = load_file(other / VAE)
    for asked in (str(other / VAE), str(other / "vae"), str(other)):
        family: Any = open_family(resolve(str(base), training=True), vae=asked)
        assert same(load(family.parts.vae, CPU, F32).state_dict(), wanted), asked


def test_parts_of_other_models_are_refused_in_one_line(
    tiny_klein_folder: Path, tiny_dev_folder: Path, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    klein, sd = resolve(str(tiny_klein_folder), training=True), resolve(str(tiny_sd_folder), training=True)
    single = bfl_file(tiny_klein_folder, tmp_path / "t.safetensors")
    short = tmp_path / "short.safetensors"
    save_file({n: t for n, t in load_file(single).items() if "double_blocks.1" not in n}, short)
    torn = tmp_path / "torn.safetensors"
    save_file({n: t for n, t in load_file(single).items() if n != "txt_in.weight"}, torn)
    more = tmp_path / "more.safetensors"
    save_file({**load_file(single), "double_blocks.0.img_attn.extra": torch.zeros(1)}, more)
    cases: list[tuple[Any, dict[str, str], str]] = [
        (
            klein,
            {"unet": str(tiny_sd_folder / "unet/diffusion_pytorch_model.safetensors")},
            "no FLUX.2 transformer",
        ),
        (klein, {"unet": str(tiny_sd_folder)}, "is no FLUX.2 model"),
        (klein, {"unet": str(tiny_klein_folder / TEXT)}, "no model that sdlab knows"),
        (klein, {"unet": str(short)}, "1\\+2 blocks"),
        (klein, {"unet": str(torn)}, "0-wide prompts"),
        (klein, {"unet": str(more)}, "has no place in the transformer"),
        (klein, {"unet": str(bfl_file(tiny_dev_folder, tmp_path / "d.safetensors"))}, "has no place"),
        (klein, {"vae": str(tiny_sd_folder / VAE)}, "tensor|VAE"),
        (klein, {"vae": str(tiny_sd_folder / "vae")}, "class is AutoencoderKL, not AutoencoderKLFlux2"),
        (klein, {"vae": str(single)}, "holds no VAE"),
        (sd, {"unet": str(single)}, "is a FLUX.2 transformer, no UNet"),
        (sd, {"unet": str(tiny_klein_folder)}, "is no Stable Diffusion model"),
        (sd, {"vae": str(tiny_klein_folder)}, "is no Stable Diffusion model"),
    ]
    for model, swap, said in cases:
        with pytest.raises(SdlabError, match=said) as raised:
            open_family(model, **swap)
        assert "\n" not in str(raised.value), swap


@pytest.fixture
def mini(tiny_klein_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny model stands in for the built-in one, without a card and with an empty hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bases, "builtin_folder", lambda name: tiny_klein_folder)
    monkeypatch.setattr(resolve_module, "builtin_folder", lambda name: tiny_klein_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tiny_klein_folder


def test_a_transformer_alone_takes_the_rest_from_the_model_of_its_size(mini: Path, tmp_path: Path) -> None:
    path = bfl_file(mini, tmp_path / "my flux.safetensors", prefix="model.diffusion_model.")
    edit_tensors(path, lambda t: t["model.diffusion_model.img_in.weight"].mul_(2))
    model = resolve("my flux.safetensors", training=True)
    assert (model.kind, model.family, model.base, model.name) == ("file", "flux2", "mini-flux2", "my-flux")
    assert model.rest == mini and "the transformer of mini-flux2" in model.why
    family: Any = open_family(model)
    mine = family.load_denoiser(CPU, F32).state_dict()
    wanted = load_file(mini / TRANSFORMER)
    assert torch.equal(mine["x_embedder.weight"], 2 * wanted["x_embedder.weight"])
    assert torch.equal(mine["proj_out.weight"], wanted["proj_out.weight"])
    assert recommended(model).image_size == 128 and prompt_window(model).window == 48


def test_offline_the_ways_to_the_other_parts_are_named(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bfl_file(mini, Path("klein.safetensors"))
    shape = flux2_shape(read_header(path))
    monkeypatch.setattr("sdlab.models.sniff.known_flux2", lambda: {"flux2-klein-base-4b": shape})
    with pytest.raises(SdlabError) as raised:
        resolve(str(path), training=True)
    line = str(raised.value)
    assert "--load-model FOLDER --unet klein.safetensors" in line and "\n" not in line
    assert "black-forest-labs/FLUX.2-klein-base-4B" in line and "HF_HUB_OFFLINE" in line


def test_a_distilled_file_takes_and_keeps_the_distilled_models_settings(
    mini: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = bfl_file(mini, Path("klein.safetensors"), metadata={"modelspec.architecture": "flux-2-klein-4b"})
    plain = bfl_file(mini, Path("unsaid.safetensors"))
    shape = flux2_shape(read_header(path))
    monkeypatch.setattr("sdlab.models.sniff.known_flux2", lambda: {"flux2-klein-base-4b": shape})
    for name in ("klein-4B", "klein-base-4B"):
        root = tmp_path / f"hub/models--black-forest-labs--FLUX.2-{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs/main").write_text("abc123")
        copied(mini, root / "snapshots/abc123")
        (root / "snapshots/abc123" / TRANSFORMER).unlink()  # all else is enough
    model = resolve(str(path), training=True)
    assert model.base == "flux2-klein-4b" and model.rest is not None and "FLUX.2-klein-4B" in str(model.rest)
    family: Any = open_family(model)
    assert family.parts.is_distilled
    assert (recommended(model).steps, recommended(model).guidance) == (4, 1.0)
    base = resolve(str(plain), training=True)
    assert base.base == "flux2-klein-base-4b" and "does not say" in base.why
    family = open_family(base)
    assert not family.parts.is_distilled and recommended(base).guidance == 4.0
