"""`make demo`: train the built-in model on images/ and see what it has learnt.

python -m recipes.demo [--flux2] [--record]     --record also writes the figures to benchmarks/demo.json

With --flux2 the built-in model is mini-flux2, trained by train-flux2; the figures go to benchmarks/demo_flux2.json.

64 prompts for things that mini-sd does not know, a third of them for combinations that images/ leaves out on
purpose, are drawn before and after the training; sdlab.testing.scenes reads shape, colour and background back
from the pixels. Exits with 1 if fewer than 80 % (75 % with --flux2) show all three afterwards, or 15 % and more did
before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from PIL import Image
from recipes.mini.images import LEFT_OUT_GROUNDS, LEFT_OUT_THINGS

from sdlab.testing.scenes import COLOURS, NEW_SHAPES, generator, score

NUM_PROMPTS, NUM_LEFT_OUT = 64, 24
BEFORE_BELOW = 0.15


@dataclass(frozen=True)
class Demo:
    """Which built-in model, how it is trained and drawn with, and what it must reach."""

    model: str
    train: str
    steps: int
    at_least: float
    name: str

    @property
    def output(self) -> Path:
        return Path("output") / self.name

    @property
    def run(self) -> Path:
        return Path("tuned") / self.name


SD = Demo("mini-sd", "train-sd", steps=20, at_least=0.80, name="demo")
FLUX2 = Demo("mini-flux2", "train-flux2", steps=15, at_least=0.75, name="demo_flux2")


def prompts() -> list[str]:
    """The fixed list: every thing, colour and background about equally often, the left-out combinations first."""
    every = [(t, c, g) for t in NEW_SHAPES for c in COLOURS for g in COLOURS if c != g]
    out = [(t, c, g) for t, c, g in every if (t, c) in LEFT_OUT_THINGS or (c, g) in LEFT_OUT_GROUNDS]
    seen = [combination for combination in every if combination not in out]
    rng = generator(64, "demo")
    picked = [out[i] for i in rng.permutation(len(out))[:NUM_LEFT_OUT]]
    picked += [seen[i] for i in rng.permutation(len(seen))[: NUM_PROMPTS - NUM_LEFT_OUT]]
    styles = ("{c} {t}, {g} background", "a photo of a {c} {t} on a {g} background")
    return [styles[i % 2].format(t=t, c=c, g=g) for i, (t, c, g) in enumerate(picked)]


def sdlab(*args: object) -> float:
    """Run a command as a user would type it, and show it; seconds it took. Ends the demo if it fails."""
    words = [str(a) for a in args]
    say(f"\n$ sdlab {shlex.join(words)}")
    began = time.monotonic()
    # A demo should take its minutes on a busy computer too, where OpenMP's spinning can take ten times as long.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run([sys.executable, "-m", "sdlab", *words], stdout=subprocess.DEVNULL, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - began


def draw(demo: Demo, model: object, name: str) -> tuple[list[Image.Image], list[str], float]:
    """Pictures of the fixed prompts by a model, in the order of the prompts, and the seconds it took."""
    folder = demo.output / name
    shutil.rmtree(folder, ignore_errors=True)
    seconds = sdlab(
        "generate", "--prompt-file", demo.output / "prompts.txt", "--load-model", model,
        "--steps", demo.steps, "--batch", 8, "--seed", 1,
        "--output", folder, "--grid",
    )  # fmt: skip
    paths = sorted(p for p in folder.glob("sd_*.png") if "grid" not in p.name)
    pictures = [Image.open(path) for path in paths]
    return (
        [p.convert("RGB") for p in pictures],
        [json.loads(p.info["sdlab"])["prompt"] for p in pictures],
        seconds,
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flux2", action="store_true", help="mini-flux2 instead of mini-sd")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/")
    args = parser.parse_args()
    demo = FLUX2 if args.flux2 else SD
    began = time.monotonic()
    demo.output.mkdir(parents=True, exist_ok=True)
    wanted = prompts()
    (demo.output / "prompts.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")

    say("Before: the built-in model has never seen a fish, a house or a flower.")
    before = score(*draw(demo, demo.model, "before")[:2])
    training_s = sdlab(
        demo.train, "--images", "images/", "--load-model", demo.model, "--save-model", demo.run, "--overwrite"
    )
    pictures, texts, drawing_s = draw(demo, demo.run, "after")
    after = score(pictures, texts)
    new = {text for text in wanted[:NUM_LEFT_OUT]}
    left_out = score(*zip(*((p, t) for p, t in zip(pictures, texts, strict=True) if t in new), strict=True))

    figures = {
        "date": date.today().isoformat(),
        "model": demo.model,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "prompts": len(texts),
        "before": round(before.all_three, 3),
        "after": round(after.all_three, 3),
        "after_left_out_combinations": round(left_out.all_three, 3),
        "training_command_s": round(training_s),
        "drawing_64_pictures_s": round(drawing_s),
        "demo_s": round(time.monotonic() - began),
    }
    say(f"\n{len(texts)} prompts for fish, houses and flowers: shape, colour and background all right")
    say(f"  before training  {before.all_three:6.1%}")
    rest = f"(of {left_out.num} combinations that images/ leaves out: {left_out.all_three:.1%})"
    say(f"  after            {after.all_three:6.1%}   {rest}")
    say(f"  training {training_s:.0f} s, the whole demo {figures['demo_s']} s")
    say(f"\nLook at:\n  {demo.run / 'samples'}/       previews while it trained\n  {demo.run / 'loss.png'}")
    for name in ("before", "after"):
        say(f"  {next((demo.output / name).glob('*grid*'))}   64 pictures {name} training")
    say(f'\nTry your own:\n  sdlab generate --load-model {demo.run} --prompt "purple fish, white background"')
    if args.record:
        (Path("benchmarks") / f"{demo.name}.json").write_text(
            json.dumps(figures, indent=2) + "\n", encoding="utf-8"
        )
    return int(not (before.all_three < BEFORE_BELOW and after.all_three >= demo.at_least))


if __name__ == "__main__":
    sys.exit(main())
