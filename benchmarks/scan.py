"""How long `sdlab.dataset.tree.scan` takes beside a bare os.scandir walk with stat of the same tree.

    python benchmarks/scan.py [--pictures 100000] [--folders 1000] [--captions 0] [--rounds 7]

Makes the tree in a temporary folder, runs both in turn, and prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sdlab.dataset import tree

PICTURE = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def make_tree(root: Path, *, pictures: int, folders: int, captions: int) -> None:
    """`folders` leaf folders in a tree two levels deep, the pictures spread over them evenly."""
    for number in range(folders):
        folder = root / f"group_{number % 20:02}" / f"a_prompt_{number:04}"
        folder.mkdir(parents=True)
        for index in range(number, pictures, folders):
            (folder / f"picture_{index:06}.png").write_bytes(PICTURE)
            if index < captions:
                (folder / f"picture_{index:06}.cap").write_text("a caption of its own\n")


def floor(root: str) -> int:
    """The bare walk: os.scandir of every folder, stat of every file."""
    count, waiting = 0, [root]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def scan(root: str) -> int:
    """What sdlab does."""
    return tree.scan(root).num_files


def timed(work: Callable[[str], int], root: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work(root)
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--captions", type=int, default=0, help="pictures with a caption file of their own")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_tree(Path(root), pictures=options.pictures, folders=options.folders, captions=options.captions)
        assert floor(root) == scan(root)
        taken: dict[str, list[tuple[float, float]]] = {"floor": [], "scan": []}
        for _ in range(options.rounds):
            for name, work in (("floor", floor), ("scan", scan)):
                taken[name].append(timed(work, root))
    print(
        f"{options.pictures} pictures in {options.folders} folders, {options.captions} captions, "
        f"{options.rounds} rounds in turn, Python {sys.version.split()[0]}"
    )
    median = {name: [statistics.median(t[i] for t in times) for i in (0, 1)] for name, times in taken.items()}
    for name, (wall_s, cpu_s) in median.items():
        print(f"{name:6} wall {wall_s:.3f} s   CPU {cpu_s:.3f} s   (medians)")
    print(
        "ratio  "
        + "   ".join(
            f"{what} {median['scan'][i] / median['floor'][i]:.2f}" for i, what in ((0, "wall"), (1, "CPU"))
        )
    )


if __name__ == "__main__":
    main()
