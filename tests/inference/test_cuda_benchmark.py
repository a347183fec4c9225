"""benchmarks/cuda_generate.py needs a card; that it runs at all is seen here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_generate.py"


@pytest.mark.slow
def test_the_benchmark_for_a_card_runs_with_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--out", str(tmp_path / "out.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    timed = json.loads((tmp_path / "out.json").read_text())["timed"]
    assert {one["case"]["who"] for one in timed} == {"diffusers", "sdlab"}
    assert {one["case"]["batch"] for one in timed} == {1, 4, 8}
    assert all(seconds > 0 for one in timed for seconds in one["picture_s"])
    assert ran.stdout.count("\n| ") == len(timed) + 2
