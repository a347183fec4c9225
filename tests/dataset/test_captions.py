"""Caption files: one line out of whatever an editor saved."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sdlab.dataset.captions import MAX_BYTES, CaptionError, clean, read_caption

READ = [
    (b"red fish", "red fish"),
    (b"\n\n  # note\n#x\n\tred fish \nblue", "red fish"),
    (b"", None),
    (b"\n \n#\n", None),
    (b"red\rblue", "red"),
    (b"red\r\nblue", "red"),
    ("赤い魚".encode(), "赤い魚"),
    ("赤い魚".encode("utf-8-sig"), "赤い魚"),
    ("赤い魚\nb".encode("utf-16"), "赤い魚"),
    (b"\xfe\xff" + "赤い魚".encode("utf-16-be"), "赤い魚"),
    ("赤い魚".encode("cp932"), "赤い魚"),
    ("ｱｲｳ ①".encode("cp932"), "ｱｲｳ ①"),
    (b"\xef\xbb\xbf", None),
    (b"\xff\xfe", None),
    (b"fish\0", "fish"),
    (b"a\x1b[31mb\x07c", "a [31mb c"),
    ("a\u202eb\u200bc\ufeff".encode(), "abc"),
    ("fish\u2028second".encode(), "fish second"),
    ("e\u0301".encode(), "é"),
    (b"a   b\t\tc", "a b c"),
    (b"\xf0\x9f\x90\x9f fish", "🐟 fish"),
    (b"x" * (MAX_BYTES - 1), "x" * (MAX_BYTES - 1)),
]


@pytest.mark.parametrize("data, caption", READ, ids=range(len(READ)))
def test_the_first_line_that_says_something_is_the_caption(
    tmp_path: Path, data: bytes, caption: str | None
) -> None:
    path = tmp_path / "a.cap"
    path.write_bytes(data)
    assert read_caption(str(path)) == caption


REFUSED = [
    (b"x" * (MAX_BYTES + 1), "larger than"),
    (b"\x80\x80", "not text"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00", "not text"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\b\6\0\0\0", "not text"),
    ("red fish".encode("utf-16-le"), "UTF-16 without"),
    (b"\xef\xbb\xbf\xff", "not text"),
    (b"\xff\xfea", "not text"),
    (b"\0" * 1000, "not text"),
]


@pytest.mark.parametrize("data, words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_text_is_an_error_with_the_reason(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a.cap"
    path.write_bytes(data)
    with pytest.raises(CaptionError, match=words):
        read_caption(str(path))


def test_a_missing_file_a_folder_and_a_pipe_are_errors_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.cap")
    began = time.monotonic()
    for name, words in (("gone.cap", "No such file"), (".", "a folder"), ("pipe.cap", "a named pipe")):
        with pytest.raises(CaptionError, match=words):
            read_caption(str(tmp_path / name))
    assert time.monotonic() - began < 2


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.cap"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte: reading it would not fit into memory
    with pytest.raises(CaptionError, match="larger than"):
        read_caption(str(path))


@pytest.mark.parametrize("text", ["plain text", "ünï", "a\u0301  b", "\x00\x01", "", " \u3000 "])
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert clean(text) == clean(text).strip()
