"""How other programs know a file for what it is: the tensors they ask for by name, and the sizes they go by.

As read in their sources: ComfyUI a125cd8 (its FLUX.2 tests are those of later versions), A1111 as of 2024,
stable-diffusion.cpp 97d2990, InvokeAI 8e71a8a. Facts, no code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.convert.originals import CLIP, OPENCLIP, UNET, VAE, Shapes

ANY = None


@dataclass(frozen=True)
class Reader:
    """How a program knows a kind of file."""

    name: str
    kind: str
    needs: dict[str, tuple[int | None, ...]]  # tensors it asks for by name, and the sizes it goes by
    never: str = "$^"  # what would make it take the file for something else, as a regular expression


IN, OUT = UNET + "input_blocks.", UNET + "output_blocks."
TO_K = "1.transformer_blocks.0.attn2.to_k.weight"
_COMFYUI_UNET = {
    IN + "0.0.weight": (320, 4, ANY, ANY),
    IN + "3.0.op.weight": (ANY, ANY, ANY, ANY),  # where a level ends
    IN + "6.0.op.weight": (ANY, ANY, ANY, ANY),
    IN + "9.0.op.weight": (ANY, ANY, ANY, ANY),
    IN + "1.0.in_layers.0.weight": (ANY,),
    IN + "4.0.out_layers.3.weight": (640, ANY, ANY, ANY),  # a level's width over the first's
    IN + "7.0.out_layers.3.weight": (1280, ANY, ANY, ANY),
    IN + "10.0.out_layers.3.weight": (1280, ANY, ANY, ANY),
    OUT + "11.0.in_layers.0.weight": (ANY,),
    UNET + "out.2.weight": (4, ANY, ANY, ANY),
}
_COMFYUI_VAE = {
    "decoder.conv_in.weight": (ANY, 4, ANY, ANY),
    "encoder.down.2.downsample.conv.weight": (ANY, ANY, ANY, ANY),  # else it is the one of the 4x upscaler
    "decoder.up.3.upsample.conv.weight": (ANY, ANY, ANY, ANY),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
_NOT_SD = (
    r"label_emb\.|conditioner\.|time_stack|time_mix|scaled_fp8|^depth_model\.|^embedder\.|roberta"
    r"|\.middle_block\.1\.proj_in\.weight_scale|alphas_cumprod|^cond_stage_model\.1\.|^te\.1\."
    r"|position_ids|logit_scale|^model_ema\.|^loss\.|diffusion_model\.diffusion_model"
)
_FLUX2 = {
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "double_stream_modulation_img.lin.weight": (ANY, ANY),  # FLUX.1 has none
    "img_in.weight": (3072, 128),
    "txt_in.weight": (ANY, 7680),
    "double_blocks.4.img_attn.qkv.weight": (ANY, ANY),
    "single_blocks.19.linear1.weight": (ANY, ANY),
}
_NOT_KLEIN = (
    r"guidance_in\.|vector_in\.|single_blocks\.(2\d|47)\.|txt_norm|distilled_guidance|byt5_in|\.lora_"
)
READERS = (
    Reader(
        "ComfyUI",
        "sd1",
        _COMFYUI_UNET
        | {VAE + name: sizes for name, sizes in _COMFYUI_VAE.items()}
        | {
            IN + "1." + TO_K: (ANY, 768),
            IN + "1.1.proj_in.weight": (320, 320, 1, 1),  # four axes: 1.x
            UNET + "middle_block.1.proj_in.weight": (ANY, ANY, ANY, ANY),
            CLIP + "encoder.layers.11.mlp.fc1.weight": (ANY, 768),
        },
        _NOT_SD + r"|^cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.",
    ),
    Reader(
        "ComfyUI",
        "sd1 inpainting",
        {IN + "0.0.weight": (320, 9, 3, 3), UNET + "out.2.weight": (4, ANY, ANY, ANY)},
        _NOT_SD,
    ),
    Reader(
        "ComfyUI",
        "sd2",
        _COMFYUI_UNET
        | {
            IN + "1." + TO_K: (ANY, 1024),
            IN + "1.1.proj_in.weight": (320, 320),  # two axes: 2.x
            OUT + "11.1.transformer_blocks.0.norm1.bias": (320,),  # its spread tells what is predicted
            OPENCLIP + "positional_embedding": (77, 1024),
            OPENCLIP + "token_embedding.weight": (ANY, 1024),
            OPENCLIP + "transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
            OPENCLIP + "ln_final.weight": (1024,),
        },
        _NOT_SD,
    ),
    Reader("ComfyUI", "sd vae", _COMFYUI_VAE, r"^first_stage_model\.|mix_factor|up_blocks|taesd"),
    Reader("ComfyUI", "klein", _FLUX2, _NOT_KLEIN),
    Reader(
        "ComfyUI", "klein for ComfyUI", {UNET + name: sizes for name, sizes in _FLUX2.items()}, _NOT_KLEIN
    ),
    Reader(
        "ComfyUI",
        "dev",
        {"guidance_in.in_layer.weight": (6144, 256), "txt_in.weight": (6144, 15360)},
        r"vector_in\.|distilled_guidance",
    ),
    Reader(
        "ComfyUI",
        "flux2 vae",
        {
            "decoder.conv_in.weight": (512, 32, ANY, ANY),
            "bn.running_mean": (128,),
            "decoder.post_quant_conv.weight": (32, 32, 1, 1),
        },
        r"up_blocks|^post_quant_conv",
    ),
    Reader(
        "A1111",
        "sd1",
        {IN + "0.0.weight": (ANY, 4, ANY, ANY), CLIP + "embeddings.token_embedding.weight": (ANY, ANY)},
        _NOT_SD + r"|^cond_stage_model\.model\.",
    ),
    Reader("A1111", "sd1 inpainting", {IN + "0.0.weight": (ANY, 9, ANY, ANY)}, r"^cond_stage_model\.model\."),
    Reader(
        "A1111",
        "sd2",
        {OPENCLIP + "transformer.resblocks.0.attn.in_proj_weight": (ANY, 1024)},
        r"embedder\.model\.|depth_model|conditioner\.",
    ),
    Reader("A1111", "sd vae", {"encoder.conv_in.weight": (ANY, 3, ANY, ANY)}, r"^first_stage_model\."),
    Reader(
        "stable-diffusion.cpp",
        "sd1",
        {
            CLIP + "embeddings.token_embedding.weight": (ANY, 768),
            IN + "0.0.weight": (ANY, 4, ANY, ANY),
            UNET + "middle_block.1.norm.weight": (ANY,),  # else a reduced UNet
            OUT + "7.1.norm.weight": (ANY,),
        },
        _NOT_SD + r"|cond_stage_model\.1|output_blocks\.3\.1\.transformer_blocks\.1",
    ),
    Reader(
        "stable-diffusion.cpp",
        "sd2",
        {OPENCLIP + "token_embedding.weight": (ANY, 1024), UNET + "middle_block.1.norm.weight": (ANY,)},
        _NOT_SD,
    ),
    Reader(
        "stable-diffusion.cpp",
        "klein for ComfyUI",
        {UNET + "double_stream_modulation_img.lin.weight": (ANY, ANY)},
        r"single_blocks\.47\.",
    ),
    Reader("stable-diffusion.cpp", "dev", {"single_blocks.47.linear1.weight": (ANY, ANY)}),
    Reader("InvokeAI", "sd1", {IN + "2." + TO_K: (ANY, 768), IN + "0.0.weight": (ANY, 4, ANY, ANY)}),
    Reader(
        "InvokeAI", "sd1 inpainting", {IN + "2." + TO_K: (ANY, 768), IN + "0.0.weight": (ANY, 9, ANY, ANY)}
    ),
    Reader("InvokeAI", "sd2", {IN + "2." + TO_K: (ANY, 1024), IN + "0.0.weight": (ANY, 4, ANY, ANY)}),
    Reader("InvokeAI", "sd vae", {"decoder.conv_in.weight": (ANY, 4, ANY, ANY)}, r"^bn\."),
    Reader("InvokeAI", "klein", _FLUX2, r"\.scale_weight|guidance_in\."),
    Reader(
        "InvokeAI",
        "flux2 vae",
        {"decoder.conv_in.weight": (ANY, 32, ANY, ANY), "bn.running_mean": (ANY,), "bn.running_var": (ANY,)},
    ),
)


def unmet(reader: Reader, shapes: Shapes) -> list[str]:
    """What of a reader's expectations a file does not meet, in words."""
    faults = []
    for name, sizes in reader.needs.items():
        found = shapes.get(name)
        if found is None:
            faults.append(f"no {name}")
        elif len(found) != len(sizes) or any(s not in (ANY, f) for s, f in zip(sizes, found, strict=True)):
            faults.append(f"{name} is {found}, not {sizes}")
    return faults + [f"{name} is there" for name in shapes if re.search(reader.never, name)]
