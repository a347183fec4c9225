"""Captions are kept, added to or replaced, and what someone wrote is never lost."""

from __future__ import annotations

import codecs

import pytest

from sdlab.curate.categorize.captionfiles import change, edited, joined, speak, told
from sdlab.dataset.captions import CaptionError

ODD = b"\x81\xff\xfe\x00\x01\x02\x03\x04"  # text in no encoding


@pytest.mark.parametrize(
    ("how", "own", "made", "text"),
    [
        ("keep", "mine", "a cat", "mine"),
        ("keep", "", "a cat", "a cat"),
        ("append", "mine", "a cat", "mine, a cat"),
        ("append", "mine, a cat", "a cat", "mine, a cat"),
        ("append", "mine,", "a cat", "mine, a cat"),
        ("append", "", "a cat", "a cat"),
        ("append", "mine", "", "mine"),
        ("replace", "mine", "a cat", "a cat"),
        ("replace", "mine", "", ""),
    ],
)
def test_the_caption_that_counts(how, own, made, text):
    assert told(own, made, how) == text


def test_a_word_that_begins_like_the_caption_is_not_it():
    assert joined("a cathedral", "a cat") == "a cathedral, a cat"
    assert joined("A Cat on a mat", "a cat") == "A Cat on a mat"
    assert joined("why? (yes)", "why? (yes)") == "why? (yes)"


def test_nothing_happens_to_a_caption_that_is_kept():
    assert change(b"mine\n", own="mine", made="a cat", how="keep").kind == "none"
    assert change(None, own="from txt", made="a cat", how="keep").kind == "none"


def test_a_picture_without_caption_gets_one_in_each_way():
    for how in ("keep", "append", "replace"):
        assert change(None, own="", made="a cat", how=how) == ("new", b"a cat\n")


def test_a_txt_is_taken_over_into_the_cap_with_append_and_left_out_with_replace():
    assert change(None, own="from txt", made="a cat", how="append") == ("new", b"from txt, a cat\n")
    assert change(None, own="from txt", made="a cat", how="replace") == ("new", b"a cat\n")


def test_replace_keeps_a_backup_but_where_the_text_is_the_same():
    assert change(b"mine\n", own="mine", made="a cat", how="replace") == ("backup", b"a cat\n")
    assert change(b"# note\na cat\n", own="a cat", made="a cat", how="replace").kind == "none"
    assert change(ODD, own="", made="a cat", how="replace") == ("backup", b"a cat\n")


@pytest.mark.parametrize("how", ["keep", "append"])
def test_what_is_not_text_is_not_written_to(how):
    with pytest.raises(CaptionError):
        change(ODD, own="", made="a cat", how=how)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"mine", b"mine, a cat"),
        (b"# note\r\n\r\n  mine,  \r\nsecond line\r\n", b"# note\r\n\r\n  mine, a cat\r\nsecond line\r\n"),
        (codecs.BOM_UTF8 + "caf\u00e9\n".encode(), "caf\u00e9, a cat\n".encode()),
        ("Garten\u2013T\u00fcr\n".encode("utf-16"), "Garten\u2013T\u00fcr, a cat\n".encode()),
        ("猫\n".encode("cp932"), "猫, a cat\n".encode()),
        (b"", b"a cat\n"),
        (b"# only a note", b"# only a note\na cat\n"),
        (b"# only a note\r\n", b"# only a note\r\na cat\r\n"),
    ],
)
def test_append_changes_the_line_that_counts_and_no_other(old, new):
    assert edited(old, "a cat", append=True) == new
    assert edited(new, "a cat", append=True) is None  # once is enough


def test_keep_fills_a_file_of_comments_only():
    assert change(b"# note\n", own="", made="a cat", how="keep") == ("edit", b"# note\na cat\n")
    assert edited(b"mine\n", "a cat", append=False) is None


def test_a_model_never_writes_a_comment_or_two_lines():
    assert speak("# a\ncat\u200b ") == "a cat"
    assert speak("\x00#\n") == ""
    assert change(None, own="", made=speak("#"), how="keep").kind == "none"
