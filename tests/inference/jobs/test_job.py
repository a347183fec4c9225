"""A job writes what is finished, goes on where it stood, and one bad picture does not end it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sdlab.errors import ItemsFailed, OutOfResources, SdlabError, Stopped
from sdlab.inference.batch import Batch
from sdlab.inference.jobs import job, missing, output
from sdlab.inference.jobs.journal import Journal
from sdlab.inference.jobs.report import Report
from sdlab.inference.spec import Shot, Spec

SPEC = Spec(4, 7.0, 8, 8)


@dataclass
class Sampler:
    """Draws a picture of the seed's colour; what is in `broken` does something else."""

    broken: dict[int, Callable[[], Any]] = field(default_factory=dict)
    step_s: float = 0.0
    drawn: list[int] = field(default_factory=list)
    at_work: int = 0
    most_at_work: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def sample(self, batch: Sequence[Shot], spec: Spec, *, on_step: Any, **_: Any) -> list[Any]:
        with self.lock:
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            for step in range(spec.steps):
                time.sleep(self.step_s)
                on_step(step + 1, spec.steps)
            return [self.one(shot) for shot in batch]
        finally:
            with self.lock:
                self.at_work -= 1

    def one(self, shot: Shot) -> Any:
        if shot.index in self.broken:
            return self.broken[shot.index]()
        self.drawn.append(shot.index)
        return made(Image.new("RGB", (8, 8), (shot.seed % 256, 0, 0)))


def made(image: Image.Image | None, fault: str = "", safety: str = "none") -> Any:
    return SimpleNamespace(image=image, fault=fault, safety=safety, vae_float32=False)


