"""Timestep sampling, min-SNR and EMA on the mini models: score, and validation loss by noise level, three seeds each.

python -m benchmarks.study flux2|sd [--seeds 1 2 3] [--only ARM ...] [--work FOLDER]     trains, measures, records
python -m benchmarks.study plot                                             prints the tables and draws docs/study/*.png

Every run is a fine-tuning on images/ by an `sdlab train-...` command, alike but for what its arm names. Score: the
share of the demo's 64 prompts whose picture shows shape, colour and background. Validation loss: of 48 held-out
scenes at eight levels of noise, without weighting, the same scenes and noise for every run. What stands in
benchmarks/study/*.json is not run again, so a stopped study goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from recipes.demo import NUM_LEFT_OUT, prompts

from sdlab.keyed import Draws
from sdlab.testing.scenes import NEW_SHAPES, Scene, draw, generator, random_scene, score

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORDS, PLOTS = Path(__file__).parent / "study", Path(__file__).parents[1] / "docs" / "study"
NUM_BANDS, NUM_HELD_OUT, HELD_OUT_PX, BATCH = 8, 48, 128, 8


@dataclass(frozen=True)
class Arm:
    """One way to train: what the record calls it, what a plot calls it, and the flags that make it."""

    name: str
    label: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What all runs of a family have in common, and its arms; the first is the family's own default."""

    name: str
    model: str
    train: str
    steps: int
    drawing_steps: int
    flags: tuple[str, ...]
    kinds: tuple[str, ...]  # of weights that are measured of each run: raw, ema
    arms: tuple[Arm, ...]

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.name}.json"


def _sd_arm(high: int, gamma: int) -> Arm:
    snr = f"min-SNR {gamma}" if gamma else "no min-SNR"
    flags = ("--timestep-range", f"0-{high}", "--snr-gamma", str(gamma))
    return Arm(f"range-{high}-snr-{gamma}", f"0-{high}, {snr}", flags)


def _flux2_arm(name: str, label: str, sampling: str, shift: str) -> Arm:
    return Arm(name, label, ("--timestep-sampling", sampling, "--shift", shift))


STUDIES = {
    "flux2": Study(
        "flux2", "mini-flux2", "train-flux2", steps=180, drawing_steps=15, flags=("--no-ema",), kinds=("raw",),
        arms=(
            _flux2_arm("logit-normal-5", "logit-normal, shift 5", "logit-normal", "5"),
            _flux2_arm("uniform", "uniform", "uniform", "1"),
            _flux2_arm("logit-normal", "logit-normal", "logit-normal", "1"),
            _flux2_arm("logit-normal-auto", "logit-normal, shift by tokens (1.6)", "logit-normal", "auto"),
        ),
    ),
    "sd": Study(
        "sd", "mini-sd", "train-sd", steps=180, drawing_steps=15, flags=("--ema",), kinds=("raw", "ema"),
        arms=(_sd_arm(1000, 1), _sd_arm(1000, 0), _sd_arm(1000, 5), _sd_arm(700, 1)),
    ),
}  # fmt: skip


# --- runs


def run_study(study: Study, seeds: Sequence[int], only: Sequence[str], work: Path) -> None:
    """Trains and measures what the record does not hold yet; the record is written after every run."""
    record = _open_record(study)
    held_out = HeldOut(study.model)
    if "start" not in record:
        record["start"] = held_out.losses(None)
        _write(study.record, record)
    for seed in seeds:
        for arm in (a for a in study.arms if not only or a.name in only):
            if any(r["arm"] == arm.name and r["seed"] == seed for r in record["runs"]):
                continue
            record["runs"] += _measured(study, arm, seed, work, held_out)
            _write(study.record, record)


