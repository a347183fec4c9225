"""How long `sdlab categorize --organize --caption` takes over a thousand pictures, and the same again.

python benchmarks/categorize.py [--pictures 1000]

The pictures are drawn scenes of 512 to 1024 pixels, three in four of them JPEG. "again" is the same command over the
same folder: the captioner is asked nothing and no file is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from sdlab.testing.scenes import draw, generator, random_scene


def draw_one(number: int, *, root: Path) -> None:
    rng = generator(13, "benchmark", number)
    size = tuple(int(side) for side in rng.integers(512, 1025, 2))
    path = root / f"{number // 250}" / f"IMG_{number:04d}{'.png' if number % 4 == 3 else '.jpg'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(random_scene(rng), size).save(path)


def timed(*args: object) -> tuple[float, float, dict[str, Any]]:
    """Wall and processor seconds of a command, and its JSON."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    made = subprocess.run(
        [sys.executable, "-m", "sdlab", "categorize", *map(str, args), "--json"],
        check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    wall_s, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, json.loads(made.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    num = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "heap"
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(draw_one, root=root), range(num), chunksize=16))
        for what in ("first", "again"):
            wall_s, cpu_s, summary = timed(root, "--organize", "--caption")
            asked = summary["counts"]["asked"]
            print(f"{what}: {wall_s:.1f} s, {num / wall_s:.0f} pictures/s, {cpu_s:.1f} s of processors, "
                  f"the captioner was asked for {asked}")  # fmt: skip


if __name__ == "__main__":
    main()
