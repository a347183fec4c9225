"""How many 12-megapixel JPEGs `sdlab crop` cuts in a second beside a plain Pillow loop, and where it looks.

    python benchmarks/crop.py [--pictures 36] [--workers 2] [--rounds 5] [--size 512] [--seeds 700]

The plain loop is what one writes at first: Image.open, exif_transpose, convert, crop, resize with LANCZOS, save, for
each picture, with as many threads (and, for the record, processes) and the same JPEG settings. The two programs
run in turn on the same drawn pictures, start-up not counted. Results are compared as they are in the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from sdlab.curate.crop import focus
from sdlab.curate.crop.results import Results
from sdlab.curate.crop.run import Settings, crop_pictures
from sdlab.curate.crop.sizes import Wanted
from sdlab.dataset import tree
from sdlab.dataset.picture import cover_box
from sdlab.testing.planted import photo, planted

QUALITY = 95
FIRST_SEED = 90_000  # not those that the method was made with


def draw(root: Path, count: int) -> None:
    """`count` JPEGs of 12 megapixels, four kinds over and over: upright and wide, one turned by EXIF."""
    turned = Image.Exif()
    turned[0x112] = 6
    firsts = []
    for number, size_px in enumerate([(3000, 4000), (4000, 3000), (3024, 4032), (3000, 4000)]):
        firsts.append(root / f"{number:03}.jpg")
        exif = turned if number == 3 else Image.Exif()
        photo(number, size_px).save(firsts[-1], quality=92, exif=exif)
    for number in range(len(firsts), count):
        shutil.copy(firsts[number % len(firsts)], root / f"{number:03}.jpg")


def plain(path: Path, output: Path, side: int) -> None:
    """One turn of the plain loop."""
    plain_pixels(path, side).save(output / path.name, quality=QUALITY, subsampling=0)


def plain_pixels(path: Path, side: int) -> Image.Image:
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def run_plain(pool: Executor, images: Path, output: Path, side: int) -> None:
    paths = sorted(images.iterdir())
    list(pool.map(plain, paths, [output] * len(paths), [side] * len(paths)))


def run_sdlab(images: Path, output: Path, side: int, look: str, workers: int) -> None:
    settings = Settings(Wanted(side_px=side), focus=look, quality=QUALITY)
    with Results(output) as results:
        results.begin(settings.as_json())
        crop_pictures(tree.scan(images), results, settings, max_pixels=64_000_000, num_workers=workers)


def timed(work: Callable[[Path], None], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one run into a new folder; those of child processes are not in the CPU seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work(folder)
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def speed(images: Path, scratch: Path, *, side: int, workers: int, rounds: int) -> None:
    """Print the medians of all programs, and their ratios."""
    count = len(list(images.iterdir()))
    with ThreadPoolExecutor(workers) as threads, ProcessPoolExecutor(workers) as processes:
        list(processes.map(abs, range(workers)))  # start them
        programs: dict[str, Callable[[Path], None]] = {
            "plain, threads": lambda folder: run_plain(threads, images, folder, side),
            "plain, processes": lambda folder: run_plain(processes, images, folder, side),
            "sdlab, center": lambda folder: run_sdlab(images, folder, side, "center", workers),
            "sdlab, saliency": lambda folder: run_sdlab(images, folder, side, "saliency", workers),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, work in programs.items():
                taken[name].append(timed(work, scratch / name))
    wall = {name: statistics.median(w for w, _ in times) for name, times in taken.items()}
    cpu = {name: statistics.median(c for _, c in times) for name, times in taken.items()}
    for name in programs:
        used = "" if "processes" in name else f"   CPU {cpu[name] / count * 1000:.0f} ms a picture"
        print(f"{name:17} {count / wall[name]:6.2f} pictures/s{used}")
    for name in ("sdlab, center", "sdlab, saliency"):
        best = min(wall["plain, threads"], wall["plain, processes"])
        print(
            f"{name}: {wall['plain, threads'] / wall[name]:.2f} x plain with threads, "
            f"{best / wall[name]:.2f} x the better plain; CPU {cpu['plain, threads'] / cpu[name]:.2f} x less"
        )
    pixels, jpegs = difference(images, scratch, side)
    print(
        f"mean absolute difference from the plain loop: {pixels:.2f} of 255; after both are JPEGs {jpegs:.2f}"
    )


def difference(images: Path, scratch: Path, side: int) -> tuple[float, float]:
    """Mean absolute difference of the results cut at the centre from those of the plain loop, in steps of 255.

    Of the pixels, that is of results written as PNG, and of the JPEGs, where the two are quantised apart.
    """
    few = scratch / "few"
    few.mkdir()
    paths = sorted(images.iterdir())[:4]
    for path in paths:
        os.link(path, few / path.name)
    settings = Settings(Wanted(side_px=side), focus="center", format="png")
    with Results(scratch / "exact") as results:
        results.begin(settings.as_json())
        crop_pictures(tree.scan(few), results, settings, max_pixels=64_000_000, num_workers=0)
    pixels = [apart(scratch / "exact" / f"{path.stem}.png", plain_pixels(path, side)) for path in paths]
    with_jpeg = [
        apart(scratch / "sdlab, center" / path.name, Image.open(scratch / "plain, threads" / path.name))
        for path in paths
    ]
    return float(np.mean(pixels)), float(np.mean(with_jpeg))


def apart(path: Path, other: Image.Image) -> float:
    with Image.open(path) as image, other:
        return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


def accuracy(num_seeds: int) -> None:
    """Print in how many drawn pictures the subject is wholly inside, by ground, and for the centre."""
    inside: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        one = planted(seed)
        picture_px = (one.image.height, one.image.width)
        size_px = (512, 512) if picture_px[0] != picture_px[1] else (624, 416)
        for look in ("saliency", "center"):
            place, _ = focus.place(one.image, picture_px, size_px, focus.looker(look))
            left, top, right, bottom = cover_box(picture_px, size_px, place)
            x0, y0, x1, y1 = one.box
            inside[f"{look} {one.ground}"] += left <= x0 and top <= y0 and x1 <= right and y1 <= bottom
            total[f"{look} {one.ground}"] += 1
    for look in ("saliency", "center"):
        each = [f"{key.split()[1]} {inside[key] / total[key]:.1%}" for key in total if key.startswith(look)]
        all_ = sum(n for key, n in inside.items() if key.startswith(look)) / num_seeds
        print(f"{look:9} {all_:.1%} of {num_seeds} subjects wholly inside: {', '.join(each)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=36)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=700, help="drawn pictures for the accuracy; 0 for none")
    options = parser.parse_args()
    print(
        f"{options.pictures} pictures of 12 megapixels to {options.size} x {options.size}, {options.workers} "
        f"workers, {options.rounds} rounds in turn, Python {sys.version.split()[0]}, Pillow {PIL.__version__}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")
        images.mkdir()
        draw(images, options.pictures)
        speed(images, Path(scratch), side=options.size, workers=options.workers, rounds=options.rounds)
    if options.seeds:
        accuracy(options.seeds)


if __name__ == "__main__":
    main()
