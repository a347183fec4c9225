"""Killed at any moment, `sdlab convert` leaves nothing under the final name, or the whole right file.

A short version of benchmarks/convert_kill.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.program import start

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")


PARTS = ".*.sdlab-part"


def test_a_kill_leaves_no_file_under_the_final_name_and_the_next_run_sweeps_up(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    command = ("convert", "--model-path", "mini-sd", "--checkpoint-path", target)
    with start(*command) as child:
        wait_until(child, lambda: any(tmp_path.glob(PARTS)))
        begun = time.monotonic()
        wait_until(child, target.exists)
        writing_s = time.monotonic() - begun
        assert child.wait() == 0, child.communicate()
    right = target.read_bytes()
    target.unlink()
    rng, num_parts = random.Random(5), 0
    for number in range(5):
        earlier = set(tmp_path.glob(PARTS))
        with start(*command) as child:
            wait_until(child, lambda: bool(set(tmp_path.glob(PARTS)) - earlier))  # noqa: B023  (called here only)
            time.sleep(rng.uniform(number / 6, (number + 1) / 6) * writing_s)
            os.killpg(child.pid, signal.SIGKILL)
        assert not target.exists() or target.read_bytes() == right
        target.unlink(missing_ok=True)
        num_parts += any(tmp_path.glob(PARTS))
    assert num_parts  # else no kill hit the writing
    with start(*command) as child:
        assert child.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == right


def wait_until(child: subprocess.Popen[str], it_is_so: Callable[[], bool]) -> None:
    while child.poll() is None and not it_is_so():
        time.sleep(0.0005)
