"""Kills `sdlab convert` at random moments: under the final name there is nothing, or the whole right file.

    python benchmarks/convert_kill.py [--times 50] [--seed 5]

The model is a VAE of full size with random weights (335 MB in fp32), written as it is and, every other time, as fp16.
Of the kills one half fall anywhere in a run, the other half between the first byte of the file and its name. In the end
one run sweeps away what they left, and finishes. Exits with 1 if anything else is found once.
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

ROOT = Path(__file__).parents[1]
PARTS = ".*.sdlab-part"


def random_vae(folder: Path) -> None:
    """The folder of a VAE: 83.7 million numbers in fp32."""
    import torch

    sys.path.insert(0, str(ROOT))  # for the builder of models that the tests use
    from tests.convert.full_size import drawn_part

    from sdlab.models.bases import CONFIGS
    from sdlab.models.files import read_json, write_safetensors

    folder.mkdir()
    config = (CONFIGS / "sd15" / "vae" / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    about = read_json(folder / "config.json")
    tensors = drawn_part("AutoencoderKL", about, seed=0, dtype=torch.float32, where=folder)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def start(source: Path, target: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    command = [sys.executable, "-m", "sdlab", "convert", "--model-path", source, "--checkpoint-path", target]
    return subprocess.Popen(
        [*map(str, command), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_part(folder: Path, process: subprocess.Popen[bytes], earlier: set[Path]) -> None:
    """Until a file is being written that is none of `earlier`, or the process has ended."""
    while process.poll() is None and not set(folder.glob(PARTS)) - earlier:
        time.sleep(0.0005)


def whole_run(source: Path, target: Path, flags: list[str]) -> tuple[float, float, str]:
    """Seconds of a whole run, those from the file's first byte to its name, and the file's hash; it is removed."""
    begun = time.monotonic()
    process = start(source, target, flags)
    wait_for_part(target.parent, process, set())
    writing = time.monotonic()
    while process.poll() is None and not target.exists():
        time.sleep(0.0005)
    ended = time.monotonic()
    if process.wait() != 0:
        raise SystemExit("the run did not end well")
    right = sha256(target)
    target.unlink()
    return ended - begun, ended - writing, right


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "vae", Path(scratch) / "out" / "vae.safetensors"
        target.parent.mkdir()
        random_vae(source)
        kinds = [(flags, *whole_run(source, target, flags)) for flags in ([], ["--half"])]
        nothing = whole = wrong = parts = 0
        for number in range(args.times):
            flags, whole_s, writing_s, right = kinds[number % 2]
            share = rng.random()
            earlier = set(target.parent.glob(PARTS))
            process = start(source, target, flags)
            if number // 2 % 2:
                wait_for_part(target.parent, process, earlier)
                time.sleep(share * writing_s)
            else:
                time.sleep(share * whole_s)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            parts += bool(set(target.parent.glob(PARTS)) - earlier)
            if not target.exists():
                nothing += 1
            elif sha256(target) == right:
                whole += 1
            else:
                wrong += 1
            target.unlink(missing_ok=True)
        ended = start(source, target, []).wait()
        left = sorted(path.name for path in target.parent.iterdir())
        good = ended == 0 and left == [target.name] and sha256(target) == kinds[0][3]
    print(
        f"{args.times} kills, {parts} of them while the file was written: {nothing} times nothing under the name, "
        f"{whole} times the whole file, {wrong} times something else; the run after them "
        + ("swept up and finished" if good else f"ended with {ended} and left {left}")
    )
    return 0 if good and not wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
