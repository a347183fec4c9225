"""What came of a job is told to people in a line and to programs in report.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlab.errors import ItemsFailed
from sdlab.inference.jobs.report import Picture, Report


def made(folder: Path, num: int) -> Report:
    report = Report(seconds=2.5)
    report.pictures += [Picture(folder / f"{i}.png", i, 7 + i, f"prompts.txt:{i + 1}") for i in range(num)]
    return report


def test_report_names_what_was_made_and_what_failed(tmp_path: Path) -> None:
    report = made(tmp_path, 2)
    report.already[5] = tmp_path / "5.png"
    report.fail("prompts.txt:9", "no such wildcard", index=8, prompt="a __x__", seed=15)
    path = report.write(tmp_path)
    assert path == tmp_path / "report.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["made"][1] == {"file": "1.png", "index": 1, "seed": 8, "where": "prompts.txt:2"}
    assert (told["already"], told["seconds"], told["seconds_per_picture"]) == (1, 2.5, 1.25)
    assert told["failed"] == [
        {"where": "prompts.txt:9", "why": "no such wildcard", "index": 8, "prompt": "a __x__", "seed": 15, "file": ""}
    ]  # fmt: skip
    with pytest.raises(
        ItemsFailed, match=r"3 pictures made, 1 failed: prompts.txt:9 picture 8 \(seed 15\): no"
    ):
        report.close()


def test_one_good_picture_needs_no_report(tmp_path: Path) -> None:
    assert made(tmp_path, 1).write(tmp_path) is None and list(tmp_path.iterdir()) == []
    alone = Report()
    alone.fail("", "the disk is odd")
    assert alone.write(tmp_path) == tmp_path / "report.json"


def test_a_report_replaces_only_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"mine": 1}')
    for num in (2, 3):
        assert made(tmp_path, num).write(tmp_path) == tmp_path / "report_2.json"
    assert (tmp_path / "report.json").read_text() == '{"mine": 1}'
    assert len(json.loads((tmp_path / "report_2.json").read_text())["made"]) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_the_last_line_tells_the_pace(tmp_path: Path) -> None:
    report = made(tmp_path, 5)
    assert report.summary() == "5 pictures in 2.5 s: 0.5 s a picture, 2 pictures/s"
    report.already[9] = tmp_path / "9.png"
    assert report.summary().endswith("2 pictures/s; 1 picture there already")
    assert Report().summary() == "no new picture"


def test_pictures_stand_in_the_order_of_the_job_whoever_made_them(tmp_path: Path) -> None:
    report = Report(already={1: Path("b"), 3: Path("d")})
    report.pictures += [Picture(Path("c"), 2, 0), Picture(Path("a"), 0, 0)]
    assert [str(path) for path in report.paths] == ["a", "b", "c", "d"]


def test_a_picture_that_is_there_but_not_good_leaves_nothing_to_make() -> None:
    report = Report()
    assert report.is_whole
    report.fail("", "blacked out", index=3, file="3.png")
    assert report.is_whole and str(report.failed[0]) == "3.png: blacked out"
    report.fail("", "not finite", index=4, seed=11)
    assert not report.is_whole and str(report.failed[1]) == "picture 4 (seed 11): not finite"


def test_many_failures_are_counted_not_listed() -> None:
    report = Report()
    for index in range(30):
        report.fail("", "bad", index=index)
    with pytest.raises(ItemsFailed, match="picture 9: bad; and 20 more"):
        report.close()
