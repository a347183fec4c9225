"""Puts mini-flux2 together: a diffusers Flux2KleinPipeline folder in fp16 safetensors.

python recipes/mini/flux2_export.py WORK_FOLDER PIPELINE_FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from flux2_train import small_transformer
from master import put
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

SCHEDULE = {  # FLUX.2's own; the sampler gives it the shift
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "num_train_timesteps": 1000,
}


def export(work: Path, target: Path, *, name: str) -> int:
    """Writes the pipeline with the averaged weights, in the place of one that is there, and gives its size in bytes;
    without a checkpoint, with an untrained denoiser."""
    transformer = small_transformer()
    if (work / f"{name}.pt").exists():
        put(torch.load(work / f"{name}.pt", weights_only=True)["master"]["averaged"], [transformer])
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "flux2_tokenizer")
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=AutoencoderKLFlux2.from_pretrained(work / "flux2_vae"),
        text_encoder=Qwen3ForCausalLM.from_pretrained(work / "flux2_text"),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    made = target.with_name(target.name + ".new")
    shutil.rmtree(made, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(made, safe_serialization=True)
    shutil.rmtree(made / "tokenizer")
    tokenizer.save_pretrained(
        made / "tokenizer", save_jinja_files=False
    )  # the template where all versions look
    tokenizer.backend_tokenizer.model.save(str(made / "tokenizer"))  # vocab.json, merges.txt
    for path in sorted(made.rglob("*.json")):
        _tidy(path)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _tidy(path: Path) -> None:
    """Takes out the folder that a part was loaded from, and a tokenizer's blanks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("_name_or_path", "is_local", "local_files_only"):
        content.pop(name, None)
    indent = None if path.name in ("tokenizer.json", "vocab.json") else 2
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--name", default="flux2")
    args = parser.parse_args()
    print(f"{args.target}: {export(args.work, args.target, name=args.name):,} bytes")
