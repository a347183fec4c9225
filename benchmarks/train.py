"""How fast a model trains here, how much memory it takes, and whether a resumed run has the same bits.

python benchmarks/train.py [--load-model mini-sd | --random-sd15] [--steps 40] [--batch 4] [--image-size 128]

--random-sd15 builds Stable Diffusion 1.5 at full size with random weights: for a computer without the hub.
Prints one JSON line. Two runs of --steps/2 (the second resumes the first) are compared with one of --steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def random_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 with random weights, as a diffusers folder."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = ROOT / "src" / "sdlab" / "models" / "configs" / "sd15"
    torch.manual_seed(0)
    subprocess.run(["cp", "-r", str(configs), str(folder)], check=True)
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")).save_pretrained(
        folder / "unet"
    )
    AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")).save_pretrained(
        folder / "text_encoder"
    )
    return folder


def train(run: Path, args: argparse.Namespace, model: str, *more: str) -> float:
    """Run ``sdlab train-sd`` as a process; its wall seconds."""
    began = time.monotonic()
    command = [
        sys.executable, "-m", "sdlab", "train-sd", "--images", str(ROOT / "images"), "--load-model", model,
        "--save-model", str(run), "--cache-dir", str(run.parent / "cache"), "--steps", str(args.steps),
        "--batch", str(args.batch), "--image-size", str(args.image_size), "--lr-schedule", "constant", "--warmup", "0",
        "--preview-every", "0", "--preview-prompt", "red fish", "--dtype", args.dtype, *more,
    ]  # fmt: skip
    subprocess.run(command, check=False)
    return time.monotonic() - began


def step_seconds(run: Path) -> float:
    return float(json.loads((run / "run.json").read_text())["seconds_a_step"])


def digest(run: Path) -> str:
    return hashlib.sha256((run / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load-model", default="mini-sd")
    parser.add_argument("--random-sd15", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        model = str(random_sd15(base / "random-sd15")) if args.random_sd15 else args.load_model
        train(base / "warm", args, model, "--steps", "1")  # fills the cache
        wall_s = train(base / "straight", args, model)
        half = str(args.steps // 2)
        train(base / "half", args, model, "--save-every", half)
        checkpoints = sorted((base / "half" / "checkpoints").iterdir())
        subprocess.run(["rm", "-rf", str(checkpoints[-1])], check=True)  # as if killed after the first half
        record = json.loads((base / "half" / "run.json").read_text())
        (base / "half" / "run.json").write_text(json.dumps({**record, "state": "running"}))
        train(base / "half", args, model, "--save-every", half, "--resume")
        record = json.loads((base / "straight" / "run.json").read_text())
        seconds = step_seconds(base / "straight")
        print(
            json.dumps(
                {
                    "model": "random-sd15" if args.random_sd15 else args.load_model,
                    "machine": record["machine"],
                    "processor": platform.processor() or platform.machine(),
                    "image_size": args.image_size,
                    "batch": args.batch,
                    "seconds_a_step": seconds,
                    "pictures_a_second": round(args.batch / seconds, 2),
                    "whole_command_s": round(wall_s, 1),
                    "peak_gpu_gib": record.get("peak_gpu_gib"),
                    "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
                    "resumed_run_has_the_same_bits": digest(base / "straight") == digest(base / "half"),
                    "versions": record["versions"],
                }
            )
        )


if __name__ == "__main__":
    main()