def _open_record(study: Study) -> dict:
    """What is recorded so far. Ends the script where that was made with other settings."""
    settings = json.loads(json.dumps({k: v for k, v in asdict(study).items() if k != "arms"}))
    settings |= {"held_out": NUM_HELD_OUT, "bands": NUM_BANDS, "prompts": len(prompts())}
    if not study.record.exists():
        return {"settings": settings, "runs": []}
    record = json.loads(study.record.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        sys.exit(f"{study.record} was made with other settings: {record['settings']}; move it away")
    return record


def _measured(study: Study, arm: Arm, seed: int, work: Path, held_out: HeldOut) -> list[dict]:
    """Train one run and measure its weights, one entry of the record for each kind of them."""
    run = work / f"{study.name}-{arm.name}-{seed}"
    _sdlab(
        study.train, "--images", "images/", "--load-model", study.model, "--save-model", run, "--overwrite",
        "--cache-dir", work / f"cache-{study.name}", "--steps", study.steps, "--batch", BATCH, "--seed", seed,
        "--save-every", 0, "--preview-every", 0, "--preview-prompt", "red fish", "--device", "cpu",
        *study.flags, *arm.flags,
    )  # fmt: skip
    checkpoint = run / "checkpoints" / f"step-{study.steps:06d}"
    entries = []
    for kind in study.kinds:
        weights = checkpoint / ("ema.safetensors" if kind == "ema" else "weights.safetensors")
        entry = {"arm": arm.name, "seed": seed, "weights": kind}
        entries.append(entry | _scored(study, weights, seed, work) | {"losses": held_out.losses(weights)})
        _say(f"{arm.name} seed {seed} {kind}: {entries[-1]['score']:.1%}")
    shutil.rmtree(run)
    return entries


def _scored(study: Study, weights: Path, seed: int, work: Path) -> dict[str, float]:
    """Draw the demo's prompts with these weights and read the pictures; fractions in [0, 1]."""
    folder, listed = work / f"drawn-{study.name}", work / f"prompts-{study.name}.txt"
    shutil.rmtree(folder, ignore_errors=True)
    listed.write_text("\n".join(prompts()) + "\n", encoding="utf-8")
    _sdlab(
        "generate", "--prompt-file", listed, "--load-model", study.model, "--unet", weights, "--output", folder,
        "--steps", study.drawing_steps, "--batch", BATCH, "--seed", seed, "--device", "cpu",
    )  # fmt: skip
    pictures = [Image.open(path) for path in sorted(folder.glob("sd_*.png"))]
    texts = [json.loads(p.info["sdlab"])["prompt"] for p in pictures]
    assert len(pictures) == len(prompts()), len(pictures)
    seen = [p.convert("RGB") for p in pictures]
    new = set(prompts()[:NUM_LEFT_OUT])
    left_out = [i for i, text in enumerate(texts) if text in new]
    found = score(seen, texts)
    return {
        "score": found.all_three, "shape": found.shape, "colour": found.colour, "background": found.background,
        "left_out": score([seen[i] for i in left_out], [texts[i] for i in left_out]).all_three,
    }  # fmt: skip


def _sdlab(*args: object) -> None:
    """Run a command as a user would type it, on one thread. Ends the study if it fails."""
    words = [str(a) for a in args]
    _say(f"$ sdlab {shlex.join(words)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-m", "sdlab", *words], stdout=subprocess.DEVNULL, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


# --- validation loss


@dataclass(frozen=True)
class Band(Draws):
    """Draws whose levels of noise lie in one part of their range: `low` to `high` of it, in [0, 1]."""

    low: float = 0.0
    high: float = 1.0

    def uniform(self, purpose: str, ids: Sequence[str]) -> torch.Tensor:
        return self.low + (self.high - self.low) * super().uniform(purpose, ids)

    def integers(self, purpose: str, ids: Sequence[str], low: int, high: int) -> torch.Tensor:
        width = high - low
        return super().integers(purpose, ids, low + round(self.low * width), low + round(self.high * width))


def held_out_scenes() -> Iterator[tuple[str, Scene]]:
    """Prompts and scenes laid out as those of images/, of any combination, from seeds that it does not use."""
    for i in range(NUM_HELD_OUT):
        scene = random_scene(generator(i, "held-out"), shapes=NEW_SHAPES)
        size = 0.65 + 0.5 * (scene.size - 0.45)
        scene = replace(scene, size=size, x=0.4 * scene.x, y=0.4 * scene.y, tilt_deg=0.5 * scene.tilt_deg)
        words = [f"{scene.colour} {scene.shape}", f"{scene.background} background"]
        yield ", ".join(words + [scene.texture] * (scene.texture != "plain")), scene


class HeldOut:
    """The held-out scenes encoded by a model, and the loss of its denoiser on them."""

    def __init__(self, model: str) -> None:
        import torch

        from sdlab.models.bases import FlowObjective, Objective
        from sdlab.models.opening import open_family
        from sdlab.models.resolve import resolve

        torch.set_num_threads(1)
        found = resolve(model, training=True)
        objective = FlowObjective("uniform", 1.0) if found.family == "flux2" else Objective()
        self.family = open_family(found, objective=objective)
        texts, scenes = zip(*held_out_scenes(), strict=True)
        arrays = [np.asarray(draw(scene, (HELD_OUT_PX, HELD_OUT_PX)), np.float32) for scene in scenes]
        pixels_B3HW = torch.from_numpy(np.stack(arrays) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
        with self.family.load_encoders(torch.device("cpu"), torch.float32) as encoders:
            self.latents_BCHW = encoders.encode_pictures(pixels_B3HW)
            self.conds = encoders.encode_prompts(texts)

    def losses(self, weights: Path | None) -> list[float]:
        """Mean loss at each level of noise, from the least on; `weights` None: of the model before training."""
        import torch
        from safetensors.torch import load_file

        denoiser = self.family.load_denoiser(torch.device("cpu"), torch.float32)
        if weights:
            tensors = load_file(weights)
            assert set(tensors) == {name for name, _ in denoiser.named_parameters()}, weights
            denoiser.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            return [self._loss(denoiser, band) for band in range(NUM_BANDS)]

    def _loss(self, denoiser: torch.nn.Module, band: int) -> float:
        import torch

        from sdlab.models.base import Batch

        rng = Band(seed=0, step=band, low=band / NUM_BANDS, high=(band + 1) / NUM_BANDS)
        losses = []
        for rows in np.array_split(np.arange(NUM_HELD_OUT), NUM_HELD_OUT // BATCH):
            cond = {key: torch.stack([self.conds[i][key] for i in rows]) for key in self.conds[0]}
            ids = tuple(f"held-out {i}" for i in rows)
            batch = Batch(self.latents_BCHW[rows], cond, torch.ones(len(rows)), ids)
            losses.append(self.family.loss(denoiser, batch, rng))
        return round(float(torch.cat(losses).mean()), 6)


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- tables and plots


@dataclass(frozen=True)
class Row:
    """One bar of a plot and line of a table: an arm with one kind of weights, over all its seeds."""

    label: str
    seeds: tuple[int, ...]
    scores_S: tuple[float, ...]
    left_out_S: tuple[float, ...]
    losses_SQ: np.ndarray  # (seeds, bands)


def rows_of(study: Study, record: dict, kind: str) -> list[Row]:
    """What is recorded of each arm, in the order of the arms, of the seeds that all recorded arms have."""
    found: dict[str, dict[int, dict]] = {arm.name: {} for arm in study.arms}
    for run in record["runs"]:
        if run["weights"] == kind:
            found[run["arm"]][run["seed"]] = run
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values() if by_seed)))
    rows = []
    for arm in study.arms:
        if runs := [found[arm.name][seed] for seed in seeds if found[arm.name]]:
            scores, left_out = (tuple(run[key] for run in runs) for key in ("score", "left_out"))
            rows.append(
                Row(arm.label, tuple(seeds), scores, left_out, np.array([run["losses"] for run in runs]))
            )
    return rows


