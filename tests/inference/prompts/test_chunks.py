"""Chunks of 75 tokens: none is lost, phrases are not torn apart, and one text is one text to the tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from sdlab.errors import SdlabError
from sdlab.inference.prompts.chunks import Chunk, ClipWords, Piece, check_clip_skip, chunked, filled
from sdlab.inference.prompts.grammar import Break, Span, parse
from sdlab.models.bases import builtin_folder

COMMA = 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = CLIPTokenizer.from_pretrained(builtin_folder("mini-sd") / "tokenizer", local_files_only=True)
    made.model_max_length = 77
    return made


def ids_of(chunks: list[Chunk]) -> list[list[int]]:
    return [list(chunk.ids) for chunk in chunks]


def cut(ids: list[int], size: int = 75) -> list[list[int]]:
    return ids_of(chunked([Piece(tuple(ids), 1.0)], size=size, comma=COMMA))


def test_a_full_chunk_goes_on_in_the_next() -> None:
    ids = list(range(1, 161))
    assert cut(ids) == [ids[:75], ids[75:150], ids[150:]]
    assert cut(ids[:75]) == [ids[:75]]
    assert cut([]) == [[]]


def test_a_chunk_ends_after_a_comma_of_its_last_20_tokens() -> None:
    near = [1] * 55 + [COMMA] + [2] * 30  # the comma is the 56th of 75
    assert cut(near) == [near[:56], near[56:]]
    far = [1] * 54 + [COMMA] + [2] * 30
    assert cut(far) == [far[:75], far[75:]]
    last = [1] * 74 + [COMMA] + [2] * 30
    assert cut(last) == [last[:75], last[75:]]


def test_the_comma_that_opens_a_chunk_is_no_reason_to_cut_earlier() -> None:
    ids = [1] * 60 + [COMMA] + [2] * 14 + [COMMA] + [3]
    assert cut(ids) == [ids[:75], ids[75:]]


def test_a_break_fills_up_the_chunk() -> None:
    a, b = Piece((1, 2), 1.0), Piece((3,), 1.2)
    assert ids_of(chunked([a, Break(), b], size=75, comma=COMMA)) == [[1, 2], [3]]
    assert ids_of(chunked([a, Break()], size=75, comma=COMMA)) == [[1, 2]]
    assert ids_of(chunked([Break(), a], size=75, comma=COMMA)) == [[], [1, 2]]


def test_what_belongs_together_is_not_split_where_it_fits() -> None:
    before, together = Piece(tuple(range(1, 71)), 1.0), Piece(tuple(range(100, 110)), 1.0, whole=True)
    assert ids_of(chunked([before, together], size=75, comma=COMMA)) == [list(before.ids), list(together.ids)]
    long = Piece(tuple(range(100, 200)), 1.0, whole=True)
    assert [len(ids) for ids in ids_of(chunked([long], size=75, comma=COMMA))] == [75, 25]


def test_weights_stay_with_their_tokens() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pieces = [Piece(tuple(rng.choices(range(9), k=rng.randrange(60))), rng.random()) for _ in range(6)]
        chunks = chunked(pieces, size=75, comma=COMMA)
        sent = [(number, piece.weight) for piece in pieces for number in piece.ids]
        assert [pair for c in chunks for pair in zip(c.ids, c.weights, strict=True)] == sent
        assert all(len(c.ids) <= 75 for c in chunks)


def test_no_token_of_a_thousand_prompts_is_lost(tokenizer: Any) -> None:
    rng, words = random.Random(2), ClipWords(tokenizer)
    alphabet = [
        "red ",
        "star, ",
        "(",
        ")",
        "[",
        "]",
        ":1.2)",
        "BREAK ",
        "lighthouse ",
        "日本 ",
        "ÿ",
        "\\(",
        "\n",
        ", ,",
        "<",
    ]
    for _ in range(1000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(80)))
        spans = [part.text for part in parse(text, "a1111").parts if isinstance(part, Span)]
        alone = [number for span in spans for number in tokenizer(span, add_special_tokens=False).input_ids]
        chunks = words.chunks(text, "a1111")
        assert [number for chunk in chunks for number in chunk.ids] == alone
        assert all(len(chunk.ids) <= 75 for chunk in chunks)


@pytest.mark.parametrize("second", [False, True])
def test_a_short_text_is_filled_up_as_the_tokenizer_does(
    second: bool, tiny_sd_folder: Path, tiny_sd2_folder: Path
) -> None:
    folder = tiny_sd2_folder if second else tiny_sd_folder
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    words = ClipWords(tokenizer)
    for text in ("", "red star", "x" * 75, "[red] ((star))"):
        whole = tokenizer(text, padding="max_length", max_length=77, truncation=True)
        ids, weights, mask = filled(words.chunks(text, "none")[0], words.marks)
        assert ids == whole.input_ids
        assert mask == whole.attention_mask
        assert weights == [1.0] * 77


def test_cut_is_the_tokenizers_own_cut(tokenizer: Any) -> None:
    words, text = ClipWords(tokenizer), "red star, " * 60
    whole = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert filled(words.cut(text, "none"), words.marks)[0] == whole


def test_a_name_stands_for_its_vectors_with_the_weight_of_its_place(tokenizer: Any) -> None:
    words = ClipWords(tokenizer, {"inkwash": 2, "bad-hands": 3})
    first = words.first_vector
    (chunk,) = words.chunks("red (Bad-Hands:1.3) embedding:inkwash.pt inkwashed", "a1111")
    vectors = [
        (number - first, weight)
        for number, weight in zip(chunk.ids, chunk.weights, strict=True)
        if number >= first
    ]
    assert vectors == [(2, 1.3), (3, 1.3), (4, 1.3), (0, 1.0), (1, 1.0)]
    plain = ClipWords(tokenizer).chunks("inkwashed", "a1111")[0].ids
    assert chunk.ids[-len(plain) :] == plain


def test_tokens_are_shown_as_a_person_reads_them(tokenizer: Any) -> None:
    words = ClipWords(tokenizer, {"inkwash": 2})
    (chunk,) = words.chunks("star 日 inkwash", "a1111")
    shown = words.readable(chunk.ids)
    assert shown[0][0] == "star"
    assert [text for text, _ in shown[1:]] == ["日", "inkwash"]
    assert [number for _, ids in shown for number in ids] == list(chunk.ids)


def test_a_layer_the_encoder_does_not_have_is_refused() -> None:
    check_clip_skip(3, 2)
    with pytest.raises(SdlabError, match="4 is too far back: this text encoder has 2 layers"):
        check_clip_skip(4, 2)
