"""How far the work is: a bar on a terminal, now and then a plain line elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sdlab import show

PLAIN_EVERY_S = 10.0

Advance = Callable[[float], None]  # how many are done so far, parts of one counted


def pictures(total: int, *, doing: str = "", already: int = 0) -> AbstractContextManager[Advance]:
    """Yields a function to call with the number of pictures done; `doing` stands before the figures."""
    return counted(total, unit="pictures", doing=doing, already=already)


@contextmanager
def counted(total: int, *, unit: str, doing: str = "", already: int = 0) -> Iterator[Advance]:
    """Yields a function to call with the number of things done; `unit` is what they are, in the plural.

    `already` of them were done by an earlier run: the number begins there, and they say nothing about the pace.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield _plain(total, unit, doing, already)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.1f} {unit}/s")

    columns = (
        TextColumn(f"{doing} {{task.percentage:3.0f}} % of {{task.total}} {unit}".lstrip()),
        BarColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # paths on the same terminal go above the bar; those in a pipe stay out of it
    shared = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=shared) as bar:
        task = bar.add_task("", total=total, completed=already)
        yield lambda done: bar.update(task, completed=done)


def _plain(total: int, unit: str, doing: str, already: int) -> Advance:
    started = last = time.monotonic()

    def advance(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and already < done < total:
            last = now
            rate = (done - already) / (now - started)
            pace = f"{rate:.1f} a second, about {(total - done) / rate:.0f} s left"
            show.note(f"{doing} {done / total:.0%} of {total} {unit}, {pace}".lstrip())

    return advance
