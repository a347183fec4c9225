"""The memory table of docs/flux2.md: the estimate that train-flux2 prints, for each size and way of training.

python benchmarks/flux2_memory.py        computed from the models' shapes, on any computer; nothing is loaded
"""

from __future__ import annotations

from dataclasses import dataclass

from sdlab.training.estimate import estimate

TEXT_TOKENS, RANK = 512, 16


@dataclass(frozen=True)
class Size:
    """A transformer's shape. Parameters counted on the meta device from diffusers' configurations."""

    name: str
    num_parameters: int
    width: int
    num_blocks: int
    num_lora: int  # of rank 16 on every linear layer of the blocks


SIZES = (
    Size("klein 4B", 3_875_544_576, 3072, 25, 24_084_480),
    Size("klein 9B", 9_078_581_248, 4096, 32, 43_515_904),
    Size("dev 32B", 32_223_281_152, 6144, 56, 100_663_296),
)
WAYS = (
    ("full, adamw, float32 weights", "full", "adamw", "fp32", False),
    ("full, adamw8bit, bf16 weights", "full", "adamw8bit", "bf16", False),
    ("full, adamw8bit, bf16 weights, fused backward", "full", "adamw8bit", "bf16", True),
    ("full, adafactor, bf16 weights, fused backward (the default)", "full", "adafactor", "bf16", True),
    ("LoRA of rank 16 (the default)", "lora", "adamw", "bf16", False),
)


def gib(size: Size, adapter: str, optimizer: str, weights: str, fused: bool, image_size: int) -> float:
    """Peak GiB with gradient checkpointing and a batch of one."""
    return estimate(
        num_parameters=size.num_parameters,
        num_trained=size.num_lora if adapter == "lora" else size.num_parameters,
        optimizer=optimizer, weights=weights, fused=fused, width=size.width, num_blocks=size.num_blocks,
        tokens=(image_size // 16) ** 2 + TEXT_TOKENS, batch=1, grad_checkpointing=True, adapter=adapter,
    ).total  # fmt: skip


def main() -> None:
    print("| GiB at 512 / 1024 px | " + " | ".join(size.name for size in SIZES) + " |")
    print("| --- |" + " --- |" * len(SIZES))
    for title, *way in WAYS:
        cells = [f"{gib(size, *way, 512):.0f} / {gib(size, *way, 1024):.0f}" for size in SIZES]
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
