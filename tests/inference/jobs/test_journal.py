"""A journal lets the same command go on, and nothing in it leads out of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdlab.dataset import disk
from sdlab.errors import OutOfResources, SdlabError
from sdlab.inference.jobs.journal import Journal, key_of
from sdlab.inference.spec import Format, Shot, Spec

COMMAND = {"prompt": ["a", "b"], "steps": 2, "output": Path("x"), "files": ["00ff"]}


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets go of every lock at the end, as the end of a process does."""
    opened: list[Journal] = []
    monkeypatch.setattr(Journal, "__post_init__", opened.append, raising=False)
    yield
    for journal in opened:
        journal.let_go()


def begin(folder: Path, *, seed: int | None = None, restart: bool = False, **changed: Any) -> Journal:
    return Journal.begin(folder, command={**COMMAND, **changed}, seed=seed, restart=restart, total=3)


def kill(journal: Journal) -> None:
    """What a kill leaves: the lock goes with the process, and nothing is written."""
    journal.let_go()


def picture(journal: Journal, index: int, data: bytes = b"a picture") -> Path:
    path = journal.path.parent / f"sd_{journal.stamp}_{index:04d}.png"
    path.write_bytes(data)
    journal.note_made(index, f"key{index}", path)
    return path


def test_the_same_command_goes_on_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = begin(tmp_path)
    paths = [picture(first, index) for index in (0, 2)]
    kill(first)
    again = begin(tmp_path)
    assert again.resumed and (again.stamp, again.seed) == (first.stamp, first.seed)
    assert [again.made(i, f"key{i}") for i in range(3)] == [paths[0], None, paths[1]]
    assert again.made(0, "another key") is None
    assert "2 of 3 pictures are made; --restart begins anew" in capsys.readouterr().err
    picture(again, 1)
    again.close(complete=True)
    assert sorted(tmp_path.iterdir()) == sorted([*paths, again.path.parent / f"sd_{first.stamp}_0001.png"])
    assert not begin(tmp_path).resumed


@pytest.mark.parametrize("changed", [{"steps": 3}, {"files": ["00fe"]}, {"prompt": ["a"]}])
def test_another_command_or_model_is_another_job(tmp_path: Path, changed: dict[str, Any]) -> None:
    first = begin(tmp_path)
    kill(first)
    other = begin(tmp_path, **changed)
    assert not other.resumed and other.stamp != first.stamp
    kill(other)
    assert begin(tmp_path).stamp == first.stamp


def test_the_seed_decides_whether_it_is_the_same_job(tmp_path: Path) -> None:
    first = begin(tmp_path, seed=7)
    kill(first)
    other = begin(tmp_path, seed=8)
    assert not other.resumed and other.seed == 8
    kill(other)
    again = begin(tmp_path, seed=7)
    assert again.resumed and again.stamp == first.stamp
    kill(again)
    assert begin(tmp_path).seed in (7, 8)  # none given: the newest job's


def test_restart_begins_anew_for_good(tmp_path: Path) -> None:
    first = begin(tmp_path)
    made = picture(first, 0)
    kill(first)
    anew = begin(tmp_path, restart=True)
    assert not anew.resumed and anew.stamp != first.stamp
    anew.close(complete=True)
    assert made.exists() and not begin(tmp_path).resumed


def test_a_job_that_ended_with_failures_is_gone_on_with_by_its_seed_only(tmp_path: Path) -> None:
    first = begin(tmp_path)
    made = picture(first, 0)
    first.close(complete=False)
    again = begin(tmp_path, seed=first.seed)
    assert again.resumed and again.made(0, "key0") == made
    again.close(complete=False)
    assert not begin(tmp_path).resumed and not first.path.exists() and made.exists()


def test_journals_that_ended_go_when_a_new_job_begins_and_no_others(tmp_path: Path) -> None:
    other, running = begin(tmp_path, steps=9), begin(tmp_path, seed=1)
    kill(other)
    ended = [begin(tmp_path, seed=seed) for seed in (2, 3)]
    for journal in ended:
        journal.close(complete=False)
    stopped = begin(tmp_path, seed=4)
    kill(stopped)
    again = begin(tmp_path)
    assert again.stamp == stopped.stamp and all(one.path.exists() for one in ended)  # no new job
    again.close(complete=True)
    new = begin(tmp_path)
    assert not new.resumed
    assert set(tmp_path.iterdir()) == {other.path, running.path, new.path}


def test_a_job_that_runs_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sdlab.inference.jobs.journal import Journal\n"
        "j = Journal.begin(Path(sys.argv[1]), command={'a': 1}, seed=None, restart=False)\n"
        "print(j.stamp, flush=True); time.sleep(60)"
    )
    running = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    with running, running.stdout:
        stamp = running.stdout.readline().strip()
        for restart in (False, True):
            second = Journal.begin(tmp_path, command={"a": 1}, seed=None, restart=restart)
            assert not second.resumed and second.stamp != stamp
            second.close(complete=True)
        running.kill()
    again = Journal.begin(tmp_path, command={"a": 1}, seed=None, restart=False)
    assert again.resumed and again.stamp == stamp


