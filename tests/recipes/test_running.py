"""A recipe's commands can be killed and started again; what is finished is left alone, what is stale is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recipes.mini.data.folders import RECORD
from recipes.mini.journal import Journal
from recipes.mini.recipe import Command
from recipes.mini.running import run

from sdlab.errors import SdlabError

ROOT = Path(__file__).parents[2]
FAKE = {"sdlab": (sys.executable, str(Path(__file__).with_name("fake.py"))), "python": (sys.executable,)}
FIRST = Command("first", "train-vae --steps 10")
SECOND = Command("second", "train-sd --vae tuned/first --steps 10")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the fake program writes its words to."""
    path = tmp_path / "calls.txt"
    monkeypatch.setenv("FAKE_CALLS", str(path))
    return path


def start(work: Path, *commands: Command, device: str | None = None) -> None:
    for command in commands:
        run(command, work, device=device, programs=FAKE)


def step_of(work: Path, name: str) -> tuple[str, int]:
    said = json.loads((work / "tuned" / name / "run.json").read_text())
    return said["state"], said["step"]


def test_a_killed_recipe_goes_on_where_it_was(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KILL_AT", "second:4")
    with pytest.raises(SystemExit) as ended:
        start(tmp_path, FIRST, SECOND)
    assert ended.value.code == 137
    assert step_of(tmp_path, "first") == ("finished", 10) and step_of(tmp_path, "second") == ("running", 4)
    monkeypatch.delenv("FAKE_KILL_AT")
    start(tmp_path, FIRST, SECOND)
    start(tmp_path, FIRST, SECOND)
    assert step_of(tmp_path, "second") == ("finished", 10)
    second = "train-sd --vae tuned/first --steps 10 --save-model tuned/second"
    assert calls.read_text().splitlines() == [
        "train-vae --steps 10 --save-model tuned/first", second, f"{second} --resume",
    ]  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_recipe_lets_its_command_save(tmp_path: Path, calls: Path, signum: signal.Signals) -> None:
    code = f"from tests.recipes.test_running import *; start(Path({str(tmp_path)!r}), FIRST)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "FAKE_WAIT_AT": "first:5"}, start_new_session=True
    )  # fmt: skip
    while not (tmp_path / "tuned" / "first" / "waits").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does it: to all of them
    else:
        process.send_signal(signum)
    assert process.wait() == 128 + signum
    assert step_of(tmp_path, "first") == ("stopped", 5)
    start(tmp_path, FIRST)
    assert step_of(tmp_path, "first") == ("finished", 10)


