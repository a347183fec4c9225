"""Which models a LoRA is for, told from names and shapes as programs write them. The headers are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlab.models.files import Header, Stored
from sdlab.models.lora_family import UNKNOWN, family_of

RANK = 8
KLEIN_4B_OR_FLUX1 = "FLUX.1 or FLUX.2 klein 4B"


def header(layers: dict[str, tuple[int, ...]], layout: str = "kohya") -> Header:
    """Layers as (out, in) or a convolution's (out, in, height, width)."""
    down, up = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}[layout]
    tensors = {}
    for name, (out, *inside) in layers.items():
        tail = [1] * (len(inside) - 1)
        for half, shape in ((down, (RANK, *inside)), (up, (out, RANK, *tail))):
            key = f"{name}.{half}.weight"
            tensors[key] = Stored(key, "F16", shape, Path("a.safetensors"))
    return Header(Path("a.safetensors"), tensors, {})


UNET = "lora_unet_down_blocks_1_attentions_0_"
BLOCK = f"{UNET}transformer_blocks_0_"
TE = "text_model_encoder_layers_0_"
UNETS = [
    ({f"{BLOCK}attn2_to_k": (320, 768), f"{BLOCK}attn1_to_q": (320, 320)}, "Stable Diffusion 1.x"),
    ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1280, 768)}, "Stable Diffusion 1.x"),
    (
        {"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 1024)},
        "Stable Diffusion 2.x",
    ),
    ({f"{BLOCK}attn2_to_k": (640, 2048)}, "SDXL"),
    ({f"{BLOCK}attn2_to_k": (768, 1280)}, "the SDXL refiner"),
    ({f"{BLOCK}attn2_to_k": (32, 64)}, "a Stable Diffusion model with 64-wide prompts"),
    ({f"{UNET}transformer_blocks_1_attn1_to_q": (640, 640)}, "SDXL"),
    ({f"{BLOCK}attn1_to_q": (640, 640), f"lora_te2_{TE}mlp_fc1": (5120, 1280)}, "SDXL"),
    ({f"{BLOCK}attn1_to_q": (640, 640), f"lora_te_{TE}mlp_fc1": (4096, 1024)}, "Stable Diffusion 2.x"),
    ({f"{UNET}proj_in": (320, 320, 1, 1)}, "Stable Diffusion 1.x"),
    ({f"{UNET}proj_in": (320, 320)}, "Stable Diffusion 2.x"),
    ({f"{BLOCK}attn1_to_q": (640, 640)}, "Stable Diffusion 1.x, 2.x or SDXL"),
    ({f"lora_te_{TE}self_attn_q_proj": (768, 768)}, "Stable Diffusion 1.x"),
    ({"text_encoder.text_model.encoder.layers.0.mlp.fc1": (4096, 1024)}, "Stable Diffusion 2.x"),
    ({f"lora_te1_{TE}mlp_fc1": (3072, 768), f"lora_te2_{TE}mlp_fc1": (5120, 1280)}, "SDXL"),
    ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (5120, 1280)}, "SDXL"),
    ({"lora_te2_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}, "FLUX.1"),
]


@pytest.mark.parametrize(("layers", "wanted"), UNETS)
def test_unets_and_their_text_encoders_are_told_apart(layers, wanted):
    assert family_of(header(layers)) == wanted
    assert family_of(header(layers, "peft")) == wanted


TRANSFORMERS = [
    ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}, "Stable Diffusion 3"),
    ({"transformer.transformer_blocks.0.attn.add_q_proj": (2432, 2432)}, "Stable Diffusion 3"),
    ({"lora_unet_double_blocks_18_img_attn_qkv": (9216, 3072)}, "FLUX.1"),
    ({"lora_unet_single_blocks_37_linear2": (3072, 15360)}, "FLUX.1"),
    ({"diffusion_model.single_blocks.0.linear1": (21504, 3072)}, "FLUX.1"),
    ({"diffusion_model.double_blocks.0.img_mlp.0": (12288, 3072)}, "FLUX.1"),
    ({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072), "lora_unet_double_blocks_0_img_mod_lin": (18432, 3072)},
     "FLUX.1"),
    ({"transformer.single_transformer_blocks.0.attn.to_q": (3072, 3072)}, "FLUX.1"),
    ({"transformer.single_transformer_blocks.0.proj_out": (3072, 15360)}, "FLUX.1"),
    ({"transformer.transformer_blocks.0.ff.net.0.proj": (12288, 3072),
      "transformer.transformer_blocks.0.attn.add_q_proj": (3072, 3072)}, "FLUX.1"),
    ({"diffusion_model.double_blocks.0.img_attn.qkv": (9216, 3072)}, KLEIN_4B_OR_FLUX1),
    ({"transformer.transformer_blocks.4.attn.add_q_proj": (3072, 3072)}, KLEIN_4B_OR_FLUX1),
    ({"diffusion_model.single_blocks.0.linear1": (27648, 3072)}, "FLUX.2 klein 4B"),
    ({"lora_unet_single_blocks_0_linear2": (3072, 12288)}, "FLUX.2 klein 4B"),
    ({"diffusion_model.double_blocks.0.img_mlp.0": (18432, 3072)}, "FLUX.2 klein 4B"),
    ({"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (27648, 3072)}, "FLUX.2 klein 4B"),
    ({"transformer.transformer_blocks.0.ff.linear_in": (18432, 3072)}, "FLUX.2 klein 4B"),
    ({"diffusion_model.double_blocks.0.img_attn.qkv": (12288, 4096)}, "FLUX.2 klein 9B"),
    ({"transformer.single_transformer_blocks.0.attn.to_out": (4096, 16384)}, "FLUX.2 klein 9B"),
    ({"lora_unet_single_blocks_47_linear1": (55296, 6144)}, "FLUX.2 dev"),
    ({"transformer.transformer_blocks.0.attn.add_q_proj": (6144, 6144)}, "FLUX.2 dev"),
    ({"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (576, 64)}, "a FLUX.2 model of width 64"),
    ({"diffusion_model.double_stream_modulation_img.lin": (18432, 3072)}, UNKNOWN),
    ({"transformer_blocks.0.attn1.to_q": (1152, 1152)}, UNKNOWN),  # PixArt
    ({"transformer.transformer_blocks.59.attn.add_q_proj": (3072, 3072)}, UNKNOWN),  # Qwen-Image
    ({"diffusion_model.transformer_blocks.0.attn.add_q_proj": (3072, 3072),
      "diffusion_model.transformer_blocks.0.img_mlp.net.2": (3072, 12288)}, UNKNOWN),
    ({"lora_unet_blocks_0_self_attn_q": (5120, 5120)}, UNKNOWN),  # Wan
    ({"lora_unet_layers_0_attention_qkv": (11520, 3840)}, UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "wanted"), TRANSFORMERS)
def test_transformers_are_told_apart(layers, wanted):
    assert family_of(header(layers)) == wanted
    assert family_of(header(layers, "peft")) == wanted


def test_a_header_of_nonsense_is_of_no_known_model():
    assert family_of(header({})) == UNKNOWN
    broken = {"double_blocks.0.img_attn.qkv.lora_A.weight": (), "x.lora_down.weight": (3,), "y.alpha": ()}
    tensors = {k: Stored(k, "F16", shape, Path("a")) for k, shape in broken.items()}
    assert family_of(Header(Path("a"), tensors, {})) == UNKNOWN
