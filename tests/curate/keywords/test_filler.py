"""The list of words that are never keywords."""

from __future__ import annotations

import pytest

from sdlab.curate.keywords.filler import Filler, default_filler, read_filler
from sdlab.errors import SdlabError


def test_the_default_list_reads_as_itself(tmp_path):
    path = tmp_path / "filler.txt"
    path.write_text(default_filler(), encoding="utf-8")
    assert read_filler(path) == read_filler(None)
    assert read_filler(path).fingerprint == read_filler(None).fingerprint
    assert {"photo", "background"} <= read_filler(None).words and "araf" in read_filler(None).prefixes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_words_phrases_and_prefixes_are_told_apart(tmp_path, encoding):
    path = tmp_path / "own.txt"
    path.write_text("# mine\r\n  Photo \r\nclose   up\r\n\r\nAraf*\r\ncafe\u0301\r\nphoto", encoding=encoding)
    filler = read_filler(path)
    assert filler == Filler(frozenset({"photo", "café"}), frozenset({("close", "up")}), ("araf",))
    assert filler.has("araffe") and filler.has("photo") and not filler.has("photos")


def test_an_empty_list_drops_nothing(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"# nothing\n")
    assert read_filler(path) == Filler() and not Filler().has("photo")


def test_the_fingerprint_is_of_what_the_list_says(tmp_path):
    texts = ["cat\ndog\n", "# note\nDOG\n\ncat", "cat dog", "cat\ndo*"]
    prints = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
        prints.append(read_filler(tmp_path / f"{number}.txt").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_every_wrong_line_is_named(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("cat\n*\na*b\nclose up*\nx*\nfine*\n")
    with pytest.raises(SdlabError) as error:
        read_filler(path)
    for line in ("line 2", "line 3", "line 4", "line 5", "own.txt", "--print-filler"):
        assert line in str(error.value)
    assert "line 6" not in str(error.value)


def test_what_cannot_be_read_is_an_error_with_a_way_on(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "data").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "large").write_bytes(b"cat\n" * 100_000)
    for name in ("missing", "folder", "data", "large"):
        with pytest.raises(SdlabError, match=name) as error:
            read_filler(tmp_path / name)
        assert error.value.exit_code == 2 and "--print-filler" in str(error.value)


def test_a_picture_is_no_list_of_words(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    with pytest.raises(
        SdlabError, match=r"a\.png: is no list of words, one on each line \(not text"
    ) as error:
        read_filler(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def test_the_longest_phrase_counts():
    filler = Filler(phrases=frozenset({("close", "up"), ("close", "up", "view")}))
    words = [frozenset({word}) for word in "a close up view".split()]
    assert [filler.phrase_at(words, start) for start in range(4)] == [0, 3, 0, 0]
