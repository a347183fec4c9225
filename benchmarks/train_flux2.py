"""Seconds a step, peak memory and use of a CUDA card when FLUX.2 is trained: real shapes, random weights, no hub.

python benchmarks/train_flux2.py [--size 4b 9b dev] [--image-size 512 1024] [--steps 10] [--record FILE]
python benchmarks/train_flux2.py --tiny --device cpu --steps 2        does the script run? No figure of it counts
python benchmarks/train_flux2.py --peer train_dreambooth_lora_flux2_klein.py --peer-model DIR --steps 30

One JSON line for each way of training (full and LoRA as train-flux2 recommends them), with the estimate that sdlab
prints beside what was measured, the floating-point operations of a step and what share of --peak-tflops they are.

With --peer, diffusers' own example script trains a LoRA from the klein folder DIR on images/, and `sdlab train-flux2`
the same: rank 16, batch 1, bf16, the same picture size and steps, latents cached. The seconds of a run with few steps
are taken from those of one with more, so that loading and encoding do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel

from sdlab.dataset.batches import Batch
from sdlab.keyed import Draws
from sdlab.models import lora
from sdlab.models.bases import FlowObjective, recommended_for
from sdlab.models.flux2 import Flux2
from sdlab.training.estimate import estimate
from sdlab.training.optim import make_optimizer

ROOT = Path(__file__).parents[1]
TEXT_TOKENS, RANK, WARM_UP = 512, 16, 3
SHAPES: dict[str, dict[str, Any]] = {
    "4b": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    "9b": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
    "dev": dict(
        num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360, guidance_embeds=True
    ),
    "tiny": dict(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=48,
        axes_dims_rope=(8, 8, 8, 8), in_channels=32,
    ),
}  # fmt: skip
NAMES = {"4b": "flux2-klein-base-4b", "9b": "flux2-klein-base-9b", "dev": "flux2-dev", "tiny": "mini-flux2"}
WAYS = {"4b": ("full", "lora"), "9b": ("full", "lora"), "dev": ("lora",), "tiny": ("full", "lora")}


class Shaped(Flux2):
    """The family's loss for a transformer of a given configuration; there are no files behind it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.parts = SimpleNamespace(transformer=SimpleNamespace(config=config))  # type: ignore[assignment]
        self.objective = FlowObjective()


