"""mini-sd as it is shipped: small, whole, and it shows what prompts say."""

from __future__ import annotations

import torch
from safetensors import safe_open

from sdlab.models.bases import builtin_folder
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve
from sdlab.testing.scenes import BASE_SHAPES, COLOURS, PREFIX, score

FOLDER = builtin_folder("mini-sd")


def test_it_is_small_and_holds_no_pickles():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}


def test_its_text_encoder_has_the_names_that_older_tools_read():
    with safe_open(FOLDER / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())


def test_any_word_has_tokens():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    for text in ("red star", "zyzzyva", "naïve façade", "星と魚", "🐟"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_it_shows_what_prompts_say():
    colours = list(COLOURS)
    prompts = [
        f"{colours[i % 8]} {shape}, {colours[(i + 3) % 8]} background"
        for i, shape in enumerate(s for s in BASE_SHAPES if s not in ("circle", "heart"))
    ]
    family = open_family(resolve("mini-sd", training=False))
    pipeline = family.pipeline(family.load_denoiser(torch.device("cpu"), torch.float32))
    pictures = pipeline(
        prompt=[PREFIX + p for p in prompts], num_inference_steps=20, guidance_scale=7.0, height=128, width=128,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images  # fmt: skip
    assert score(pictures, prompts).all_three >= 0.75
