"""A plain line now and then says how far the work is, and when it will be done."""

from __future__ import annotations

import time

import pytest

from sdlab import progress


def test_what_was_there_already_says_nothing_about_the_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.pictures(100, already=50) as advance:
        for done in (50, 55, 60):
            advance(done)
            now[0] += progress.PLAIN_EVERY_S
        advance(65)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "55% of 100 pictures, 0.5 a second, about 90 s left",
        "60% of 100 pictures, 0.5 a second, about 80 s left",
        "65% of 100 pictures, 0.5 a second, about 70 s left",
    ]
