"""How long `sdlab convert` takes and how much memory, beside `cp` of the same bytes and diffusers' own script.

    python benchmarks/convert.py [--rounds 5] [--script convert_diffusers_to_original_stable_diffusion.py] [--out FILE]
    python benchmarks/convert.py --klein

Builds a Stable Diffusion 1.5 of full size with random weights, in fp16 (2.1 GB) and fp32 (4.3 GB); --scratch keeps
them. All that is read is in the cache of the system; the runs follow each other in turn. The script is in the repo
of diffusers, not in its package. --klein: a transformer of the size of FLUX.2 klein 4B (7.75 GB), there and back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the builders of models that the tests use

STAGES = """
import json, sys, time
from sdlab import cli
from sdlab.convert import stream
marks = [("start-up, imports, names and shapes", float(sys.argv[1]))]
def marked(name, does):
    def timed(*args, **kwargs):
        marks.append((name, time.time()))
        return does(*args, **kwargs)
    return timed
stream._fill = marked("writing, with the hash of the source", stream._fill)
stream._sync_and_read_back = marked("reading back, with the hash of the file", stream._sync_and_read_back)
stream.name = marked("the rest", stream.name)
try:
    cli.main(sys.argv[2:])
finally:
    marks.append(("", time.time()))
    print(json.dumps([(a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:])]), file=sys.stderr)
"""


@dataclass(frozen=True)
class Taken:
    """What one process took, with those that it waited for."""

    wall_s: float
    cpu_s: float
    peak_mb: float


SAME_WORK = (  # what convert does beside copying: compare every byte, hash the file and the tensors in it
    "cp '{0}' '{1}' && sync '{1}' && cmp '{0}' '{1}' && sha256sum '{1}' && tail -c +150000 '{1}' | sha256sum"
)


@dataclass(frozen=True)
class Job:
    """A command that makes `makes`, which is removed after it."""

    name: str
    command: list[str]
    makes: Path


def run(command: list[str]) -> Taken:
    """Run to the end. Raises RuntimeError, with what it said, if it does not end well."""
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command}: {said.read().decode(errors='replace')[-2000:]}")
    return Taken(wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def convert(source: Path, target: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sdlab", "convert", "--model-path", str(source),
            "--checkpoint-path", str(target), *more]  # fmt: skip


def warm(folder: Path) -> None:
    """Read all weights, so that they are in the system's cache."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def remove(path: Path) -> None:
    """Remove a file or folder; nothing is left to be written when the next job begins."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()


def in_turn(jobs: list[Job], rounds: int) -> dict[str, list[Taken]]:
    """Every job once a round, after one round that does not count."""
    taken: dict[str, list[Taken]] = {job.name: [] for job in jobs}
    for number in range(rounds + 1):
        for job in jobs:
            one = run(job.command)
            remove(job.makes)
            if number:
                taken[job.name].append(one)
            print(f"  round {number}: {job.name}: {one.wall_s:.2f} s", file=sys.stderr)
    return taken


def table(taken: dict[str, list[Taken]], *, floors: tuple[str, str]) -> Iterator[str]:
    """A Markdown table: the least and the median wall time, processor time, memory, and the medians' ratios."""

    def median(name: str, what: Callable[[Taken], float]) -> float:
        return statistics.median(what(one) for one in taken[name])

    yield f"| job | wall min / median | CPU | peak RSS | of {floors[0]} | of {floors[1]} |"
    yield "| --- | --- | --- | --- | --- | --- |"
    walls = {name: median(name, lambda one: one.wall_s) for name in taken}
    for name, runs in taken.items():
        least, cpu_s = min(one.wall_s for one in runs), median(name, lambda one: one.cpu_s)
        ratios = " | ".join(f"{walls[name] / walls[floor]:.2f}" for floor in floors)
        peak_mb = max(one.peak_mb for one in runs)
        yield f"| {name} | {least:.2f} / {walls[name]:.2f} s | {cpu_s:.1f} s | {peak_mb:,.0f} MB | {ratios} |"


def stages(command: list[str], makes: Path) -> str:
    """Where the time of one run goes, in words."""
    arguments = command[command.index("convert") :]
    whole = [sys.executable, "-c", STAGES, repr(time.time()), *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=True)
    remove(makes)
    parts = json.loads(done.stderr.splitlines()[-1])
    total_s = sum(seconds for _, seconds in parts)
    return ", ".join(f"{name} {seconds:.2f} s ({seconds / total_s:.0%})" for name, seconds in parts)