def random_transformer(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A transformer of the shape, its weights drawn on the device in `dtype`."""
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**{"guidance_embeds": False, **shape})
    model.to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.ndim < 2 else torch.nn.init.normal_(parameter, std=0.02)
    return model


def step_flops(model: Any, tokens: int, text: int, *, adapter: str, checkpointing: bool) -> float:
    """Floating-point operations of one training step of one sample.

    Forward: 2 a weight and token that passes it, and 4 S^2 d a block for attention. Backward: twice the linear part
    (once where the weights are frozen) and 2.5 times the attention; checkpointing repeats the forward.
    """
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    total = tokens + text
    linear = (
        config.num_layers * 13 * 2 * width**2 * total + config.num_single_layers * 13 * 2 * width**2 * total
    )
    attention = 4.0 * total**2 * width * (config.num_layers + config.num_single_layers)
    passes = 1.0 + checkpointing + (2.0 if adapter == "full" else 1.0)
    return linear * passes + attention * (3.5 + checkpointing)


def batches(shape: dict[str, Any], image_size: int, text: int, steps: int) -> Iterator[Batch]:
    """Random latents and embeddings of a batch of one, on the CPU as they come from the cache."""
    side, channels = image_size // 16, shape.get("in_channels", 128)
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(1, channels, side, side, generator=rng)
    embeds = torch.randn(1, text, shape["joint_attention_dim"], generator=rng).bfloat16()
    for _ in range(steps):
        yield Batch(latents, {"prompt_embeds": embeds}, torch.ones(1), ("one.png",))


def measure(size: str, adapter: str, image_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One way of training one model: what it takes and what was estimated."""
    device, shape = torch.device(args.device), SHAPES[size]
    advice = recommended_for(NAMES[size], image_size, like="mini-flux2", adapter=adapter)
    on_card = device.type == "cuda"
    half = adapter == "lora" or advice.weights == "bf16"
    dtype = torch.bfloat16 if half and on_card else torch.float32
    model = random_transformer(shape, device, dtype)
    num_parameters = sum(p.numel() for p in model.parameters())
    if adapter == "lora":
        lora.add_lora(model, rank=RANK, alpha=RANK, seed=0)
    checkpointing = advice.grad_checkpointing and not args.no_checkpointing
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    updater = make_optimizer(
        named, kind=advice.optimizer, lr=advice.lr, weight_decay=0.01, max_grad_norm=1.0, seed=0,
        fused_backward=advice.fused_backward,
    )  # fmt: skip
    family, text = Shaped(dict(model.config)), TEXT_TOKENS if size != "tiny" else 16
    forward = torch.compile(model, dynamic=False) if args.compile else model
    losses = []
    for step, batch in enumerate(batches(shape, image_size, text, WARM_UP + args.steps)):
        if step == WARM_UP:
            _wait(device)
            began = time.perf_counter()
        updater.begin(step, advice.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_card):
            loss = family.loss(forward, batch, Draws(0, step)).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        updater.end(losses[-1])
    _wait(device)
    seconds = (time.perf_counter() - began) / args.steps
    tokens = (image_size // 16) ** 2
    width = model.config.num_attention_heads * model.config.attention_head_dim
    flops = step_flops(model, tokens, text, adapter=adapter, checkpointing=checkpointing)
    paper = estimate(
        num_parameters=num_parameters, num_trained=sum(p.numel() for p in named.values()),
        optimizer=advice.optimizer, weights=advice.weights, fused=advice.fused_backward, width=width,
        num_blocks=model.config.num_layers + model.config.num_single_layers, tokens=tokens + text, batch=1,
        grad_checkpointing=checkpointing, adapter=adapter,
    )  # fmt: skip
    return {
        "model": size, "adapter": adapter, "image_size": image_size, "optimizer": advice.optimizer,
        "fused_backward": advice.fused_backward, "grad_checkpointing": checkpointing, "compile": args.compile,
        "parameters": num_parameters, "seconds_a_step": round(seconds, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_card else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_card else None,
        "estimated_gib": round(paper.total, 2), "tflop_a_step": round(flops / 1e12, 2),
        "share_of_peak": round(flops / seconds / 1e12 / args.peak_tflops, 3), "last_loss": losses[-1],
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of diffusers' example and of sdlab, on the same card with the same work."""
    size, few = args.image_size[0], 5
    with tempfile.TemporaryDirectory() as scratch:

        def peer(steps: int) -> float:
            return _timed(
                "accelerate", "launch", args.peer, "--pretrained_model_name_or_path", args.peer_model,
                "--instance_data_dir", ROOT / "images" / "red_fish" / "blue_background",
                "--instance_prompt", "red fish",
                "--output_dir", Path(scratch) / "peer", "--rank", RANK, "--lora_alpha", RANK, "--resolution", size,
                "--train_batch_size", 1, "--max_train_steps", steps, "--mixed_precision", "bf16", "--cache_latents",
                "--gradient_checkpointing", "--guidance_scale", 1, "--checkpointing_steps", 10**6,
            )  # fmt: skip

        def ours(steps: int) -> float:
            return _timed(
                sys.executable, "-m", "sdlab", "train-flux2", "--images", ROOT / "images",
                "--load-model", args.peer_model,
                "--save-model", Path(scratch) / "ours", "--overwrite", "--adapter", "lora", "--rank", RANK,
                "--image-size", size, "--batch", 1, "--steps", steps, "--save-every", 0, "--preview-every", 0,
            )  # fmt: skip

        ours(1)  # fills the cache, as its encoding is not compared
        seconds = {
            name: (run(few + args.steps) - run(few)) / args.steps
            for name, run in (("peer", peer), ("sdlab", ours))
        }
    return {"peer": Path(args.peer).name, "image_size": size, **{f"{k}_s_a_step": v for k, v in seconds.items()},
            "times_as_fast": round(seconds["peer"] / seconds["sdlab"], 2)}  # fmt: skip


def _timed(*command: object) -> float:
    began = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=("4b", "9b", "dev"), default=["4b", "9b", "dev"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--image-size", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument(
        "--peak-tflops", type=float, default=790.0, help="of the card in bf16, dense, as it really runs"
    )
    parser.add_argument("--peer", help="diffusers' examples/dreambooth/train_dreambooth_lora_flux2_klein.py")
    parser.add_argument("--peer-model", help="a klein pipeline folder for --peer")
    parser.add_argument("--record", type=Path, help="also append the lines to this file")
    args = parser.parse_args()
    jobs: list[Any] = [lambda: compare(args)] if args.peer else []
    if not args.peer:
        sizes = ["tiny"] if args.tiny else args.size
        jobs = [
            lambda s=s, a=a, px=px: measure(s, a, px, args)
            for s in sizes
            for a in WAYS[s]
            for px in args.image_size
        ]
    for job in jobs:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        card = (
            torch.cuda.get_device_name()
            if args.device == "cuda"
            else platform.processor() or platform.machine()
        )
        line = json.dumps({**job(), "device": card, "torch": torch.__version__})
        print(line, flush=True)
        if args.record:
            with args.record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
