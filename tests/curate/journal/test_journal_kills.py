"""Killed with -9 at every system call: nothing is lost, undo brings back the start, resume reaches the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.curate.journal.trees import SMALL

ALL = [*SMALL, "copy/no-links", "move/no-links", "captions/no-links", "move/other-disk"]
SOME = [*SMALL, "move/no-links", "captions/no-links", "move/other-disk"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def kills(step: str, *names: str) -> int:
    """What tests.curate.journal.kills counted; a file system in memory is quick to sync, if there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as top:
        done = subprocess.run(
            [sys.executable, "-m", "tests.curate.journal.kills", top, step, *names],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_undo_after_kill_brings_back_every_byte():
    assert kills("undo", *ALL) > 200


def test_resume_after_kills_ends_as_one_run():
    assert kills("resume", *SOME) > 180


def test_killed_undo_can_be_run_again():
    assert kills("undo-undo", *SOME) > 110


def test_random_trees_survive_kills_at_random_moments():
    assert kills("random", "100") == 100


def test_undo_after_a_kill_of_threads_brings_back_every_byte():
    assert kills("threads", "copy", "link", "move") > 15