def report(study: Study) -> None:
    """Print the table of a study and draw its plot."""
    record = json.loads(study.record.read_text(encoding="utf-8"))
    start_Q = np.array(record["start"])
    print(f"\n{study.model}, {study.steps} steps of {BATCH}; mean and standard deviation over seeds")
    print(f"loss before training by eighths of noise: {' '.join(f'{x:.4f}' for x in start_Q)}\n")
    print(
        "| | weights | score | each seed | against the first | left out | loss by eighths of noise, % of before |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in study.kinds:
        rows = rows_of(study, record, kind)
        for row in rows:
            print(_line(row, rows[0], kind, start_Q))
    PLOTS.mkdir(parents=True, exist_ok=True)
    (_plot_flux2 if study.name == "flux2" else _plot_sd)(study, record)


def _line(row: Row, first: Row, kind: str, start_Q: np.ndarray) -> str:
    """A line of the table; scores are compared with the first arm's seed by seed."""
    apart = [score - other for score, other in zip(row.scores_S, first.scores_S, strict=True)]
    losses = " ".join(f"{x:.1f}" for x in 100 * row.losses_SQ.mean(axis=0) / start_Q)
    return (
        f"| {row.label} | {kind} | {_mean_spread(row.scores_S, '{:.1%}')} | "
        f"{' '.join(f'{x:.1%}' for x in row.scores_S)} | {_mean_spread(apart, '{:+.1%}')} | "
        f"{statistics.mean(row.left_out_S):.1%} | {losses} |"
    )


def _mean_spread(values: Sequence[float], form: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {spread:.1%}"


def _scores(axes: Axes, groups: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Bars of the mean score with the seeds as points; rows of a group share an arm's place."""
    height = 0.8 / len(groups)
    for g, (name, rows) in enumerate(groups):
        for place, row in enumerate(rows):
            at = place + (g - (len(groups) - 1) / 2) * height
            colour = f"C{place}"
            axes.barh(
                at, 100 * statistics.mean(row.scores_S), height * 0.9, color=colour, alpha=0.75 if g else 0.4
            )
            axes.plot(
                [100 * x for x in row.scores_S], [at] * len(row.scores_S), "o", color="black", markersize=4
            )
            if name:
                axes.text(1, at, name, va="center", fontsize=8)
    rows = groups[0][1]
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("prompts drawn right, % (points: seeds)")
    axes.set_title("Score")


def _by_band(axes: Axes, pairs: Sequence[tuple[Row, np.ndarray]]) -> None:
    """Loss by level of noise against another, in percent: the mean over seeds as a line, the seeds as points."""
    bands = np.arange(1, NUM_BANDS + 1)
    for i, (row, against_SQ) in enumerate(pairs):
        percent_SQ = 100 * (row.losses_SQ / against_SQ - 1)
        axes.plot(bands, percent_SQ.mean(axis=0), "-", color=f"C{i}", label=row.label)
        for percent_Q in percent_SQ:
            axes.plot(bands, percent_Q, ".", color=f"C{i}", markersize=5, alpha=0.7)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(bands)
    axes.set_xlabel("level of noise, eighths of the range (8: most)")


def _against_all(axes: Axes, rows: Sequence[Row]) -> None:
    """Each row's loss by level of noise against the mean of all rows with the same seed."""
    mean_SQ = np.mean([row.losses_SQ for row in rows], axis=0)
    _by_band(axes, [(row, mean_SQ) for row in rows])
    axes.set_ylabel("% against the mean of all, same seed")
    axes.legend(fontsize=8)


def _plot_flux2(study: Study, record: dict) -> None:
    import torch

    from sdlab.models import flow

    rows = rows_of(study, record, "raw")
    figure, (left, middle, right) = _figure(3)
    _scores(left, [("", rows)])
    _against_all(middle, rows)
    middle.set_title("Validation loss")
    draws = Draws(0, 0)
    ids = [str(i) for i in range(4000)]
    for i, arm in enumerate(study.arms):
        sampling, shift = arm.flags[1], arm.flags[3]
        sigma_B = draws.uniform("s", ids) if sampling == "uniform" else draws.normal("s", ids, ()).sigmoid()
        sigma_B = flow.shifted(sigma_B, flow.shift_of(64) if shift == "auto" else float(shift))
        share_Q = torch.histc(sigma_B.float(), NUM_BANDS, 0, 1) / len(ids)
        right.plot(range(1, NUM_BANDS + 1), (100 * share_Q).tolist(), "-", color=f"C{i}")
    right.set_title("Where the training looks")
    right.set_ylabel("share of the draws, %")
    right.set_xlabel("level of noise, eighths of the range")
    _save(
        figure,
        f"{study.model}: how noise levels are drawn, {study.steps} steps of {BATCH}",
        "flux2_timesteps",
    )


def _plot_sd(study: Study, record: dict) -> None:
    raw, ema = rows_of(study, record, "raw"), rows_of(study, record, "ema")
    figure, (left, middle, right) = _figure(3)
    _scores(left, [("raw", raw), ("EMA", ema)])
    _against_all(middle, ema)
    middle.set_title("Validation loss of the EMA weights")
    _by_band(right, [(one, other.losses_SQ) for one, other in zip(ema, raw, strict=True)])
    right.set_title("EMA against raw weights of the same run")
    right.set_ylabel("% of the loss of the raw weights")
    _save(
        figure,
        f"{study.model}: timestep range, min-SNR and EMA, {study.steps} steps of {BATCH}",
        "sd_range_snr_ema",
    )


def _figure(num: int) -> tuple[Figure, Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, num, figsize=(5.2 * num, 4.4), layout="constrained")


def _save(figure: Figure, title: str, name: str) -> None:
    figure.suptitle(title)
    figure.savefig(PLOTS / f"{name}.png", dpi=90, metadata={"Software": None})
    _say(str(PLOTS / f"{name}.png"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*STUDIES, "plot"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], help="names of arms")
    parser.add_argument("--work", type=Path, default=Path("output") / "study", help="runs and pictures")
    args = parser.parse_args()
    if args.what == "plot":
        for study in STUDIES.values():
            if study.record.exists():
                report(study)
        return 0
    study = STUDIES[args.what]
    if unknown := set(args.only) - {arm.name for arm in study.arms}:
        parser.error(f"no arm {sorted(unknown)}; there are {[arm.name for arm in study.arms]}")
    args.work.mkdir(parents=True, exist_ok=True)
    run_study(study, args.seeds, args.only, args.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
