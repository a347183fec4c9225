"""Seconds a picture on a CUDA card: diffusers' own pipeline beside sdlab's engine, Stable Diffusion 1.5, 512x512.

    python benchmarks/cuda_generate.py [--out FILE.json] [--limit-s 480] [--rounds 2]
    python benchmarks/cuda_generate.py --tiny      the same on the CPU with a tiny model: does it run?

The weights are random: they take the same time, and show nothing. Each line is a model loaded anew; one short run comes
first and is not counted (what is compiled is compiled there, "to start"). The lines that matter most come first, and
none is begun after --limit-s. Prints a table; --out writes it as JSON too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the builders of models that the tests use

PROMPT, NEGATIVE, GUIDANCE, WARM_STEPS = "a red star on a blue ground", "ugly", 7.5, 3
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Draw = Callable[[int], None]  # makes one batch of pictures in so many steps


@dataclass(frozen=True)
class Case:
    """One way of making pictures."""

    who: str  # diffusers or sdlab
    dtype: str
    batch: int
    steps: int = 50
    compile: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Timed:
    """What a picture took."""

    case: Case
    start_s: float  # loading, and the short run that is not counted
    picture_s: list[float]  # of each round
    peak_mb: float | None  # of the card's memory

    @property
    def best_s(self) -> float:
        return min(self.picture_s)


def cases() -> Iterator[Case]:
    """The most important first."""
    yield Case("diffusers", "fp32", 1)
    yield Case("diffusers", "fp16", 1)
    for dtype in ("bf16", "fp16"):
        for batch in (1, 4, 8):
            yield Case("sdlab", dtype, batch)
    for batch in (1, 8):
        yield Case("sdlab", "bf16", batch, channels_last=True)
        yield Case("sdlab", "bf16", batch, compile=True)
    yield Case("diffusers", "fp16", 8)
    for one in (Case("diffusers", "fp32", 1), Case("diffusers", "fp16", 1), Case("sdlab", "bf16", 8)):
        yield Case(one.who, one.dtype, one.batch, steps=30)
    yield Case("sdlab", "bf16", 4, compile=True)
    for dtype, batch in (("fp16", 1), ("fp16", 8), ("bf16", 4)):
        yield Case("sdlab", dtype, batch, channels_last=True)
    yield Case("sdlab", "bf16", 8, compile=True, channels_last=True)
    yield Case("sdlab", "fp16", 8, compile=True)


def drawn_by(case: Case, folder: Path, device: torch.device, side_px: int) -> Draw:
    """The model, loaded."""
    return (_diffusers if case.who == "diffusers" else _sdlab)(case, folder, device, side_px)


def _diffusers(case: Case, folder: Path, device: torch.device, side_px: int) -> Draw:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=TYPES[case.dtype], local_files_only=True).to(
        device
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> None:
        pictures = pipe(
            [PROMPT] * case.batch,
            negative_prompt=[NEGATIVE] * case.batch,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            width=side_px,
            height=side_px,
            generator=[torch.Generator().manual_seed(i) for i in range(case.batch)],
        ).images
        assert len(pictures) == case.batch

    return draw


def _sdlab(case: Case, folder: Path, device: torch.device, side_px: int) -> Draw:
    from sdlab.inference import load
    from sdlab.inference.identity import Hasher
    from sdlab.inference.spec import Shot, Spec

    chosen = load.choose(load.Asked(str(folder)), tuned=folder / "none", hasher=Hasher())
    running = load.Running(device=str(device), dtype=case.dtype, compile=case.compile)
    sampler = load.load(load.open_chosen(chosen), running, prompts=[PROMPT, NEGATIVE]).sampler
    if case.channels_last:
        sampler.pipeline.unet.to(memory_format=torch.channels_last)
        sampler.pipeline.vae.to(memory_format=torch.channels_last)
    shots = [Shot(i, PROMPT, "", NEGATIVE, i) for i in range(case.batch)]

    def draw(steps: int) -> None:
        made = sampler.sample(shots, Spec(steps, GUIDANCE, side_px, side_px))
        assert all(one.image is not None or "blank" in one.fault for one in made), made  # random weights

    return draw


def timed(case: Case, folder: Path, device: torch.device, *, side_px: int, rounds: int) -> Timed:
    """Load, run shortly, then measure; everything is freed afterwards."""
    on_card = device.type == "cuda"
    begun = time.perf_counter()
    draw = drawn_by(case, folder, device, side_px)
    draw(min(WARM_STEPS, case.steps))
    start_s = time.perf_counter() - begun
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    picture_s = [_seconds(draw, case.steps, device) / case.batch for _ in range(rounds)]
    peak_mb = torch.cuda.max_memory_allocated(device) / 1e6 if on_card else None
    del draw
    gc.collect()
    if on_card:
        torch.cuda.empty_cache()
    return Timed(case, start_s, picture_s, peak_mb)


def _seconds(draw: Draw, steps: int, device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    draw(steps)
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(done: list[Timed]) -> list[str]:
    """Its lines; "times" are of diffusers' float32 and float16, one picture at a time, with as many steps."""
    base = {
        (one.case.dtype, one.case.steps): one.best_s
        for one in done
        if (one.case.who, one.case.batch) == ("diffusers", 1)
    }
    lines = [
        "| | type | batch | steps | compiled | channels last | s a picture | times fp32 | times fp16 "
        "| to start | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in done:
        case = one.case
        times = [
            f"{base[dtype, case.steps] / one.best_s:.2f}" if (dtype, case.steps) in base else "-"
            for dtype in ("fp32", "fp16")
        ]
        marks = ["yes" if mark else "" for mark in (case.compile, case.channels_last)]
        peak = "-" if one.peak_mb is None else f"{one.peak_mb:,.0f} MB"
        cells = [case.who, case.dtype, case.batch, case.steps, *marks, f"{one.best_s:.3f}", *times]
        lines.append(f"| {' | '.join(map(str, cells))} | {one.start_s:.1f} s | {peak} |")
    return lines


def build(folder: Path, *, tiny: bool) -> Path:
    """A Stable Diffusion folder with random weights."""
    if tiny:
        from tests.factories import tiny_sd

        return tiny_sd(folder)
    from tests.convert.full_size import random_sd

    return random_sd(folder)


def measure(
    folder: Path, device: torch.device, *, tiny: bool, rounds: int, limit_s: float
) -> tuple[list[Timed], list[Case]]:
    """What was measured, and what there was no time for."""
    wanted = list(cases())
    if tiny:
        wanted = list(dict.fromkeys(replace(one, steps=2) for one in wanted if not one.compile))
    begun, done = time.perf_counter(), []
    for case in wanted:
        if time.perf_counter() - begun > limit_s:
            break
        done.append(timed(case, folder, device, side_px=32 if tiny else 512, rounds=rounds))
        print(f"{case}: {done[-1].best_s:.3f} s a picture", file=sys.stderr, flush=True)
    return done, wanted[len(done) :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, two steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=480)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("there is no CUDA card here; --tiny runs on the CPU")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="sdlab-cuda-") as scratch:
        model = build(Path(scratch, "model"), tiny=options.tiny)
        done, left_out = measure(
            model, device, tiny=options.tiny, rounds=options.rounds, limit_s=options.limit_s
        )
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, tiny: no numbers to quote"
    )
    print("\n".join([f"{name}, torch {torch.__version__}", "", *table(done)]))
    if left_out:
        print(f"\nNo time for {len(left_out)}: {'; '.join(map(str, left_out))}")
    if options.out:
        about = {"device": name, "torch": torch.__version__, "timed": [asdict(one) for one in done]}
        options.out.write_text(json.dumps({**about, "left_out": [asdict(one) for one in left_out]}, indent=1))


if __name__ == "__main__":
    main()
