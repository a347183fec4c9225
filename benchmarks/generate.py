"""How many pictures a second `sdlab generate` makes on this computer's CPU, beside a plain loop over diffusers' pipe().

    python benchmarks/generate.py [--rounds 3] [--num 24] [--steps 20] [--batches 1 4 8] [--out FILE]

The same model (mini-sd), prompts, seeds, steps, guidance and size, each job in a process of its own, in turn; PNG files
are written by all. "job" is the time from the first step to the last file, "process" all of it with start-up and
loading. Every job has torch's own number of threads. The pictures are compared: they must be the same picture.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SEED, GUIDANCE, SIDE_PX = 11, 7.0, 128
COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("star", "circle", "square", "fish", "heart", "moon")
SUMMARY = re.compile(r"(\d+) pictures? in ([\d.]+) s")

PLAIN_LOOP = """
import sys, time
import torch
from diffusers import StableDiffusionPipeline
model, prompts, folder, steps, guidance, side, seed = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
begun = time.perf_counter()
lines = open(prompts).read().splitlines()
for i, prompt in enumerate(lines):
    generator = torch.Generator().manual_seed(int(seed) + i)
    picture = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), width=int(side),
                   height=int(side), generator=generator).images[0]
    picture.save(f"{folder}/{i:04}.png")
print(f"{len(lines)} pictures in {time.perf_counter() - begun} s", file=sys.stderr)
"""


@dataclass(frozen=True)
class Taken:
    """What one process took to make its pictures."""

    job_s: float
    process_s: float
    cpu_s: float
    peak_mb: float
    pictures: list[Path]


def run(command: Sequence[str], folder: Path) -> Taken:
    """Run to the end. Raises RuntimeError, with what it said, if it does not end well or tells no time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    folder.mkdir()
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**environment, "HF_HUB_OFFLINE": "1"}
        )
        _, status, used = os.wait4(process.pid, 0)
        process_s = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    found = SUMMARY.search(text)
    if process.returncode or found is None:
        raise RuntimeError(f"{command[:4]} ended with {process.returncode}:\n{text[-2000:]}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    cpu_s = used.ru_utime + used.ru_stime
    return Taken(float(found[2]), process_s, cpu_s, peak, sorted(folder.glob("*.png")))


def commands(prompts: Path, *, steps: int, batches: Sequence[int]) -> dict[str, list[str]]:
    """By name; each takes the folder for its pictures as {folder}."""
    from sdlab.models.resolve import resolve

    model = str(resolve("mini-sd", training=False).path)
    numbers = (str(steps), str(GUIDANCE), str(SIDE_PX), str(SEED))
    made = {
        "diffusers, `pipe()` in a loop": [
            sys.executable,
            "-c",
            PLAIN_LOOP,
            model,
            str(prompts),
            "{folder}",
            *numbers,
        ]
    }
    ours = f"-m sdlab generate --load-model mini-sd --no-prefix --steps {steps} --guidance {GUIDANCE}"
    ours += f" --image-size {SIDE_PX} --seed {SEED} --device cpu"
    for batch in batches:
        own = ["--prompt-file", str(prompts), "--output", "{folder}", "--batch", str(batch)]
        made[f"`sdlab generate --batch {batch}`"] = [sys.executable, *ours.split(), *own]
    return made


def difference(some: Taken, others: Taken) -> int:
    """Of the two jobs' pictures in turn, the largest of any pixel, of 255."""
    assert len(some.pictures) == len(others.pictures) > 0, (len(some.pictures), len(others.pictures))
    pairs = zip(some.pictures, others.pictures, strict=True)
    return max(int(np.abs(_pixels(one) - _pixels(other)).max()) for one, other in pairs)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def table(taken: dict[str, list[Taken]], num: int) -> list[str]:
    """The lines of a table, the first job being what the others are compared with, round by round."""
    base, *_ = taken.values()
    lines = [
        "| job | s a picture, min / median | pictures/s | times the loop, min / median "
        "| process | CPU | peak RSS | pixels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rounds in taken.items():
        each = [one.job_s / num for one in rounds]
        ratios = [loop.job_s / one.job_s for loop, one in zip(base, rounds, strict=True)]
        middle = statistics.median(each)
        lines.append(
            f"| {name} | {min(each):.3f} / {middle:.3f} | {1 / middle:.2f} "
            f"| {min(ratios):.2f} / {statistics.median(ratios):.2f} "
            f"| {statistics.median(one.process_s for one in rounds):.1f} s "
            f"| {statistics.median(one.cpu_s for one in rounds):.1f} s "
            f"| {max(one.peak_mb for one in rounds):.0f} MB "
            f"| {max(difference(one, loop) for one, loop in zip(rounds, base, strict=True))}/255 |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    prompts = [
        f"{COLOURS[i % 4]} {SHAPES[i % 6]} on {COLOURS[(i + 1 + i // 4) % 4]}" for i in range(options.num)
    ]
    with tempfile.TemporaryDirectory(prefix="sdlab-generate-") as scratch:
        file = Path(scratch, "prompts.txt")
        file.write_text("\n".join(prompts) + "\n")
        jobs = commands(file, steps=options.steps, batches=options.batches)
        taken: dict[str, list[Taken]] = {name: [] for name in jobs}
        for number in range(options.rounds):
            for name, command in jobs.items():
                folder = Path(scratch, f"{len(taken[name])}-{list(jobs).index(name)}")
                taken[name].append(run([part.replace("{folder}", str(folder)) for part in command], folder))
                print(f"round {number + 1}: {name}: {taken[name][-1].job_s:.1f} s", file=sys.stderr)
        lines = table(taken, options.num)
    load = f"load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else "load unknown"
    lines += [
        "",
        f"mini-sd, {SIDE_PX} px, {options.num} pictures of {options.steps} steps, {options.rounds} rounds in turn",
    ]
    lines[-1] += f"; {os.cpu_count()} cores, {load}, Python {sys.version.split()[0]}."
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
