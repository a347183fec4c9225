"""How far the pictures are: a bar on a terminal, now and then a plain line elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdlab import show

PLAIN_EVERY_S = 10.0

Advance = Callable[[float], None]  # pictures done so far, parts of one counted


@contextmanager
def pictures(total: int) -> Iterator[Advance]:
    """Yields a function to call with the number of pictures done."""
    if not sys.stderr.isatty():
        yield _plain(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.percentage:3.0f} % of {task.total} pictures"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    shared = (
        sys.stdout.isatty()
    )  # paths on the same terminal go above the bar; those in a pipe stay out of it
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=shared
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def _plain(total: int) -> Advance:
    started = last = time.monotonic()

    def advance(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and 0 < done < total:
            last = now
            left_s = (now - started) / done * (total - done)
            show.note(f"{done / total:.0%} of {total} pictures, about {left_s:.0f} s left")

    return advance
