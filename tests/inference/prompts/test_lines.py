"""Prompts: what is read from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.prompts import lines
from sdlab.inference.spec import Shot, in_batches, shots


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"red star\nblue fish\n", ["red star", "blue fish"]),
        (b"\xef\xbb\xbfred star\r\nblue fish", ["red star", "blue fish"]),
        (b"# a comment\n\n   \n  red star  \n #also\n", ["red star"]),
        ("猫, 赤い背景\n".encode(), ["猫, 赤い背景"]),
        ("one\u2028line".encode(), ["one\u2028line"]),
        (b"number # 5", ["number # 5"]),
    ],
)
def test_prompt_file_gives_one_prompt_a_line(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert lines.gather((), path) == expected


def test_prompts_of_flags_come_before_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("c")
    assert lines.gather(("a", "b"), path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"# nothing\n\n", "no prompt"), (b"good\nb\xffd\n", "line 2 is not UTF-8"), (None, "cannot read it")],
)
def test_bad_prompt_file_is_refused_with_its_name(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SdlabError, match=word) as caught:
        lines.gather((), path)
    assert str(path) in str(caught.value)


def test_no_prompt_at_all_says_what_to_type() -> None:
    with pytest.raises(SdlabError, match="--prompt ") as caught:
        lines.gather((), None)
    assert caught.value.exit_code == 2


def test_prompt_that_is_not_text_is_refused() -> None:
    with pytest.raises(SdlabError, match="UTF-8"):
        lines.gather(("caf\udce9",), None)


def test_seeds_and_numbers_run_on_over_prompts() -> None:
    made = shots(["a", "b"], num=2, prefix="p, ", negative="n", seed=10)
    assert [(s.index, s.prompt, s.seed) for s in made] == [
        (0, "p, a", 10),
        (1, "p, a", 11),
        (2, "p, b", 12),
        (3, "p, b", 13),
    ]
    assert made[0] == Shot(0, "a", "p, ", "n", 10)
    assert [len(group) for group in in_batches(made, 3)] == [3, 1]
