"""What a run shows while it goes: a bar or plain lines, and a picture of the loss."""

from __future__ import annotations

import io
import math
import sys
import time
from typing import Any

import torch
from PIL import Image, ImageDraw

from sdlab import show

PLAIN_EVERY_S = 10.0
ADVISE_AFTER_S = 30.0


class ThreadAdvice:
    """Tells once if the work takes far more wall time than CPU time a thread.

    On a busy CPU, OpenMP's threads spin while they wait for one another: steps take up to twenty times as long.
    """

    def __init__(self) -> None:
        self.began, self.cpu_began, self.told = time.monotonic(), time.process_time(), False

    def look(self) -> None:
        """Compare the clocks; call it now and then."""
        wall_s = time.monotonic() - self.began
        cpu_s = (time.process_time() - self.cpu_began) / torch.get_num_threads()
        if self.told or wall_s < ADVISE_AFTER_S or wall_s < 2 * cpu_s:
            return
        self.told = True
        show.note(
            f"{wall_s:.0f} s have passed for {cpu_s:.0f} s of CPU a thread: this computer is busy with other work; "
            "OMP_WAIT_POLICY=PASSIVE in the environment, or a smaller OMP_NUM_THREADS, will be faster"
        )


class Progress:
    """One bar on a terminal, a plain line every ten seconds elsewhere. The ETA counts this process's steps only."""

    def __init__(self, start: int, total: int, *, steps_per_epoch: int, advice: ThreadAdvice | None) -> None:
        self.advice = advice
        self.start, self.total, self.done, self.steps_per_epoch = start, total, start, steps_per_epoch
        self.began = self.shown = self.latest = time.monotonic()
        self.first_s = 0.0  # the first step warms up: it is left out of the rate
        self.pictures = 0
        self.bar: Any = None
        self.task: Any = None
        if sys.stderr.isatty():
            self._open_bar()

    def advance(self, record: dict[str, Any], num_pictures: int) -> None:
        """One step is done."""
        now = self.latest = time.monotonic()
        self.done = record["step"]
        if self.done == self.start + 1:
            self.first_s = now - self.began
        else:
            self.pictures += num_pictures
        if self.advice:
            self.advice.look()
        text = self._text(record, now)
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=text)
        elif now - self.shown > PLAIN_EVERY_S or self.done in (self.start + 1, self.total):
            self.shown = now
            show.note(f"step {self.done}/{self.total}  {text}")

    def seconds_a_step(self) -> float | None:
        """Mean of this process's steps but the first, up to the last one; None if there were fewer than two."""
        steps = self.done - self.start - 1
        return (self.latest - self.began - self.first_s) / steps if steps > 0 else None

    def close(self) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _text(self, record: dict[str, Any], now: float) -> str:
        epoch = f"epoch {record['epoch'] + 1}/{-(-self.total // self.steps_per_epoch)}"
        loss = f"loss {record['loss']:.4f}" if "loss" in record else "skipped"
        spent = now - self.began - self.first_s
        if not self.pictures or spent <= 0:
            return f"{epoch}  {loss}"
        left = (self.total - self.done) * spent / (self.done - self.start - 1)
        return f"{epoch}  {loss}  {self.pictures / spent:.1f} pictures/s  ETA {clock(left)}"

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=self.total, completed=self.start, text="")
        self.bar.start()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"


def loss_plot(points: list[tuple[int, float]], size_px: tuple[int, int] = (400, 800)) -> bytes:
    """A PNG of the loss by step: each step grey, a running mean blue, both axes from the data."""
    height, width = size_px
    left, right, top, bottom = 64, width - 16, 24, height - 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    steps = [s for s, _ in points]
    smooth = _running_mean([v for _, v in points], window=max(1, len(points) // 50))
    ordered = sorted(v for _, v in points)
    high = ordered[math.ceil(0.99 * (len(ordered) - 1))] or 1.0  # one spike does not flatten the rest
    low = min(0.0, ordered[0])
    first, span = steps[0], max(1, steps[-1] - steps[0])

    def at(step: int, value: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return left + (step - first) / span * (right - left), bottom - share * (bottom - top)

    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = at(first, value)
        draw.line([(left, y), (right, y)], fill="#e6e6e6")
        draw.text((8, y - 6), f"{value:.3g}", fill="#555555")
        step = first + round(span * i / 4)
        draw.text((at(step, low)[0] - 10, bottom + 8), str(step), fill="#555555")
    draw.text((left, 6), f"loss by step (mean of {max(1, len(points) // 50)} steps in blue)", fill="#222222")
    if len(points) > 1:
        draw.line([at(s, v) for s, v in points], fill="#c9c9c9")
        draw.line([at(s, v) for s, v in zip(steps, smooth, strict=True)], fill="#1f5fbf", width=2)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _running_mean(values: list[float], window: int) -> list[float]:
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means
