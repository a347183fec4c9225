"""A single file of Stable Diffusion 1.x loads offline, equals the folder it came from, or says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlab.errors import SdlabError
from sdlab.models import bases, ldm, sniff
from sdlab.models.opening import open_family
from sdlab.models.parts import build_module, expected, load
from sdlab.models.resolve import resolve
from tests.models.helpers import UNET, edit_json, edit_tensors, single_file

CPU, F32 = torch.device("cpu"), torch.float32
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@pytest.fixture(autouse=True)
def tiny_is_known(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's shape counts among those we know, as mini-sd's does."""
    known = {"sd15": bases.CONFIGS / "sd15", "tiny": tiny_sd_folder}
    monkeypatch.setattr(sniff, "known_configs", lambda: known)


@pytest.mark.parametrize("text_prefix", [True, False])
def test_a_single_file_equals_its_folder(tiny_sd_folder: Path, tmp_path: Path, text_prefix: bool) -> None:
    path = single_file(tiny_sd_folder, tmp_path / "my model.safetensors", text_prefix=text_prefix)
    model = resolve(str(path), training=False)
    assert (model.name, model.kind, model.base, model.path) == ("my-model", "file", "tiny", path)
    one, two = open_family(model), open_family(resolve(str(tiny_sd_folder), training=False))
    assert one.fingerprint == two.fingerprint
    for part in CLASSES:
        a, b = (load(getattr(f.parts, part), CPU, F32).state_dict() for f in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    pipeline = one.pipeline(one.load_denoiser(CPU, F32))
    assert pipeline("red star", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_diffusers_reads_our_names_as_the_same_model(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """An independent reader of the layout: a wrong entry in models/ldm.py would show here."""
    from diffusers import StableDiffusionPipeline

    path = single_file(tiny_sd_folder, tmp_path / "model.safetensors")
    theirs = StableDiffusionPipeline.from_single_file(path, config=str(tiny_sd_folder), dtype=F32)
    assert all(
        torch.equal(t, load_file(tiny_sd_folder / UNET)[n]) for n, t in theirs.unet.state_dict().items()
    )
    vae = load_file(tiny_sd_folder / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, vae[n]) for n, t in theirs.vae.state_dict().items())


def test_the_names_of_the_real_sd15_are_those_diffusers_converts() -> None:
    """All 1,130 names of the full-size model, on the meta device."""
    from diffusers.loaders import single_file_utils as theirs

    total = 0
    converters: dict[str, Any] = {
        "unet": theirs.convert_ldm_unet_checkpoint,
        "vae": theirs.convert_ldm_vae_checkpoint,
        "text_encoder": theirs.convert_ldm_clip_checkpoint,
    }
    for part, class_name in CLASSES.items():
        folder = bases.CONFIGS / "sd15" / part
        config = json.loads((folder / "config.json").read_text())
        wanted = expected(build_module(class_name, config, folder))
        file = {ldm.place_of(part, n, config).name: torch.empty(s, device="meta") for n, s in wanted.items()}
        assert len(file) == len(wanted)
        total += len(file)
        back = converters[part](file, config) if part != "text_encoder" else converters[part](file)
        assert {n.removeprefix("text_model.") for n in back} == set(wanted)
    assert total == 1130


def test_the_shipped_tokenizer_is_clips() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bases.CONFIGS / "sd15" / "tokenizer", local_files_only=True)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, 77, 49407)


@pytest.mark.parametrize(
    ("word", "prediction"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("nonsense", "epsilon")]
)
def test_the_prediction_type_a_file_states_is_used(
    tiny_sd_folder: Path, tmp_path: Path, word: str, prediction: str
) -> None:
    path = single_file(
        tiny_sd_folder, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": word}
    )
    assert open_family(resolve(str(path), training=True)).prediction_type == prediction


def test_a_ckpt_loads_only_when_allowed(tiny_sd_folder: Path, tmp_path: Path) -> None:
    path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    ckpt = tmp_path / "m.ckpt"
    torch.save({"state_dict": load_file(path), "global_step": 7}, ckpt)
    with pytest.raises(SdlabError, match="--allow-pickle"):
        resolve(str(ckpt), training=True)
    family = open_family(resolve(str(ckpt), training=True, allow_pickle=True), allow_pickle=True)
    assert family.fingerprint == open_family(resolve(str(path), training=True)).fingerprint
    assert family.load_denoiser(CPU, F32).training is False


