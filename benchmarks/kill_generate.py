"""Kills a job of `sdlab generate` at random moments, again and again until it ends, and compares the pictures.

python benchmarks/kill_generate.py [--kills 50] [--pictures 20] [--batch 2]

One half of the kills fall anywhere after the start, the other half while pictures are drawn. Each killed job is begun
again by the same command; when it has ended, its pictures must be those of a job that nobody killed, pixel for pixel,
none twice. Exits with 1 if they are not, once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

COLOURS, SHAPES = ("red", "blue", "green", "yellow", "white"), ("star", "circle", "square", "triangle")


def prompts(num: int) -> str:
    """A line for each picture, some with settings of their own, so that not all can share a batch."""
    lines = [f"{COLOURS[i % 5]} {SHAPES[i // 5 % 4]}" for i in range(num)]
    return "\n".join(line + (" --steps 4" if i % 4 == 3 else "") for i, line in enumerate(lines))


def pixels(folder: Path) -> list[str]:
    """Hash of each picture's pixels, in the order of the job."""
    hashes = []
    for path in sorted(folder.glob("sd_*.png")):
        with Image.open(path) as picture:
            hashes.append(hashlib.sha256(picture.tobytes()).hexdigest())
    return hashes


def start(scratch: Path, output: str, batch: int) -> subprocess.Popen[bytes]:
    """The job in a process group of its own."""
    command = [sys.executable, "-m", "sdlab", "generate", "--load-model", "mini-sd", "--prompt-file", "prompts.txt",
               "--steps", "3", "--seed", "11", "--batch", str(batch), "--output", output]  # fmt: skip
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=scratch, stdout=silent, stderr=silent, start_new_session=True)


def wait_for_picture(folder: Path, before: int, process: subprocess.Popen[bytes]) -> None:
    while len(list(folder.glob("sd_*.png"))) == before and process.poll() is None:
        time.sleep(0.002)


def killed(scratch: Path, output: str, batch: int, rng: random.Random, whole_s: float, num: int) -> bool:
    """Begin the job and kill it; False if it was quicker."""
    folder = scratch / output
    before = len(list(folder.glob("sd_*.png")))
    process = start(scratch, output, batch)
    if num % 2:
        wait_for_picture(folder, before, process)
        time.sleep(rng.uniform(0, 0.1 * whole_s))
    else:
        time.sleep(rng.uniform(0, whole_s))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    rng = random.Random(3)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    num_kills = num_jobs = num_midway = num_differing = 0
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        (scratch / "prompts.txt").write_text(prompts(args.pictures))
        began = time.monotonic()
        if start(scratch, "whole", args.batch).wait() != 0:
            raise SystemExit("the job did not end well")
        whole_s, wanted = time.monotonic() - began, pixels(scratch / "whole")
        while num_kills < args.kills:
            output, num_jobs = f"cut{num_jobs}", num_jobs + 1
            while num_kills < args.kills and killed(scratch, output, args.batch, rng, whole_s, num_kills):
                num_kills += 1
                num_midway += 0 < len(list((scratch / output).glob("sd_*.png"))) < args.pictures
            code = start(
                scratch, output, args.batch
            ).wait()  # one that has ended is not begun again, but done anew
            made = pixels(scratch / output)
            good = code == 0 and made[: len(wanted)] == wanted and len(made) % len(wanted) == 0
            num_differing += not good
    print(
        f"{num_kills} kills in {num_jobs} jobs of {args.pictures} pictures, {num_midway} with some of them made; "
        f"{num_differing} jobs ended with other pictures than an uninterrupted one"
    )
    return 1 if num_differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
