"""What brackets mean, in the three readings; and that no text breaks or stalls the reader."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from sdlab.inference.prompts.grammar import MAX_NESTING, Break, Parsed, Span, parse

UP, DOWN = 1.1, 1 / 1.1
B = Break()

# From the rules that A1111's and ComfyUI's users know; the four-bracket one with 1.5730000000000004 is A1111's own
A1111 = [
    ("", ()),
    ("red star", (("red star", 1.0),)),
    ("(red) star", (("red", UP), (" star", 1.0))),
    ("((red)) star", (("red", UP * UP), (" star", 1.0))),
    ("(((red)))", (("red", UP * UP * UP),)),
    ("[red] star", (("red", DOWN), (" star", 1.0))),
    ("[[red]]", (("red", DOWN * DOWN),)),
    ("[(red)]", (("red", UP * DOWN),)),
    ("(red:1.3)", (("red", 1.3),)),
    ("(red: 1.3 )", (("red", 1.3),)),
    ("(red:.5)", (("red", 0.5),)),
    ("(red:2.)", (("red", 2.0),)),
    ("(red:+1.2)", (("red", 1.2),)),
    ("(red:-1)", (("red", -1.0),)),
    ("(red:0)", (("red", 0.0),)),
    ("((red:1.3))", (("red", 1.3 * UP),)),
    ("(((house:1.3)))", (("house", 1.5730000000000004),)),
    ("(a (b:1.5) c:0.5)", (("a ", 0.5), ("b", 0.75), (" c", 0.5))),
    ("(a:b)", (("a:b", UP),)),
    ("(a:b:1.2)", (("a:b", 1.2),)),
    ("(1:1.5)", (("1", 1.5),)),
    ("(a:1.2.3)", (("a:1.2.3", UP),)),
    ("(a:1.2x)", (("a:1.2x", UP),)),
    ("[a:1.2]", (("a:1.2", DOWN),)),
    ("a:1.2) b", (("a:1.2) b", 1.0),)),
    ("(red:1.0) star", (("red star", 1.0),)),
    (r"\(red\)", (("(red)", 1.0),)),
    (r"\[red\]", (("[red]", 1.0),)),
    (r"\\(red)", (("\\", 1.0), ("red", UP))),
    (r"(a \(b\) c:1.2)", (("a (b) c", 1.2),)),
    (r"(\(\))", (("()", UP),)),
    ("()", ()),
    ("a()b", (("ab", 1.0),)),
    ("a BREAK b", (("a", 1.0), B, ("b", 1.0))),
    ("BREAK", (B,)),
    ("BREAK BREAK a", (B, B, ("a", 1.0))),
    ("BREAKFAST and a coffee BREAK", (("BREAKFAST and a coffee", 1.0), B)),
    ("break", (("break", 1.0),)),
    ("(a BREAK b:1.2) c", (("a", 1.2), B, ("b", 1.2), (" c", 1.0))),
    ("(red star", (("red star", UP),)),
    ("[red star", (("red star", DOWN),)),
    ("a (b", (("a ", 1.0), ("b", UP))),
    ("a) b", (("a) b", 1.0),)),
    ("a] b", (("a] b", 1.0),)),
    ("(a] b)", (("a] b", UP),)),
    ("([a) b]", (("a", UP * DOWN), (" b", DOWN))),
    ("(a:1.2) (b:1.2)", (("a", 1.2), (" ", 1.0), ("b", 1.2))),
    ("(a:1.2)(b:1.2)", (("ab", 1.2),)),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        (("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
         (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)),
    ),
    ("(masterpiece), best quality", (("masterpiece", UP), (", best quality", 1.0))),
]  # fmt: skip
COMFY = [
    ("(red) star", (("red", UP), (" star", 1.0))),
    ("((red))", (("red", UP * UP),)),
    ("(red:1.3)", (("red", 1.3),)),
    ("((red:1.3))", (("red", 1.3),)),
    ("((red):1.3)", (("red", 1.3 * UP),)),
    ("(a (b:1.5) c:0.5)", (("a ", 0.5), ("b", 1.5), (" c", 0.5))),
    ("[red]", (("[red]", 1.0),)),
    (r"\(red\) \[", ((r"(red) \[", 1.0),)),
    ("a BREAK b", (("a BREAK b", 1.0),)),
    ("(a:b)", (("a:b", UP),)),
    ("(:1.3)", ((":1.3", UP),)),
    ("(a:nan)", (("a:nan", UP),)),
    ("(a (b)", (("(a (b)", 1.0),)),
    ("a) (b:1.2)", (("a) (b:1.2)", 1.0),)),
    ("(embedding:neg:1.2)", (("embedding:neg", 1.2),)),
]


def spans(parsed: Parsed) -> tuple[object, ...]:
    return tuple((part.text, part.weight) if isinstance(part, Span) else part for part in parsed.parts)


@pytest.mark.parametrize(("text", "expected"), A1111)
def test_a1111s_grammar_to_the_last_digit(text: str, expected: tuple[object, ...]) -> None:
    assert spans(parse(text, "a1111")) == expected


@pytest.mark.parametrize(("text", "expected"), COMFY)
def test_comfys_grammar_has_numbers_that_replace_and_square_brackets_that_are_text(
    text: str, expected: tuple[object, ...]
) -> None:
    assert spans(parse(text, "comfy")) == expected


@pytest.mark.parametrize("text", [text for text, _ in A1111 if text])
def test_none_sends_every_text_as_it_was_typed(text: str) -> None:
    assert parse(text, "none") == Parsed((Span(text, 1.0),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a (b", "'(b' (character 3): never closed"),
        ("ab]", "(character 3): closes no bracket"),
        ("cat++, dog", "(character 4): signs and numbers"),
        ("(cat)1.2", "(character 6): signs and numbers"),
        ("(cat)+", "(character 6): signs and numbers"),
        ("(poster:1984)", "the weight 1984"),
        ("[cat:dog:0.5]", "changes the prompt on the way"),
        ("[cat|dog]", "changes the prompt on the way"),
        ("cat AND dog", "mixes two prompts"),
        ("(" * (MAX_NESTING + 1) + "a" + ")" * (MAX_NESTING + 1), f"more than {MAX_NESTING} brackets deep"),
    ],
)
def test_what_probably_means_something_else_is_warned_about_with_its_place(text: str, said: str) -> None:
    warnings = parse(text, "a1111").warnings
    assert len(warnings) == 1
    assert said in warnings[0]


@pytest.mark.parametrize(
    "text", ["(a), [b], (c:1.2), \\( d", "c++ code", "a-b--c", "note: a, b", "1girl, smile", "a BREAK b"]
)
def test_what_is_in_order_is_not_warned_about(text: str) -> None:
    assert parse(text, "a1111").warnings == ()


def test_many_faults_make_one_short_warning() -> None:
    (warning,) = parse("a)" * 1000, "a1111").warnings
    assert "997 more" in warning
    assert len(warning) < 300


HOSTILE = [
    "(",
    ")",
    "[",
    "]",
    "(a",
    "([)]",
    ": ",
    " ",
    "\\",
    "(a:1.1)",
    "BREAK ",
    "[a|",
    "[|",
    "+",
    ")+",
    "[a:b:",
    "1",
]


@pytest.mark.parametrize("emphasis", ["a1111", "comfy"])
def test_hostile_texts_are_read_in_time_that_grows_with_their_length(emphasis: str) -> None:
    texts = [unit * (10_000 // len(unit)) for unit in HOSTILE]
    texts += [
        "(" * 4999 + "a" + ")" * 4999,
        "(a:" + "1" * 10_000 + ")",
        "(a:" + "1" * 10_000,
        " " * 10_000 + "B",
    ]
    begun = time.process_time()
    for text in texts:
        for part in parse(text, emphasis).parts:  # type: ignore[arg-type]
            assert isinstance(part, Break) or abs(part.weight) < float("inf")
    assert time.process_time() - begun < 4  # about 0.5 s; one that is quadratic alone takes longer


@pytest.mark.parametrize("emphasis", ["a1111", "comfy"])
def test_neighbours_differ_in_weight_and_none_is_empty(emphasis: str) -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(["(", ")", "[", "]", ":", "1.2", "\\", " ", "a", "b", "BREAK"], k=20))
        parts = parse(text, emphasis).parts  # type: ignore[arg-type]
        assert all(isinstance(part, Break) or part.text for part in parts)
        for one, other in pairwise(parts):
            assert isinstance(one, Break) or isinstance(other, Break) or one.weight != other.weight


def test_words_are_kept_whatever_the_brackets() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices(["(", ")", "[", "]", " ", "a", "b"], k=30))
        for emphasis in ("a1111", "comfy"):
            kept = "".join(p.text for p in parse(text, emphasis).parts if isinstance(p, Span))  # type: ignore[arg-type]
            assert [c for c in kept if c in "ab "] == [c for c in text if c in "ab "]
