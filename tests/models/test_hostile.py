"""Hostile model files: none runs code, none is accepted, each is answered in one line, in little time and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlab.models.bases import builtin_folder
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve
from tests.models.helpers import copied, edit_json
from tests.program import ENVIRONMENT

GIB = 1 << 30
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Report:
    """What came of an attack: a row for each item on each way in, and what is known of the process."""

    rows: list[dict[str, Any]]
    process: dict[str, Any]

    def those(self, wrong: Any) -> list[str]:
        return [f"{row['name']}, {row['entry']}: {row}" for row in self.rows if wrong(row)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(24, id="some")],
)
def report(
    request: pytest.FixtureRequest,
    tiny_sd_folder: Path,
    tiny_klein_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Report]:
    """All hostile files, each on all ways in, tried in one process of its own."""
    root = tmp_path_factory.mktemp("hostile") / "files"
    words = (root, tiny_sd_folder, tiny_klein_folder, builtin_folder("mini-sd"), request.param)
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.attack", *map(str, words)],
        cwd=Path(__file__).parents[2],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, process = (json.loads(line) for line in done.stdout.splitlines())
    yield Report(rows, process)
    shutil.rmtree(root)


def test_there_are_enough_of_them(report: Report, request: pytest.FixtureRequest) -> None:
    num_items = len({row["name"] for row in report.rows})
    sys.stdout.write(f"{num_items} hostile files and folders, {len(report.rows)} attempts\n")
    assert num_items >= (250 if "all" in request.node.name else 12)


def test_none_is_accepted_and_none_breaks_sdlab(report: Report) -> None:
    assert not report.those(lambda row: row["outcome"] != "refused")


def test_each_is_answered_in_one_line(report: Report) -> None:
    assert not report.those(lambda row: not row["said"].isprintable() or not 20 < len(row["said"]) <= 400)


def test_each_is_answered_in_five_seconds(report: Report) -> None:
    """Of processor time, the child's included; by the clock a busy computer is given six times that."""
    assert not report.those(lambda row: row["cpu_s"] > 5 or row["wall_s"] > 30)


def test_all_of_them_fit_in_two_gib(report: Report) -> None:
    assert report.process["peak_bytes"] < 2 * GIB


def test_nothing_in_them_is_run(report: Report) -> None:
    assert report.process["is_watched"]
    assert report.process["events"] == [] and report.process["run"] == [] and report.process["imported"] == []


def test_nothing_is_made_of_them(report: Report) -> None:
    assert not report.those(lambda row: row["left"])


def test_good_ones_are_accepted(report: Report) -> None:
    assert [row for row in report.process["good"] if row["outcome"] != "accepted"] == []


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil: pass\n"
REMOTE = {
    "trust_remote_code": True,
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"),
    "custom_pipelines": "evil.py",
    "custom_pipeline": "evil",
    "_name_or_path": "evil/evil",
    "use_kernels": True,
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "architectures": ["Evil"],
}


@pytest.mark.parametrize("kind", ["sd", "flux2"])
def test_keys_that_ask_for_foreign_code_do_nothing(
    tiny_sd_folder: Path, tiny_klein_folder: Path, tmp_path: Path, kind: str
) -> None:
    marker = tmp_path / "ran"
    folder = copied(tiny_sd_folder if kind == "sd" else tiny_klein_folder, tmp_path / "model")
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("config.json", "tokenizer_config.json", "scheduler_config.json"):
            edit_json(path, **REMOTE)
            for name in ("evil.py", "__init__.py", "modeling_evil.py", "pipeline.py", "tokenization_evil.py"):
                (path.parent / name).write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    family = open_family(resolve(str(folder), training=False))
    family.pipeline(family.load_denoiser(CPU, torch.float32))
    with family.load_encoders(CPU, torch.float32) as encoders:
        encoders.encode_prompts(["a red fish"])
    assert not marker.exists()
    assert not [name for name in sys.modules if "evil" in name]