def sd15(args: argparse.Namespace, scratch: Path) -> list[str]:
    """The lines of the report on Stable Diffusion 1.5."""
    folders = [args.folder or scratch / "sd15-fp16", args.folder_fp32 or scratch / "sd15-fp32"]
    for folder, word in zip(folders, ("float16", "float32"), strict=True):
        if not folder.exists():
            import torch
            from tests.convert.full_size import random_sd

            print(f"building {folder}", file=sys.stderr)
            random_sd(folder, dtype=getattr(torch, word))
    fp16, fp32 = folders
    made, copied, theirs = scratch / "made.safetensors", scratch / "copied", scratch / "theirs.safetensors"
    source = scratch / "source.safetensors"
    remove(source)
    run(convert(fp16, source))
    jobs = [
        Job("`cp`", ["cp", str(source), str(copied)], copied),
        Job("`cp`, `sync`", ["sh", "-c", f"cp '{source}' '{copied}' && sync '{copied}'"], copied),
        Job("`cp`, `sync`, `cmp`, two `sha256sum`", ["sh", "-c", SAME_WORK.format(source, copied)], copied),
        Job("`sdlab convert`, fp16", convert(fp16, made), made),
        Job("`sdlab convert --half`, from fp32", convert(fp32, made, "--half"), made),
    ]
    if args.script:
        for folder, flags in ((fp16, []), (fp32, ["--half"])):
            name = f"diffusers' script, {'from fp32' if flags else 'fp16'}"
            command = [sys.executable, str(args.script), "--model_path", str(folder), "--checkpoint_path",
                       str(theirs), "--use_safetensors", *flags]  # fmt: skip
            jobs.append(Job(name, command, theirs))
    for folder in (*folders, scratch):
        warm(folder)
    size = source.stat().st_size
    return [
        f"Stable Diffusion 1.5, random weights: {size:,} bytes written by each job, {args.rounds} rounds in turn.",
        "",
        *table(in_turn(jobs, args.rounds), floors=("`cp`", "`cp`, `sync`")),
        "",
        *(f"{job.name}: {stages(job.command, job.makes)}." for job in jobs if "sdlab" in job.name),
    ]


def klein(args: argparse.Namespace, scratch: Path) -> list[str]:
    """The lines of the report on a FLUX.2 transformer there and back. Raises SystemExit if a tensor differs."""
    import torch
    from tests.convert.full_size import random_flux2_transformer

    from sdlab.models.files import read_header

    source = scratch / "klein"
    if not source.exists():
        print(f"building {source}", file=sys.stderr)
        random_flux2_transformer(source)
    file, back = scratch / "klein.safetensors", scratch / "back"
    for path in (file, back):
        remove(path)
    warm(source)
    there, again = run(convert(source, file)), run(convert(file, back))
    one, other = (next(path.glob("*.safetensors")) for path in (source, back))
    before, after = read_header(one).tensors, read_header(other).tensors
    differing = [n for n in before if n not in after or not torch.equal(before[n].read(), after[n].read())]
    differing += [name for name in after if name not in before]
    size = one.stat().st_size
    for path in (file, back):
        remove(path)
    if differing:
        raise SystemExit(f"{len(differing)} tensors differ: {differing[:5]}")
    return [
        f"A FLUX.2 klein 4B transformer, {len(before)} tensors, {size:,} bytes in bf16: 0 differ after both ways.",
        "",
        "| job | wall | CPU | peak RSS |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {one.wall_s:.1f} s | {one.cpu_s:.1f} s | {one.peak_mb:,.0f} MB |"
            for name, one in (("folder to file", there), ("file to folder", again))
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a model folder in fp16, instead of building one")
    parser.add_argument("--folder-fp32", type=Path, help="the same in fp32")
    parser.add_argument("--script", type=Path, help="diffusers' script")
    parser.add_argument("--klein", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for the models, kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="Markdown file to write the report to")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        scratch = args.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        lines = (klein if args.klein else sd15)(args, scratch)
    about = (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, Python {sys.version.split()[0]}"
    )
    report = "\n".join([*lines, "", f"{about}."]) + "\n"
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
