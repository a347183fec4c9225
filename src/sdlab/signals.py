"""Ctrl-C and SIGTERM: the first asks for an end after this step, the second leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by the first signal; looked at between steps."""

    signum: int = 0

    def __bool__(self) -> bool:
        return self.signum != 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the `with`. The handler only sets a flag: nothing is written in it.

    A second signal ends the process with 128 + its number; checkpoints are renamed into place when whole, so
    the last good one is not touched.
    """
    request = StopRequest()

    def handle(signum: int, frame: FrameType | None) -> None:
        if request:
            os._exit(128 + signum)
        request.signum = signum
        os.write(2, b"\nstopping after this step; once more leaves at once\n")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
