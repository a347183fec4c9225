"""Stable Diffusion 2.x from one file: OpenCLIP's text encoder means the same under transformers' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdlab.models import bases, ldm, openclip, sniff
from sdlab.models.opening import open_family, prompt_window, recommended
from sdlab.models.parts import build_module, expected, load
from sdlab.models.resolve import resolve
from tests.models.helpers import TEXT, copied, edit_json, edit_tensors, single_file

CPU, F32 = torch.device("cpu"), torch.float32
SD21 = bases.CONFIGS / "sd21"


@pytest.fixture(autouse=True)
def tiny_is_known(tiny_sd2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"sd15": bases.CONFIGS / "sd15", "sd21": SD21, "tiny-2": tiny_sd2_folder}
    monkeypatch.setattr(sniff, "known_configs", lambda: known)


class Block(nn.Module):
    """A layer of OpenCLIP's text transformer, as its authors write it: one fused projection for q, k and v."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        length = x_BLD.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        y = self.ln_1(x_BLD)
        x_BLD = x_BLD + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x_BLD + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x_BLD))))


def reference(
    table: dict[str, torch.Tensor], tokens: torch.Tensor, *, layers: int, heads: int
) -> torch.Tensor:
    """The hidden states after `layers` layers and the last norm, (B, L, D), from OpenCLIP's own names."""
    table = {n.removeprefix(ldm.OPENCLIP): t for n, t in table.items() if n.startswith(ldm.OPENCLIP)}
    x = table["token_embedding.weight"][tokens] + table["positional_embedding"][: tokens.shape[1]]
    for layer in range(layers):
        root = f"transformer.resblocks.{layer}."
        own = {n.removeprefix(root): t for n, t in table.items() if n.startswith(root)}
        block = Block(x.shape[-1], heads, own["mlp.c_fc.weight"].shape[0])
        block.load_state_dict(own)
        x = block.eval()(x)
    weight, bias = table["ln_final.weight"], table["ln_final.bias"]
    return nn.functional.layer_norm(x, weight.shape, weight, bias)


@torch.no_grad()
def test_openclips_own_arithmetic_gives_the_same_hidden_states(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    path = single_file(tiny_sd2_folder, tmp_path / "m.safetensors")
    edit_tensors(path, lambda t: t.update({n: torch.randn_like(v) for n, v in t.items() if "in_proj" in n}))
    family: Any = open_family(resolve(str(path), training=False))
    encoder: Any = load(family.parts.text_encoder, CPU, F32)
    tokens = torch.randint(0, 300, (2, 77), generator=torch.Generator().manual_seed(0))
    wanted = reference(load_file(path), tokens, layers=2, heads=4)
    torch.testing.assert_close(encoder(tokens).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_a_single_file_of_the_second_kind_equals_its_folder(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    """With what such files hold besides: the layer after the last one read, the projection, the mask."""
    path = single_file(
        tiny_sd2_folder, tmp_path / "second.safetensors", metadata={"modelspec.prediction_type": "v"}
    )
    unread = ("transformer.resblocks.2.ln_1.bias", "text_projection", "logit_scale", "attn_mask")
    edit_tensors(path, lambda t: t.update({ldm.OPENCLIP + n: torch.ones(1) for n in unread}))
    model = resolve(str(path), training=False)
    assert (model.family, model.base, model.kind) == ("sd", "tiny-2", "file")
    one: Any = open_family(model)
    two: Any = open_family(resolve(str(tiny_sd2_folder), training=False))
    assert one.fingerprint == two.fingerprint
    assert one.prediction_type == two.prediction_type == "v_prediction"
    stored = {n.removeprefix("text_model."): t for n, t in load_file(tiny_sd2_folder / TEXT).items()}
    loaded = load(one.parts.text_encoder, CPU, F32).state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[n], stored[n]) for n in stored)
    for name, tensor in one.parts.text_encoder.weights.items():
        assert b"".join(tensor.pieces()) == stored[name].numpy().tobytes(), name
    pipeline = one.pipeline(one.load_denoiser(CPU, F32))
    assert pipeline("red star", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert prompt_window(model).window == 77 and recommended(model).image_size == 64


def test_the_names_of_clip_are_read_in_such_a_file_as_well(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    path = single_file(tiny_sd2_folder, tmp_path / "m.safetensors")
    stored = {n.removeprefix("text_model."): t for n, t in load_file(tiny_sd2_folder / TEXT).items()}

    def renamed(table: dict[str, torch.Tensor]) -> None:
        for name in [n for n in table if n.startswith(ldm.OPENCLIP)]:
            table.pop(name)
        table.update({ldm.CLIP + "text_model." + n: t for n, t in stored.items()})

    edit_tensors(path, renamed)
    family: Any = open_family(resolve(str(path), training=False))
    loaded = load(family.parts.text_encoder, CPU, F32).state_dict()
    assert all(torch.equal(loaded[n], stored[n]) for n in stored)


def test_a_prompt_is_filled_up_as_the_second_kind_does(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(SD21 / "tokenizer", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 77)
    ids = tokenizer("a photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70
    family: Any = open_family(resolve(str(tiny_sd2_folder), training=False))
    other = copied(tiny_sd2_folder, tmp_path / "other")
    edit_json(other / "tokenizer/tokenizer_config.json", pad_token="<|endoftext|>")
    changed: Any = open_family(resolve(str(other), training=False))
    assert family.fingerprint != changed.fingerprint  # prompts that are kept would be other ones


def test_the_names_of_the_real_sd21_are_those_diffusers_converts() -> None:
    """Names and shapes of the full-size model, on the meta device; 23 layers are 24 less the one that is not read."""
    from diffusers.loaders import single_file_utils as theirs

    for part, class_name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        config = json.loads((SD21 / part / "config.json").read_text())
        wanted = expected(build_module(class_name, config, SD21 / part))
        file = {ldm.place_of(part, n, config).name: torch.empty(s, device="meta") for n, s in wanted.items()}
        convert: Any = (
            theirs.convert_ldm_unet_checkpoint if part == "unet" else theirs.convert_ldm_vae_checkpoint
        )
        back = {n: tuple(t.shape) for n, t in convert(file, config).items()}
        assert back == wanted and len(file) == len(wanted) == {"unet": 686, "vae": 248}[part]
    config = json.loads((SD21 / "text_encoder/config.json").read_text())
    wanted = expected(build_module("CLIPTextModel", config, SD21))
    places = {n: ldm.place_of("text_encoder", n, config) for n in wanted}
    assert len(set(places.values())) == len(wanted) == 23 * 16 + 4
    block = Block(1024, 16, 4096).to("meta").state_dict()
    for layer in range(23):
        root = f"{ldm.OPENCLIP}transformer.resblocks.{layer}."
        mine: dict[str, int] = {}
        for name, place in places.items():
            if place.name.startswith(root):
                mine[place.name.removeprefix(root)] = (
                    mine.get(place.name.removeprefix(root), 0) + wanted[name][0]
                )
        assert mine == {name: tensor.shape[0] for name, tensor in block.items()}
    with pytest.raises(KeyError):
        openclip.name_of("encoder.layers.0.self_attn.rotary.weight")
