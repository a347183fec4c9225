"""SHA-256 beside other work: hashlib lets go of Python's lock, so that a thread of its own costs no time."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from sdlab.convert.cast import LIFETIME


class Sha256:
    """A SHA-256 that is computed on a thread of its own, in a ``with`` block.

    It is done with a piece before LIFETIME more are given to it, so it takes what cast.pieces hands out.
    """

    def __init__(self, start: bytes = b"") -> None:
        self._digest = hashlib.sha256(start)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._waiting: deque[Future[None]] = deque()

    def update(self, piece: bytes | memoryview) -> None:
        """Take in a piece; waits where the hash is too far behind."""
        self._waiting.append(self._thread.submit(self._digest.update, piece))
        if len(self._waiting) > LIFETIME - 2:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """The hash of all that was given."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()

    def __enter__(self) -> Sha256:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