def test_seconds_of_all_starts_are_added_up(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KILL_AT", "first:3")
    with pytest.raises(SystemExit):
        start(tmp_path, FIRST)
    journal = Journal(tmp_path / "commands.json")
    entry = journal.of("first")
    assert entry and entry.ended is None
    journal.write("first", replace(entry, seconds=1000.0))
    monkeypatch.delenv("FAKE_KILL_AT")
    start(tmp_path, FIRST)
    assert 1000 < (journal.seconds("first") or 0) < 1100
    entry = journal.of("first")
    assert entry and entry.line == "sdlab train-vae --steps 10 --save-model tuned/first"
    assert entry.ended is not None


def test_the_device_is_passed_on_and_may_change(tmp_path: Path, calls: Path) -> None:
    start(tmp_path, FIRST, device="cuda")
    assert calls.read_text().endswith("--device cuda\n")
    start(tmp_path, FIRST, device="cpu")
    assert len(calls.read_text().splitlines()) == 1


def test_a_run_of_another_command_is_not_taken_for_this_one(tmp_path: Path, calls: Path) -> None:
    start(tmp_path, FIRST)
    with pytest.raises(SdlabError, match="was made by another command"):
        start(tmp_path, Command("first", "train-vae --steps 20"))


def test_a_run_that_was_started_by_hand_is_taken_as_it_is(tmp_path: Path, calls: Path) -> None:
    start(tmp_path, FIRST)
    (tmp_path / "commands.json").unlink()
    start(tmp_path, FIRST)
    assert len(calls.read_text().splitlines()) == 1


def test_what_is_made_anew_starts_with_no_seconds(tmp_path: Path, calls: Path) -> None:
    start(tmp_path, FIRST)
    journal = Journal(tmp_path / "commands.json")
    journal.write("first", replace(journal.of("first") or pytest.fail(), seconds=1000.0))
    shutil.rmtree(tmp_path / "tuned" / "first")
    start(tmp_path, FIRST)
    assert (journal.seconds("first") or 0) < 100


TEXT = Command("text", "make.py text", program="python", makes="text")
ALL = Command("all", "train-sd --vae tuned/first --text-encoder text --images pictures --steps 10")


@pytest.fixture
def work(tmp_path: Path, calls: Path) -> Path:
    """A folder for the work in which ALL has been made of a run, a python command's folder and a dataset."""
    (tmp_path / "make.py").write_text(
        "import sys, pathlib\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir()\n(folder / 'a').write_text('1')\n"
    )
    (tmp_path / "pictures" / "_000").mkdir(parents=True)
    (tmp_path / "pictures" / RECORD).write_text('{"edition": 1}')
    start(tmp_path, FIRST, TEXT, ALL)
    return tmp_path


def later(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (time.time() + 60, time.time() + 60))


def make_another_run(work: Path) -> None:
    shutil.rmtree(work / "tuned" / "first")
    start(work, FIRST)


def make_other_words(work: Path) -> None:
    (work / "text" / "a").write_text("2")
    later(work / "text" / "a")


def draw_others(work: Path) -> None:
    (work / "pictures" / RECORD).write_text('{"edition": 2}')
    later(work / "pictures" / "_000")


CHANGES = {"tuned/first": make_another_run, "text": make_other_words, "pictures": draw_others}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_made_of_something_else_than_what_is_there_is_told(work: Path, name: str) -> None:
    CHANGES[name](work)
    with pytest.raises(SdlabError, match=f"was made of another {name} than there is now"):
        start(work, ALL)


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_begun_with_something_else_is_not_gone_on_with(
    work: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(work / "tuned" / "all")
    monkeypatch.setenv("FAKE_KILL_AT", "all:4")
    with pytest.raises(SystemExit):
        start(work, ALL)
    CHANGES[name](work)
    with pytest.raises(SdlabError, match=f"was made of another {name}"):
        start(work, ALL)


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_made_by_hand_is_told_by_its_time(work: Path, name: str) -> None:
    (work / "commands.json").unlink()
    start(work, FIRST, TEXT, ALL)
    CHANGES[name](work)
    with pytest.raises(SdlabError, match=f"is older than {name}, which it is made of"):
        start(work, ALL)


def test_a_folder_made_by_hand_is_told_by_its_time_too(work: Path) -> None:
    reads = Command("more", "-m make tuned/first more", program="python", makes="more")
    shutil.copytree(work / "text", work / "more")
    make_another_run(work)
    with pytest.raises(SdlabError, match="is older than tuned/first"):
        start(work, reads)
    later(work / "more" / "a")
    start(work, reads)


def test_the_same_again_is_not_something_else(work: Path) -> None:
    """Copied without its times, or drawn again: marks are the same."""
    later(work / "text" / "a", work / "text", work / "pictures" / "_000", work / "pictures" / RECORD)
    start(work, ALL)


def test_what_takes_seconds_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nos.makedirs(sys.argv[1])\nopen(sys.argv[1] + '/a', 'w').close()\n"
        "sys.exit(int(os.path.exists('%s')))\n" % (tmp_path / "fails")
    )
    command = Command("text", f"{program} text", program="python", makes="text")
    (tmp_path / "fails").touch()
    with pytest.raises(SystemExit):
        start(tmp_path, command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commands.json", "fails", "program.py"]
    (tmp_path / "fails").unlink()
    start(tmp_path, command)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["a"]
    start(tmp_path, command)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