DAMAGE: dict[str, tuple[Any, str]] = {
    "no vae": (lambda t: [t.pop(n) for n in list(t) if n.startswith(ldm.VAE)], "holds no VAE.*--vae"),
    "no text encoder": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(ldm.CLIP)],
        "holds no text encoder",
    ),
    "unet alone": (lambda t: [t.pop(n) for n in list(t) if not n.startswith(ldm.UNET)], "UNet alone.*--unet"),
    "a reduced unet": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(ldm.UNET + "middle_block.1.")],
        "a reduced UNet",
    ),
    "one unet tensor gone": (
        lambda t: t.pop(ldm.UNET + "middle_block.1.norm.weight"),
        r"'mid_block\.attentions\.0\.norm\.weight' of the unet is missing",
    ),
    "one text tensor gone": (
        lambda t: t.pop(ldm.CLIP + "text_model.final_layer_norm.bias"),
        r"'final_layer_norm\.bias' of the text_encoder is missing",
    ),
    "one more block": (
        lambda t: t.update({ldm.UNET + "output_blocks.99.0.in_layers.0.weight": torch.zeros(1)}),
        r"output_blocks\.99.*has no place in the unet",
    ),
    "one more text layer": (
        lambda t: t.update({ldm.CLIP + "text_model.encoder.layers.9.mlp.fc1.bias": torch.zeros(1)}),
        "has no place in the text_encoder",
    ),
    "inpainting": (
        lambda t: t.update({ldm.UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}),
        "inpainting model",
    ),
    "another width": (
        lambda t: t.update({ldm.UNET + "input_blocks.0.0.weight": torch.zeros(64, 4, 3, 3)}),
        "64 channels wide",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_single_file_is_refused_in_one_line(
    tiny_sd_folder: Path, tmp_path: Path, name: str
) -> None:
    change, said = DAMAGE[name]
    path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    edit_tensors(path, change)
    with pytest.raises(SdlabError, match=said) as raised:
        open_family(resolve(str(path), training=True))
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_things_other_tools_leave_in_single_files_are_passed_over(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    extras = ["alphas_cumprod", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight"]
    extras += [ldm.CLIP + "text_projection.weight", ldm.CLIP + "logit_scale", ldm.VAE + "loss.logvar"]
    edit_tensors(
        path,
        lambda t: t.update(
            {n: torch.zeros(3) for n in extras},
            **{ldm.CLIP + "text_model.embeddings.position_ids": torch.arange(77)[None]},
        ),
    )
    assert open_family(resolve(str(path), training=True)).grid == 8


@pytest.mark.parametrize("prefix", [ldm.UNET, "diffusion_model.", "unet.", ""])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_unet_from_a_file_in_every_naming(
    tiny_sd_folder: Path, tmp_path: Path, prefix: str, naming: str
) -> None:
    config = json.loads((tiny_sd_folder / "unet/config.json").read_text())
    table = {n: t + 1 for n, t in load_file(tiny_sd_folder / UNET).items()}
    name = (lambda n: ldm.unet_name(n, config)) if naming == "ldm" else (lambda n: n)
    save_file({prefix + name(n): t for n, t in table.items()}, tmp_path / "unet.safetensors")
    model = resolve(str(tiny_sd_folder), training=True)
    family = open_family(model, unet=str(tmp_path / "unet.safetensors"))
    loaded = family.load_denoiser(CPU, F32).state_dict()
    assert all(torch.equal(loaded[n], table[n]) for n in table)
    assert family.fingerprint == open_family(model).fingerprint


def test_unet_from_a_checkpoint_a_folder_and_a_unet_folder(tiny_sd: Any, tmp_path: Path) -> None:
    base, other = tiny_sd("base"), tiny_sd("other", seed=1, prediction_type="v_prediction")
    file = single_file(other, tmp_path / "other.safetensors")
    wanted = load_file(other / UNET)
    model = resolve(str(base), training=True)
    for given, prediction in ((file, "epsilon"), (other, "v_prediction"), (other / "unet", "epsilon")):
        family = open_family(model, unet=str(given))
        loaded = family.load_denoiser(CPU, F32).state_dict()
        assert all(torch.equal(loaded[n], wanted[n]) for n in wanted), given
        assert family.prediction_type == prediction


def test_a_unet_that_does_not_fit_is_refused(tiny_sd: Any, tmp_path: Path) -> None:
    base, other = tiny_sd("base"), tiny_sd("other")
    edit_json(other / "unet/config.json", in_channels=9)
    edit_tensors(other / UNET, lambda t: t.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}))
    with pytest.raises(SdlabError, match=r"an inpainting model \(9 input channels\)"):
        open_family(resolve(str(base), training=True), unet=str(other))
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(SdlabError, match="is a LoRA"):
        open_family(resolve(str(base), training=True), unet=str(tmp_path / "lora.safetensors"))
    with pytest.raises(SdlabError, match="no such file or folder"):
        open_family(resolve(str(base), training=True), unet=str(tmp_path / "none"))