def raising(reason: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise reason

    return fail


NOT_FINITE: Callable[[], Any] = lambda: made(None, "the denoiser gave numbers that are not finite")  # noqa: E731


@dataclass
class Loaded:
    sampler: Sampler
    num_workers: int = 1
    num_threads: int = 1
    dtype: str = "torch.bfloat16"
    worn: list[Any] = field(default_factory=list)
    misfit: str = ""

    def wear(self, tagged: Any) -> None:
        assert self.sampler.at_work == 0
        if self.misfit in tagged:
            raise SdlabError("fits no key", where=self.misfit)
        self.worn.append(tagged)


@pytest.fixture(autouse=True)
def plain_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures whose recipe is a line of text."""

    def encoded(work: Any, batch: Batch, position: int, made: Any) -> bytes:
        shot = batch.shots[position]
        return f"{shot.index} {shot.seed} {shot.typed} {made.image.getpixel((0, 0))}".encode()

    def peek(path: Path) -> dict[str, Any]:
        index, seed, typed, *_ = path.read_text().split(" ", 3)
        about = {
            "steps": 4,
            "guidance": 7.0,
            "width": 8,
            "height": 8,
            "prefix": "",
            "negative": "",
            "loras": [],
        }
        about |= {"scheduler": {"name": ""}, "strength": None, "clip_skip": 1, "emphasis": "a1111"}
        about |= {"hires": None, "long_prompts": True}
        return {"index": int(index), "seed": int(seed), "prompt": typed, **about}

    monkeypatch.setattr(job, "_encoded", encoded)
    monkeypatch.setattr(missing.metadata, "peek", peek)


def batches(folder: Path, num: int, size: int = 1, **given: Any) -> list[Batch]:
    shots = [Shot(i, f"p{i}", "", "", 100 + i) for i in range(num)]
    groups = [shots[i : i + size] for i in range(0, num, size)]
    named = lambda shot: output.numbered(given.get("stamp", "t"), shot.index)  # noqa: E731
    return [Batch(group, SPEC, folder, named) for group in groups]


def run(
    folder: Path,
    sampler: Sampler,
    *,
    num: int = 6,
    size: int = 1,
    workers: int = 1,
    journal: Journal | None = None,
) -> Report:
    report = Report()
    given = {"stamp": journal.stamp} if journal else {}
    job.make(
        Loaded(sampler, workers),  # type: ignore[arg-type]
        batches(folder, num, size, **given),
        total=num,
        exact=False,
        report=report,
        journal=journal,
    )
    return report


def begin(folder: Path, seed: int | None = None) -> Journal:
    return Journal.begin(folder, command={"a": 1}, seed=seed, restart=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name[-8:]: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 4])
def test_pictures_come_in_order_from_any_number_of_threads(
    tmp_path: Path, workers: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Sampler(step_s=0.001)
    report = run(tmp_path, sampler, num=11, size=size, workers=workers)
    names = [f"sd_t_{i:04d}.png" for i in range(11)]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert [path.name for path in report.paths] == names and report.seconds > 0
    assert (sampler.most_at_work > 1) == (workers > 1) and sampler.most_at_work <= workers


def test_few_batches_wait_however_long_the_job_is(tmp_path: Path) -> None:
    ahead = []
    sampler = Sampler()

    def lazily() -> Iterator[Batch]:
        for number, batch in enumerate(batches(tmp_path, 40)):
            ahead.append(number - len(list(tmp_path.glob("*.png"))))
            yield batch

    job.make(Loaded(sampler, 2), lazily(), total=40, exact=False, report=Report())  # type: ignore[arg-type]
    assert max(ahead) <= 3 and len(list(tmp_path.glob("*.png"))) == 40


def test_each_thread_counts_with_the_threads_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[tuple[int, bool]] = []
    main = threading.main_thread()
    monkeypatch.setattr(
        torch, "set_num_threads", lambda n: asked.append((n, threading.current_thread() is main))
    )
    run(tmp_path, Sampler(step_s=0.001), workers=2)
    assert asked.count((1, False)) == 2 and asked[-1] == (torch.get_num_threads(), True)


@pytest.mark.parametrize("killed_after", [0, 1, 3, 7])
@pytest.mark.parametrize("size", [1, 3])
def test_the_same_job_makes_what_is_missing_and_the_same_set(
    tmp_path: Path, killed_after: int, size: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    run(whole, Sampler(), num=20, size=size)
    first = Sampler(broken={killed_after: raising(KeyboardInterrupt())})
    with pytest.raises(Stopped):
        run(cut, first, num=20, size=size, journal=begin(cut))
    num_done = len(contents(cut))
    second = Sampler()
    report = run(cut, second, num=20, size=size, journal=begin(cut))
    assert contents(cut) == contents(whole)
    assert (len(report.already), len(report.pictures)) == (num_done, 20 - num_done)
    assert num_done == killed_after // size * size and len(second.drawn) == 20 - num_done


def test_a_batch_is_made_whole_again_but_only_what_is_missing_is_written(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    run(tmp_path, Sampler(), num=4, size=4, journal=journal)
    journal.let_go()
    next(tmp_path.glob("*_0002.png")).unlink()
    before = contents(tmp_path)
    again = Sampler()
    report = run(tmp_path, again, num=4, size=4, journal=begin(tmp_path))
    assert sorted(again.drawn) == [0, 1, 2, 3] and [one.index for one in report.pictures] == [2]
    assert contents(tmp_path).items() > before.items() and len(contents(tmp_path)) == 4


def test_a_picture_written_but_not_noted_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "note_made", killed)
        run(tmp_path, Sampler(), num=2, journal=begin(tmp_path))
    assert len(contents(tmp_path)) == 1
    journal = begin(tmp_path)
    assert journal.resumed and journal.num_noted == 0
    report = run(tmp_path, Sampler(), num=2, journal=journal)
    assert len(contents(tmp_path)) == 2 and len(report.already) == 1 and journal.num_noted == 2


def test_a_noted_picture_that_was_cut_short_is_made_again_beside_it(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    first = run(tmp_path, Sampler(), num=1, journal=journal).paths[0]
    journal.let_go()
    first.write_bytes(first.read_bytes()[:-1])
    report = run(tmp_path, Sampler(), num=1, journal=begin(tmp_path))
    assert not report.already and report.paths[0].name == f"sd_{journal.stamp}_0001.png"


def test_anothers_picture_of_the_planned_name_is_not_taken_for_ours(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.let_go()
    other = tmp_path / f"sd_{journal.stamp}_0000.png"
    other.write_text("0 100 another-prompt x")
    report = run(tmp_path, Sampler(), num=1, journal=begin(tmp_path))
    assert report.paths[0].name == f"sd_{journal.stamp}_0001.png" and "another" in other.read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_picture_does_not_end_the_job(tmp_path: Path, workers: int) -> None:
    broken = {0: NOT_FINITE, 5: raising(SdlabError("too long", where="prompt"))}
    report = run(tmp_path, Sampler(broken), num=20, workers=workers)
    assert len(report.pictures) == 18 and [one.index for one in report.failed] == [0, 5]
    assert not report.stopped and not report.is_whole
    with pytest.raises(
        ItemsFailed, match=r"18 pictures made, 2 failed: picture 0 \(seed 100\): .*; picture 5"
    ):
        report.close()


def test_a_model_that_gives_nothing_is_not_asked_for_ever(tmp_path: Path) -> None:
    sampler = Sampler(dict.fromkeys(range(50), NOT_FINITE))
    report = run(tmp_path, sampler, num=50)
    assert len(report.failed) < 6 and "--dtype fp32" in report.stopped and not list(tmp_path.glob("*.png"))
    asked = iter(batches(tmp_path, 50))
    job.make(Loaded(sampler), asked, total=50, exact=False, report=Report())  # type: ignore[arg-type]
    assert len(list(asked)) > 40  # nobody opened the pictures that they start from
    few = run(tmp_path, sampler, num=2)
    assert len(few.failed) == 2 and "--dtype fp32" in few.stopped


def test_bad_pictures_after_a_good_one_are_their_own_fault(tmp_path: Path) -> None:
    report = run(tmp_path, Sampler(dict.fromkeys(range(1, 9), NOT_FINITE)), num=12)
    assert len(report.failed) == 8 and len(report.pictures) == 4 and not report.stopped


def test_pictures_that_are_there_already_clear_the_model(tmp_path: Path) -> None:
    run(tmp_path, Sampler({1: raising(SdlabError("x"))}), num=2, journal=(journal := begin(tmp_path)))
    journal.close(complete=False)
    report = run(tmp_path, Sampler({1: NOT_FINITE}), num=2, journal=begin(tmp_path, seed=journal.seed))
    assert not report.stopped and len(report.failed) == 1


def test_a_model_that_no_longer_gives_anything_is_not_asked_for_ever(tmp_path: Path) -> None:
    run(tmp_path, Sampler(), num=2, journal=(journal := begin(tmp_path)))
    journal.let_go()
    report = run(tmp_path, Sampler(dict.fromkeys(range(2, 50), NOT_FINITE)), num=50, journal=begin(tmp_path))
    assert len(report.already) == 2 and len(report.failed) < 6 and "Stopped" in report.stopped


def test_what_failed_before_the_stop_does_not_end_the_job_that_goes_on(tmp_path: Path) -> None:
    bad: dict[int, Callable[[], Any]] = dict.fromkeys((1, 3, 5, 7), NOT_FINITE)
    with pytest.raises(Stopped):
        run(tmp_path, Sampler(bad | {10: raising(KeyboardInterrupt())}), num=20, journal=begin(tmp_path))
    report = run(tmp_path, Sampler(bad), num=20, journal=begin(tmp_path))
    assert len(report.paths) == 16 and len(report.failed) == 4 and not report.stopped


def test_a_job_that_is_given_up_says_so_though_a_picture_came_late(tmp_path: Path) -> None:
    def late() -> Any:
        time.sleep(0.1)
        return NOT_FINITE()

    report = run(tmp_path, Sampler({0: NOT_FINITE, 1: NOT_FINITE, 2: late}), num=50, workers=2)
    assert len(report.pictures) < 5 and "Stopped" in report.stopped


def test_a_flagged_picture_is_written_and_told(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    report = run(tmp_path, Sampler({1: lambda: made(image, safety="flagged")}), num=3)
    assert len(report.paths) == 3 and report.is_whole
    assert report.failed[0].file == str(tmp_path / "sd_t_0001.png") and "safety" in report.failed[0].why


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_memory_ends_the_job_and_keeps_what_is_there(tmp_path: Path, workers: int) -> None:
    journal = begin(tmp_path)
    with pytest.raises(OutOfResources, match="no memory"):
        run(tmp_path, Sampler({3: raising(OutOfResources("no memory"))}), workers=workers, journal=journal)
    assert len(contents(tmp_path)) == 3 and begin(tmp_path).num_noted == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_the_job_within_a_step(tmp_path: Path, number: int, workers: int) -> None:
    sampler = Sampler(step_s=0.02)
    sampler.broken[2] = lambda: (os.kill(os.getpid(), number), made(Image.new("RGB", (8, 8))))[1]
    started = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, sampler, num=100, workers=workers, journal=begin(tmp_path))
    assert time.monotonic() - started < 2 and stopped.value.exit_code == 128 + number
    done = len(contents(tmp_path))
    assert 3 <= done <= 5 and f"{done} of 100 pictures are made" in str(stopped.value)
    assert begin(tmp_path).num_noted == done


@pytest.mark.parametrize("workers", [1, 2])
def test_a_picture_of_many_steps_is_left_in_the_middle(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.inference.jobs.test_job.SPEC", Spec(1000, 7.0, 8, 8))
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    started = time.monotonic()
    with pytest.raises(Stopped, match="0 of 9"):
        run(tmp_path, Sampler(step_s=0.01), num=9, workers=workers)
    assert time.monotonic() - started < 3 and not contents(tmp_path)


def test_loras_are_changed_only_when_no_thread_is_at_work(tmp_path: Path) -> None:
    from dataclasses import replace

    tags: list[Any] = [
        (),
        (),
        ("a",),
        ("a",),
        (),
        ("bad",),
        (),
        ("a",),
    ]  # what does not fit may leave none worn
    wanted = [
        replace(batch, loras=tag) for batch, tag in zip(batches(tmp_path, len(tags)), tags, strict=True)
    ]
    loaded = Loaded(Sampler(step_s=0.002), 2, misfit="bad")
    report = Report()
    job.make(loaded, wanted, total=len(tags), exact=False, report=report)  # type: ignore[arg-type]
    assert loaded.worn == [(), ("a",), (), (), ("a",)]
    assert [one.index for one in report.failed] == [5] and len(report.pictures) == 7


def test_the_bar_counts_steps_of_all_threads_and_begins_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    journal = begin(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, Sampler({3: raising(KeyboardInterrupt())}), num=8, journal=journal)
    shown: list[float] = []
    begun: list[int] = []

    @contextmanager
    def bar(total: int, *, already: int = 0) -> Iterator[Callable[[float], None]]:
        begun.append(already)
        yield shown.append

    monkeypatch.setattr(job.progress, "pictures", bar)
    run(tmp_path, Sampler(step_s=0.001), num=8, workers=2, journal=begin(tmp_path))
    assert begun == [3] and shown == sorted(shown) and shown[-1] == 8 and min(shown) > 3
    assert any(one % 1 for one in shown)


def test_a_whole_job_of_names_that_are_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    (tmp_path / "a.png").write_bytes(b"x")
    batch = replace(batches(tmp_path, 1)[0], names=lambda shot: iter(["a.png"]))
    report = Report()
    job.make(Loaded(Sampler()), [batch], total=1, exact=False, report=report)  # type: ignore[arg-type]
    assert "another program has made a.png" in capsys.readouterr().err and not report.failed
