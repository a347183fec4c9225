"""What a file is, told from its header alone: every common kind that is no model gets its name in the error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.models.files import Header, Stored
from sdlab.models.sniff import Found, look, recognise

U, V, C = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
LDM_UNET = {
    f"{U}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{U}input_blocks.1.0.in_layers.0.weight": (320,),
    f"{U}middle_block.1.norm.weight": (1280,),
}
DIFFUSERS_UNET = {
    "conv_in.weight": (320, 4, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (320,),
    "mid_block.attentions.0.norm.weight": (1280,),
}
OPENCLIP = {"cond_stage_model.model.transformer.resblocks.0.x": (1,)}
WHOLE = {**LDM_UNET, f"{V}decoder.conv_in.weight": (1,), f"{C}text_model.embeddings.x": (1,)}


def header(shapes: dict[str, tuple[int, ...]], dtype: str = "F16") -> Header:
    path = Path("some.safetensors")
    return Header(path, {n: Stored(n, dtype, s, path) for n, s in shapes.items()}, {})


NO_VAE = {n: s for n, s in WHOLE.items() if not n.startswith(V)}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (WHOLE, "checkpoint"),
        (NO_VAE, "checkpoint"),
        ({**LDM_UNET, **OPENCLIP, f"{V}decoder.conv_in.weight": (1,)}, "checkpoint"),
        (LDM_UNET, "unet"),
        ({n.removeprefix(U): s for n, s in LDM_UNET.items()}, "unet"),
        (DIFFUSERS_UNET, "unet"),
    ],
)
def test_models_are_recognised(shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    assert recognise(header(shapes)) == kind


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        (WHOLE, Found("sd", ("unet", "vae", "text_encoder"))),
        (NO_VAE, Found("sd", ("unet", "text_encoder"))),
        (
            {**WHOLE, f"{U}input_blocks.0.0.weight": (320, 9, 3, 3)},
            Found("sd", ("unet", "vae", "text_encoder"), 9),
        ),
        (DIFFUSERS_UNET, Found("sd", ("unet",))),
        ({"encoder.conv_in.weight": (128, 3, 3, 3)}, Found("sd", ("vae",))),
        ({f"{V}encoder.conv_in.weight": (128, 3, 3, 3)}, Found("sd", ("vae",))),
        ({"encoder.conv_in.weight": (128, 3, 3, 3), "bn.running_mean": (128,)}, Found("flux2", ("vae",))),
        (
            {"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3), f"{C}x": (1,)},
            Found("sd", ("unet", "text_encoder"), 4, True),
        ),
    ],
)
def test_what_can_be_converted_is_found(shapes: dict[str, tuple[int, ...]], found: Found) -> None:
    assert look(header(shapes)) == found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA"),
        (["lora_te_text_model_x.alpha"], "is a LoRA"),
        (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "is a LoRA"),
        (["unet.x.to_q_lora.up.weight"], "is a LoRA"),
        (["x.hada_w1_a"], "is a LoRA"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], "is a LoRA.*--lora"),
        (["lycoris_transformer_x.lokr_w1"], "is a LoRA"),
        (["emb_params"], "textual inversion"),
        (["<my-cat>"], "textual inversion"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "ControlNet"),
        ([*WHOLE, "conditioner.embedders.1.model.ln_final.bias"], "SDXL"),
        ([*LDM_UNET, f"{U}label_emb.0.0.weight"], "SDXL"),
        (["conv_in.weight", "down_blocks.0.x", "add_embedding.linear_1.weight"], "SDXL"),
        ([*LDM_UNET, "conditioner.embedders.0.model.ln_final.bias"], "SDXL refiner"),
        (["double_blocks.0.img_attn.qkv.weight"], r"FLUX\.1 model"),
        ([f"{U}double_blocks.0.img_attn.qkv.weight"], r"FLUX\.1 model"),
        ([f"{U}joint_blocks.0.x"], "Stable Diffusion 3"),
        (["transformer_blocks.0.attn.to_q.weight"], "SD 3 or a relative"),
        (list(LDM_UNET)[:2], "reduced UNet"),
        (list(DIFFUSERS_UNET)[:2], "reduced UNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone"),
        ([f"{V}encoder.conv_in.weight"], "a VAE alone"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        ([*LDM_UNET, f"{U}input_blocks.1.1.x.weight_scale"], "quantised"),
        (["cond_stage_model.model.ln_final.bias"], "a text encoder alone"),
        ([*LDM_UNET, f"{U}out.2.comfy_quant"], "quantised"),
        (["scaled_fp8", *LDM_UNET], "quantised"),
        ([f"{V}decoder.conv_out.weight"], "half a VAE"),
        ([f"{V}encoder.conv_in.weight", f"{U}input_blocks.1.0.x"], "lacks its first tensor"),
        ([f"{V}encoder.conv_in.weight", f"{C}text_model.x"], "a checkpoint without a UNet"),
        (["model_ema.decay"], "moving averages of no model"),
        (["some.thing.else"], "no model that sdlab knows"),
        ([], "no tensors"),
    ],
)
def test_other_files_are_named(names: list[str], said: str) -> None:
    with pytest.raises(SdlabError, match=said) as raised:
        recognise(header(dict.fromkeys(names, (320, 4, 3, 3))))
    assert str(raised.value).startswith("some.safetensors: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(("channels", "said"), [(9, "inpainting"), (8, "pix2pix"), (5, "depth")])
def test_unets_with_other_inputs_are_named(channels: int, said: str) -> None:
    with pytest.raises(SdlabError, match=said):
        recognise(header({**WHOLE, f"{U}input_blocks.0.0.weight": (320, channels, 3, 3)}))


def test_eight_bit_weights_are_named() -> None:
    with pytest.raises(SdlabError, match="F8_E4M3"):
        recognise(header(WHOLE, dtype="F8_E4M3"))
    assert torch.float8_e4m3fn  # the type exists in torch: refused by choice, not for want of it
