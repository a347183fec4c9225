"""Puts mini-sd together: a diffusers StableDiffusionPipeline folder in fp16 safetensors.

python recipes/mini/export.py WORK_FOLDER PIPELINE_FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from master import put
from safetensors.torch import load_file, save_file
from train_sd import BETAS, small_text_encoder, small_unet
from train_vae import load as load_vae
from transformers import CLIPTokenizer


def export(work: Path, target: Path) -> int:
    """Writes the pipeline with the averaged weights and gives its size in bytes."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    state = torch.load(work / "sd.pt", weights_only=True)
    unet, text_encoder, vae = small_unet(), small_text_encoder(tokenizer), load_vae(work)
    put(state["master"]["averaged"], [unet, text_encoder])
    vae.register_to_config(scaling_factor=round(state["scale"], 5))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(target, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    shutil.rmtree(target / "tokenizer")
    shutil.copytree(work / "tokenizer", target / "tokenizer")
    _name_as_sd_does(target / "text_encoder" / "model.safetensors")
    for path in sorted(target.rglob("*.json")):
        _tidy(path)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _name_as_sd_does(path: Path) -> None:
    """transformers >= 5.6 leaves `text_model.` out of the keys; every other tool expects it."""
    weights = load_file(path)
    prefix = "text_model."
    named = {key if key.startswith(prefix) else prefix + key: value for key, value in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


def _tidy(path: Path) -> None:
    """Takes out the folder that a part was loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    print(f"{args.target}: {export(args.work, args.target):,} bytes")
