"""Tries every hostile file on every way into sdlab, in this one process, and says what came of it.

    python -m tests.models.attack ROOT TINY KLEIN MINI EVERY

Each EVERY-th is tried. One JSON document a line: what was tried, what was said, the seconds it took; the last one is
about the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdlab.errors import SdlabError
from sdlab.models import unpickle_child
from sdlab.models.opening import open_family
from sdlab.models.quiet import hush
from sdlab.models.resolve import resolve
from tests import factories
from tests.models.hostile import Hostile, make, marker
from tests.program import sdlab

CPU = torch.device("cpu")
WATCHED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.",
    "socket.connect",
    "pty.",
)


def peak_bytes() -> int:
    """The most memory that this process or one that it started had.

    The system's own figure of a process begins with that of the one that started it: a test runner may be large.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    own = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return max(children, int(own.split()[1]) * 1024)


def main() -> None:
    root, tiny, klein, mini = (Path(word) for word in sys.argv[1:5])
    items, good = make(root, tiny=tiny, klein=klein, mini=mini, every=int(sys.argv[5]))
    images = factories.pictures(root / "images", {"a.png": (64, 64)})
    (images / "a.cap").write_text("a red fish " * 60, encoding="utf-8")
    hush()
    warnings.simplefilter("error")
    open_and_load(resolve(str(mini), training=False))  # so that the first one does not pay for the imports
    seen: list[str] = []
    sys.addaudithook(lambda event, args: watch(seen, event, args))
    before = {*os.listdir(root), "out"}
    for item in items:
        for entry in item.entries:
            row = tried(item, entry, base=mini, out=root / "out", images=images)
            say({**row, "left": sorted(set(os.listdir(root)) - before) + os.listdir(root / "out")})
            shutil.rmtree(root / "out")
    say(
        {
            "peak_bytes": peak_bytes(),
            "events": list(seen),
            "run": [
                str(path)
                for path in (marker(root), *root.rglob("PAYLOAD*"), Path("PAYLOAD"))
                if path.exists()
            ],
            "imported": sorted(name for name, module in list(sys.modules.items()) if is_below(module, root)),
            "good": [
                tried(item, entry, base=mini, out=root / f"good-{number}-{entry}", images=images)
                for number, item in enumerate(good)
                for entry in item.entries
            ],
            "is_watched": was_seen(seen),
        }
    )


def was_seen(seen: list[str]) -> bool:
    """Is a program that is started noticed?"""
    subprocess.run(["true"], check=True)
    return bool(seen) and "true" in seen[-1]


def say(row: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(row)}\n")
    sys.stdout.flush()


def is_below(module: Any, root: Path) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(str(root))


def watch(seen: list[str], event: str, args: tuple[Any, ...]) -> None:
    """Note every program started and every connection made, but for the process that opens pickles."""
    ours = event == "subprocess.Popen" and str(unpickle_child.__file__) in map(str, args[1])
    if event.startswith(WATCHED) and not ours:
        seen.append(f"{event} {args!r}"[:300])


def tried(item: Hostile, entry: str, *, base: Path, out: Path, images: Path) -> dict[str, Any]:
    """What sdlab says to one of them, and how long that takes."""
    way, _, allowed = entry.partition(" ")
    path, flags = str(item.path), [allowed] if allowed else []
    out.mkdir(exist_ok=True)
    target = out / ("made" if way == "convert" and item.path.is_file() else "made.safetensors")
    convert = ("convert", "--checkpoint-path", target, *flags, "--model-path")
    ways: dict[str, Callable[[], object]] = {
        "generate": lambda: open_and_load(
            resolve(path, training=False, allow_pickle=bool(allowed)), allowed=bool(allowed)
        ),
        "unet": lambda: open_family(resolve(str(base), training=False), unet=path),
        "vae": lambda: open_family(resolve(str(base), training=False), vae=path),
        "convert": lambda: sdlab(*convert, path),
        "lora": lambda: sdlab(*convert, base, "--lora", path),
        "check": lambda: sdlab("check", images, "--load-model", path),
    }
    wall, cpu = time.monotonic(), sum(os.times()[:4])
    outcome, said = outcome_of(ways[way])
    return {
        "name": item.name,
        "entry": entry,
        "outcome": outcome,
        "said": said,
        "wall_s": round(time.monotonic() - wall, 2),
        "cpu_s": round(sum(os.times()[:4]) - cpu, 2),
    }


def outcome_of(do: Callable[[], object]) -> tuple[str, str]:
    """refused, accepted or the name of an error that is ours, and what is said about it."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            code = do()
    except SdlabError as reason:
        return "refused", str(reason)
    except BaseException as reason:  # noqa: BLE001  (whatever it is, it is what this is looking for)
        return type(reason).__name__, repr(reason)[:1000]
    if not isinstance(code, int) or code == 0:
        return "accepted", heard.getvalue()[-1000:]
    return ("refused" if code == 2 else f"exit {code}"), heard.getvalue().partition("sdlab: error: ")[
        2
    ].removesuffix("\n")


def open_and_load(model: Any, *, allowed: bool = False) -> None:
    """All that `generate` loads."""
    family = open_family(model, allow_pickle=allowed)
    family.pipeline(family.load_denoiser(CPU, torch.float32))
    with family.load_encoders(CPU, torch.float32) as encoders:
        encoders.encode_prompts(["a red fish"])


if __name__ == "__main__":
    main()
