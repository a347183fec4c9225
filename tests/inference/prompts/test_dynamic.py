"""Choices and wildcards: what is drawn, by what, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.prompts import dynamic
from sdlab.inference.prompts.dynamic import expand, read_wildcards, warnings_of, wildcards_in

FROZEN = [  # (template, what seeds 0 to 3 make of it): recipes and journals hang on these, so they never change
    ("{red|green|blue} fish", ["red fish", "blue fish", "red fish", "blue fish"]),
    ("{2$$, $$a|b|c}", ["a, b", "c, a", "a, b", "c, b"]),
    ("{2$$a|b|c}", ["a, b", "c, a", "a, b", "c, b"]),
    ("{1-2$$ and $$a|b|c}", ["a", "c and a", "a", "c"]),
    ("{0.2::a|b}", ["b", "b", "b", "b"]),
    ("{{a|b}|{c|d}}", ["b", "c", "a", "d"]),
    ("{3$$a|b}", ["a, b, a", "b, a, b", "a, b, b", "b, a, a"]),
    ("{x {a|b}}", ["{x a}", "{x b}", "{x a}", "{x b}"]),
    ("a (b|c) {d|(e:1.2)}", ["a (b|c) d", "a (b|c) (e:1.2)", "a (b|c) d", "a (b|c) (e:1.2)"]),
    (r"\{a\|b\} \\{a|b} \(", ["{a|b} \\\\a \\(", "{a|b} \\\\b \\(", "{a|b} \\\\a \\(", "{a|b} \\\\b \\("]),
    (r"{2$$ \| $$a|b}", ["a | b", "b | a", "a | b", "b | a"]),
    (r"{0.5::a\{|b}", ["a{", "b", "a{", "b"]),
    ("{|a}", ["", "a", "", "a"]),
    ("{a|{b|c}", ["{a|b", "{a|c", "{a|b", "{a|c"]),
]
AS_TYPED = [
    "red star",
    "{x}",
    "a}b{c",
    "(a|b) [c] (d:1.2)",
    "cost $$ 5",
    "__ foo__",
    "____",
    "{}",
    "a\\(b\\)",
]


def made(template: str, seed: int = 0, wildcards=None) -> str:
    return expand(template, seed=seed, wildcards=wildcards, part="prompt")


@pytest.fixture
def folder(tmp_path: Path):
    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('SLASH', '/')}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return read_wildcards(tmp_path)

    return write


@pytest.mark.parametrize(("template", "wanted"), FROZEN)
def test_the_same_seed_and_template_always_give_the_same_text(template, wanted):
    assert [made(template, seed) for seed in range(4)] == wanted


def test_another_process_draws_the_same():
    code = (
        "from sdlab.inference.prompts.dynamic import expand; import sys;"
        "print(expand('{9$$a|b|c|d|e|f|g|h|i}', seed=2**40, wildcards=None, part='negative'));"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == expand("{9$$a|b|c|d|e|f|g|h|i}", seed=2**40, wildcards=None, part="negative")


@pytest.mark.parametrize("text", AS_TYPED)
def test_what_is_no_choice_stays_as_typed(text):
    assert [made(text, seed) for seed in range(3)] == [text] * 3


def test_a_template_is_read_once_however_many_pictures(monkeypatch, folder):
    wildcards, read = folder(colour="red\nblue\n{dark|light} green"), []
    whole = dynamic._tokens
    monkeypatch.setattr(dynamic, "_tokens", lambda text: read.append(text) or whole(text))
    template = "a template of this test, {x|__colour__} {2$$__colour__}"
    for seed in range(100):
        made(template, seed, wildcards)
    assert read.count(template) == 1 and len(read) <= 4


def test_prompt_and_negative_prompt_are_drawn_apart():
    template = "{9$$a|b|c|d|e|f|g|h|i}"
    drawn = {part: expand(template, seed=3, wildcards=None, part=part) for part in ("prompt", "negative")}
    assert drawn["prompt"] != drawn["negative"]


def test_words_around_a_choice_do_not_change_it():
    assert [made("a {b|c|d} e", s)[2] for s in range(20)] == [
        made("other words {b|c|d}", s)[-1] for s in range(20)
    ]


def test_weights_are_kept_to():
    drawn = Counter(made("{0.2::a|b|.8::c|0::d}", seed) for seed in range(4000))
    assert abs(drawn["a"] - 400) < 80 and abs(drawn["c"] - 1600) < 150 and not drawn["d"]


def test_several_are_drawn_without_repeats_while_there_are_enough():
    for seed in range(50):
        assert sorted(made("{3$$+$$a|b|c}", seed).split("+")) == ["a", "b", "c"]
        assert sorted(made("{4$$+$$a|b}", seed).split("+")) == ["a", "a", "b", "b"]
    assert {len(made("{0-2$$+$$a|b|c}", seed)) for seed in range(50)} == {0, 1, 3}


def test_a_wildcard_is_a_line_of_its_file(folder):
    wildcards = folder(colour="# comment\n\nred\nblue, {light|dark}\n", dirSLASHplace="at __colour__ sea")
    texts = {made("__colour__ star __dir/place__", seed, wildcards) for seed in range(60)}
    colours = {"red", "blue, light", "blue, dark"}
    assert texts == {f"{a} star at {b} sea" for a in colours for b in colours}
    assert wildcards_in("__colour__ {a|__dir/place__} __colour__") == ["colour", "dir/place"]
    assert made("__COLOUR__", 1, wildcards) == made("__colour__", 1, wildcards)
    assert made("__colour__ {2$$__colour__}") == "__colour__ __colour__, __colour__"  # no folder given


def test_several_out_of_one_wildcard_are_several_lines(folder):
    wildcards = folder(letter="a\nb\n0::c\nd")
    for seed in range(30):
        assert sorted(made("{3$$ $$__letter__}", seed, wildcards).split()) == ["a", "b", "d"]


def test_weights_of_lines_are_kept_to(folder):
    wildcards = folder(x="0.25::rare\n0.75::often")
    drawn = Counter(made("__x__", seed, wildcards) for seed in range(2000))
    assert abs(drawn["rare"] - 500) < 100


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "x"}, r"no colour.txt for __colour__"),
        ({"colours": "x"}, r"no colour.txt for __colour__, did you mean 'colours'\?"),
        ({"colour": "# none"}, r"colour.txt: the file holds no entry"),
        ({"colour": "0::a"}, r"every entry has the weight 0"),
        ({"colour": "x\n0::__a__", "a": "__b__ y", "b": "__a__"}, r"lead back to themselves: a > b > a"),
        ({"colour": "x\n__missing__"}, r"no missing.txt"),  # whether or not that line is drawn
    ],
)
def test_a_wildcard_at_fault_is_refused_for_every_seed(folder, files, said):
    wildcards = folder(**files)
    for seed in range(5):
        with pytest.raises(SdlabError, match=said) as refused:
            made("{a|__colour__}", seed, wildcards)
        assert "\n" not in str(refused.value)


def test_wildcards_that_are_not_utf8_or_not_there_are_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ok\nb\xffd\n")
    assert made("x", 0, read_wildcards(tmp_path)) == "x"  # nobody asked for it
    with pytest.raises(SdlabError, match=r"bad.txt: line 2 is not UTF-8"):
        made("__bad__", 0, read_wildcards(tmp_path))
    with pytest.raises(SdlabError, match=r"--wildcards .*: is no folder"):
        read_wildcards(tmp_path / "none")


def test_hidden_wildcards_are_left_out_and_loops_of_links_end(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.TXT").write_text("x")
    (tmp_path / "__old").mkdir()
    (tmp_path / "__old" / "b.txt").write_text("x")
    (tmp_path / ".c.txt").write_text("x")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert list(read_wildcards(tmp_path).files) == ["deep/a"]


@pytest.mark.parametrize(
    "template",
    [
        "{" * 50_000 + "}" * 50_000,
        "{a|" * 40 + "}" * 40,
        "{1000$${1000$$a|b}|c}",
        "{2$$" * 30 + "a" + "}" * 30,
        "{9999$$a|b}",
        "x" * 100_001,
        "{0::a|0::b}",
    ],
)
def test_a_hostile_template_is_refused_at_once(template):
    start = time.perf_counter()
    with pytest.raises(SdlabError) as refused:
        made(template)
    assert time.perf_counter() - start < 5 and len(str(refused.value)) < 200


def test_wildcards_that_double_are_refused(folder):
    wildcards = folder(**{f"w{i}": f"__w{i + 1}____w{i + 1}__" for i in range(25)}, w25="x")
    with pytest.raises(SdlabError, match="grows beyond 100,000 characters"):
        made("__w0__", 0, wildcards)
    deep = folder(**{f"d{i}": f"__d{i + 1}__" for i in range(40)}, d40="x")
    with pytest.raises(SdlabError, match="more than 32 deep"):
        made("__d0__", 0, deep)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{a|b}", []),
        ("{a|b", ["'{' is never closed"]),
        ("a}b", ["'}' is never opened"]),
        ("{{{a|b}", ["'{' is never closed"]),
        (r"\{a", []),
        ("{x$$a|b}", ["'x' before $$ is no number"]),
        ("{2$$a|b}", []),
    ],
)
def test_what_may_not_be_meant_is_said(template, words):
    said = warnings_of(template)
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))
