"""Kills `sdlab categorize` at random moments, undoes it, and compares the tree with the one before.

python benchmarks/kill.py [--times 50] [--pictures 60]

One half of the kills fall anywhere in the run, the other half while files are copied, linked or moved. Exits with 1
if a single byte, name or link differs once.
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

from sdlab.testing.scenes import draw, generator, prompt_of, random_scene

MODES = ("copy", "hardlink", "move")
JOURNAL = ".sdlab-journal.jsonl"


def heap(root: Path, num: int) -> None:
    """Drawn scenes in a few folders, a third of them with a caption, one in ten with a reference."""
    for i in range(num):
        scene = random_scene(generator(11, "kill", i))
        path = root / f"camera_{i % 3}" / f"IMG_{i // 2:04d}{'.png' if i % 2 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(scene, (96, 128)).save(path)
        if i % 3 == 0:
            path.with_suffix(".cap").write_text(f"# mine\n{prompt_of(scene, 'photo')}\n", encoding="utf-8")
        if i % 10 == 0:
            draw(scene, (96, 128)).save(path.with_suffix(".ref.png"))


def tree_hash(root: Path) -> str:
    """One hash of every name and every byte below `root`, folders and empty folders included."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.is_dir()}\0".encode())
        digest.update(b"" if path.is_dir() else hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "sdlab", "categorize", *map(str, args)]


def start(*args: object) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.0005)


def full_run(work: list[object], journal: Path) -> tuple[float, float]:
    """Seconds of a whole run, and of the part from its journal's first sight to its end."""
    begun = time.monotonic()
    process = start(*work)
    wait_for(journal, process)
    acting = time.monotonic()
    if process.wait() != 0:
        raise SystemExit("the run did not end well")
    return time.monotonic() - begun, time.monotonic() - acting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=60)
    args = parser.parse_args()
    rng = random.Random(5)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "place"
        heap(place / "raw", args.pictures)
        before = tree_hash(place)
        out, differing, acting = place / "__raw", 0, 0
        for number in range(args.times):
            mode = MODES[number % 3]
            work: list[object] = [place / "raw", "--organize", "--caption", "--captions", "append", "--sheet",
                                  "--mode", mode, "--cache-dir", Path(scratch) / "cache"]  # fmt: skip
            if number < 3:
                whole_s, acting_s = full_run(work, out / JOURNAL)
                subprocess.run(command("--undo", out), check=True, capture_output=True)
                if tree_hash(place) != before:
                    raise SystemExit(f"undoing a whole run with --mode {mode} left another tree")
            process = start(*work)
            if number % 2:
                wait_for(out / JOURNAL, process)
                time.sleep(rng.uniform(0, 1.1 * acting_s))
            else:
                time.sleep(rng.uniform(0, whole_s))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            acting += out.exists()
            if out.exists():
                subprocess.run(command("--undo", out), check=True, capture_output=True)
            differing += tree_hash(place) != before
    print(
        f"{args.times} kills, {acting} of them after the first file; {differing} trees differed after --undo"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
