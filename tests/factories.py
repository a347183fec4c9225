"""Tiny models and picture folders for tests, made in well under a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from sdlab.keyed import key


def tiny_sd(
    folder: Path, *, seed: int = 0, prediction_type: str = "epsilon", second: bool = False, channels: int = 4
) -> Path:
    """Save a random StableDiffusionPipeline with the real class types: 3-level UNet of 32 channels, 8x VAE.

    With `second` it is like Stable Diffusion 2.x: prompts are 48 wide, of an encoder of OpenCLIP's kind, and linear
    projections stand in the UNet for 1x1 convolutions. `channels` 9 makes it an inpainting model.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48 if second else 32,
        attention_head_dim=[2, 4, 4] if second else 4,
        norm_num_groups=8,
        in_channels=channels,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    tokenizer = clip_tokenizer(
        folder.parent / f"{folder.name}-tokenizer", pad="!" if second else "<|endoftext|>"
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48 if second else 32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    kind = StableDiffusionPipeline if channels == 4 else StableDiffusionInpaintPipeline
    pipeline = kind(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path, *, pad: str = "<|endoftext|>"):
    """A byte-level CLIP tokenizer without merges: every byte is a token, so any text works."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(spare))]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}),
        encoding="utf-8",
    )
    return CLIPTokenizer.from_pretrained(folder)


def pictures(root: Path, files: dict[str, tuple[int, int]]) -> Path:
    """Draw one small picture per entry, ``relative path -> (height, width)``; the colour follows the name."""
    for name, (height, width) in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(key("colour", name, channel) % 256 for channel in range(3))
        image = Image.new("RGB", (width, height), colour)
        image.paste(
            (255 - colour[0], colour[1], 255 - colour[2]), (width // 4, height // 4, width // 2, height // 2)
        )
        image.save(path)
    return root


QWEN_TEMPLATE = (  # renders what Qwen3's own template renders for FLUX.2 klein's prompts
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL_TEMPLATE = (  # of FLUX.2 dev: a system message, then the user's, each a list of parts
    "{{ '<s>' }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' }}"
    "{%- else %}{{ '[INST]' }}{%- endif %}{%- for p in m['content'] %}"
    "{%- if p['type'] == 'text' %}{{ p['text'] }}{%- else %}{{ '[IMG]' }}{%- endif %}{%- endfor %}"
    "{%- if m['role'] == 'system' %}{{ '[/SYSTEM_PROMPT]' }}{%- else %}{{ '[/INST]' }}{%- endif %}{%- endfor %}"
)
FLOW_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "num_train_timesteps": 1000,
}


def tiny_flux2(
    folder: Path,
    *,
    kind: str = "klein",
    seed: int = 0,
    is_distilled: bool = False,
    window: int | None = None,
    extra_layers: int = 1,
) -> Path:
    """Save a random Flux2KleinPipeline or Flux2Pipeline (kind dev) with the real class types.

    2 double and 2 single blocks of width 32, a 16x VAE of 4 latent channels with batch-norm statistics that matter, and
    a text encoder of width 16 with `extra_layers` more layers than are read. `window` tokens a prompt: 48, dev 224 (its
    system message alone takes 172).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

    torch.manual_seed(seed)
    window = window or (48 if kind == "klein" else 224)
    if kind == "klein":
        tokenizer, text = _tiny_qwen(window, 28 + extra_layers)
    else:
        tokenizer, text = _tiny_mistral(window, 31 + extra_layers)
    with torch.no_grad():  # random encoders give hidden states of 0.02, real ones of 1 and more
        text.get_input_embeddings().weight.normal_(0, 1)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLOW_SCHEDULER),
        "vae": tiny_flux2_vae(),
        "tokenizer": tokenizer,
        "text_encoder": text.eval(),
        "transformer": tiny_transformer(guidance_embeds=kind == "dev"),
    }
    pipeline = (
        Flux2KleinPipeline(**parts, is_distilled=is_distilled) if kind == "klein" else Flux2Pipeline(**parts)
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_transformer(*, guidance_embeds: bool = False):
    """A random Flux2Transformer2DModel of 2 double and 2 single blocks, 32 wide, for 48-wide prompts."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        guidance_embeds=guidance_embeds,
    ).eval()


def tiny_flux2_vae():
    """A random AutoencoderKLFlux2, 8 times smaller, 4 channels, with batch-norm statistics far from 0 and 1."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    ).eval()
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.2, 2.0)
    return vae


def _byte_tokens() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _tiny_qwen(window: int, num_layers: int):
    """A byte-level Qwen tokenizer without merges, and a random Qwen3 of width 16."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {token: i for i, token in enumerate([*_byte_tokens(), *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:], model_max_length=window
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, Qwen3ForCausalLM(config)


def _tiny_mistral(window: int, num_layers: int):
    """A byte-level tokenizer with Mistral's marks, and a random Mistral 3 whose language half is 16 wide."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<pad>", *marks, *_byte_tokens()])}
    whole = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=marks,
        model_max_length=window,
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "num_channels": 3,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
    )
    return tokenizer, Mistral3ForConditionalGeneration(config)


BLIP_WORDS = (
    "a red green blue black white fish house flower cat man on of with and background picture big small . ,"
).split()


def tiny_blip(folder: Path, *, seed: int = 0, side_px: int = 32) -> Path:
    """Save a random BlipForConditionalGeneration of 2 and 2 layers, its tokenizer and its preprocessor."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    torch.manual_seed(seed)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    letters = [chr(c) for c in range(ord("b"), ord("z") + 1)]
    ids = {
        token: i for i, token in enumerate([*special, *BLIP_WORDS, *letters, *(f"##{c}" for c in letters)])
    }
    config = BlipConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": ids["[DEC]"],
            "eos_token_id": ids["[SEP]"],
            "sep_token_id": ids["[SEP]"],
            "pad_token_id": ids["[PAD]"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side_px,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
    )
    model = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():  # random weights of 0.02 would say the same of every picture
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3 if "crossattention" not in name else 1.0)
        model.text_decoder.cls.predictions.bias[ids["[SEP]"]] = 2.5  # so that captions end at many places
    model.save_pretrained(folder)
    BertTokenizer(vocab=ids, bos_token="[DEC]", model_max_length=16).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": side_px, "width": side_px}).save_pretrained(folder)
    return folder
