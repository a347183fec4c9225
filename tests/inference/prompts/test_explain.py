"""What a person is shown of a prompt."""

from __future__ import annotations

from sdlab.inference.prompts.explain import WIDTH, Explained, Token, as_lines
from sdlab.inference.prompts.tags import Tag

RED = Token("red", (7,), 1.1)
STAR = (Token("st..", (8,)), Token("ar", (9,)))


def test_tokens_stand_in_rows_of_one_weight_with_their_numbers() -> None:
    shown = as_lines(
        Explained("(red) star", ((RED, *STAR),), 75, loras=(Tag("ink", 0.5),), warnings=("odd",))
    )
    assert shown == [
        "prompt: (red) star",
        "3 tokens, 1 chunk of 75",
        "  weight  token (number), .. where a word goes on",
        "  1.1     red (7)",
        "  1       st.. (8)  ar (9)",
        "LoRA ink, weight 0.5",
        "warning: odd",
    ]


def test_chunks_are_told_apart_where_there_are_several() -> None:
    shown = as_lines(Explained("a BREAK b", ((RED,), ()), 75))
    assert "chunk 1, 1 token" in shown
    assert shown[-2:] == ["chunk 2, 0 tokens", "  (empty)"]


def test_flux2_has_a_window_and_no_weights() -> None:
    shown = as_lines(Explained("star", (STAR,), 512, num_around=13, weighs=False, lost="and a lighthouse"))
    assert shown == [
        "prompt: star",
        "2 tokens, 15 of 512 with what the model puts around a prompt; brackets are text",
        "  st.. (8)  ar (9)",
        "cut off: and a lighthouse",
    ]


def test_long_rows_are_wrapped_between_tokens() -> None:
    chunk = tuple(Token(f"word{i}", (i,)) for i in range(75))
    shown = as_lines(Explained("word " * 75, (chunk,), 75))
    assert max(map(len, shown)) <= WIDTH
    assert all(any(f"word{i} ({i})" in line for line in shown) for i in range(75))