def test_a_picture_that_is_gone_or_has_changed_is_made_again(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    gone, cut, linked = (picture(journal, index) for index in range(3))
    gone.unlink()
    cut.write_bytes(b"a pic")
    linked.unlink()
    linked.symlink_to("elsewhere")  # a link is as long as its target
    assert [journal.made(i, f"key{i}") for i in range(3)] == [None, None, None]
    assert journal.is_noted(0) and not journal.is_noted(3)


def test_a_torn_last_line_is_as_if_never_written(tmp_path: Path) -> None:
    first = begin(tmp_path)
    made = picture(first, 0)
    kill(first)
    with first.path.open("ab") as file:
        file.write(b'{"index": 1, "key": "ke')
    again = begin(tmp_path)
    assert again.made(0, "key0") == made and not again.is_noted(1)
    second = picture(again, 1)
    kill(again)
    assert begin(tmp_path).made(1, "key1") == second


BAD = {
    "a path out of the folder": b'{"index": 1, "key": "k", "file": "../x.png", "bytes": 3}\n',
    "an absolute path": b'{"index": 1, "key": "k", "file": "/etc/passwd", "bytes": 3}\n',
    "a path with a zero": b'{"index": 1, "key": "k", "file": "a\\u0000b", "bytes": 3}\n',
    "a path that is a number": b'{"index": 1, "key": "k", "file": 7, "bytes": 3}\n',
    "a truth for a number": b'{"index": true, "key": "k", "file": "a.png", "bytes": 3}\n',
    "a number below zero": b'{"index": 1, "key": "k", "file": "a.png", "bytes": -3}\n',
    "a huge number": b'{"index": 1' + b"0" * 5000 + b', "key": "k", "file": "a.png", "bytes": 3}\n',
    "no object": b"[1, 2]\n",
    "half a picture": b'{"index": 1}\n',
    "no JSON": b"\xff\xfe\x00 what\n",
    "depth": b"[" * 100_000 + b"\n",
    "a line without end": b'{"index": "' + b"x" * (2 << 20),
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_damaged_journal_is_left_alone_and_said(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    first = begin(tmp_path)
    picture(first, 0)
    kill(first)
    with first.path.open("ab") as file:
        file.write(line)
    before = first.path.read_bytes()
    again = begin(tmp_path)
    assert not again.resumed and again.stamp != first.stamp
    assert first.path.name in capsys.readouterr().err and first.path.read_bytes() == before


HEADS: dict[str, bytes] = {
    "of another program": b'{"job": 1}\n',
    "of a later version": b'{"is": "sdlab job", "version": 2}\n',
    "a stamp with a path": b'{"is": "sdlab job", "version": 1, "digest": "", "stamp": "../x", "seed": 1, "total": 2}\n',
    "a seed of words": b'{"is": "sdlab job", "version": 1, "digest": "", "stamp": "1", "seed": "x", "total": 2}\n',
    "a picture": b"\x89PNG\r\n\x1a\n",
    "no end": b"x" * (2 << 20),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_strangers_file_of_that_name_is_left_alone(tmp_path: Path, head: bytes) -> None:
    strange = tmp_path / ".sdlab-job-x.jsonl"
    strange.write_bytes(head)
    assert not begin(tmp_path).resumed and strange.read_bytes() == head


def test_what_is_no_file_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".sdlab-job-folder.jsonl").mkdir()
    os.mkfifo(tmp_path / ".sdlab-job-pipe.jsonl")
    (tmp_path / ".sdlab-job-link.jsonl").symlink_to("/dev/zero")
    assert not begin(tmp_path).resumed
    assert capsys.readouterr().err.count("left alone") == 3


def test_a_journal_killed_at_its_first_line_hinders_nothing(tmp_path: Path) -> None:
    (tmp_path / ".sdlab-job-20250101-000000.jsonl").write_bytes(b'{"is": "sdl')
    assert not begin(tmp_path).resumed


def test_no_two_jobs_share_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20250101-000000")
    (tmp_path / "sd_20250101-000000_0000.png").touch()
    stamps = [begin(tmp_path, steps=steps).stamp for steps in range(3)]
    assert stamps == [f"20250101-000000-{n}" for n in (2, 3, 4)]


def test_it_works_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(disk, "_lock_exclusive", none)
    first = begin(tmp_path)
    kill(first)
    assert begin(tmp_path).stamp == first.stamp


def test_the_command_is_there_to_read(tmp_path: Path) -> None:
    journal = begin(tmp_path, prompt=["x" * 5000], seed=9)
    head = json.loads(journal.path.read_text(encoding="utf-8").splitlines()[0])
    assert head["command"]["steps"] == "2" and head["seed"] == 9 and len(head["command"]["prompt"]) < 300


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin(tmp_path)
    path = tmp_path / "a.png"
    path.write_bytes(b"x")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfResources, match="No space"):
        journal.note_made(0, "k", path)
    with pytest.raises(OutOfResources, match="No space"):
        begin(tmp_path, steps=9)
    monkeypatch.undo()
    with pytest.raises(SdlabError, match="journal"):
        begin(tmp_path / "not" / "there")
    assert len(list(tmp_path.glob(".sdlab-job-*"))) == 1


def test_ten_thousand_pictures_are_taken_up_in_a_second(tmp_path: Path) -> None:
    first = begin(tmp_path)
    kill(first)
    with first.path.open("a") as file:
        for index in range(10_000):
            file.write(
                json.dumps({"index": index, "key": f"key{index}", "file": f"{index}.png", "bytes": 1}) + "\n"
            )
    started = time.process_time()
    again = begin(tmp_path)
    assert time.process_time() - started < 1 and again.num_noted == 10_000


def test_the_key_is_of_everything_that_changes_the_picture() -> None:
    shot, spec = Shot(0, "a", "", "", 1), Spec(2, 7.0, 64, 64)
    keys = {
        key_of(shot, spec, (), (), Format()),
        key_of(Shot(1, "a", "", "", 1), spec, (), (), Format()),
        key_of(Shot(0, "b", "", "", 1), spec, (), (), Format()),
        key_of(shot, Spec(2, 7.0, 64, 72), (), (), Format()),
        key_of(shot, Spec(2, 7.0, 64, 64, clip_skip=2), (), (), Format()),
        key_of(shot, spec, (), (), Format("webp")),
    }
    assert len(keys) == 6
