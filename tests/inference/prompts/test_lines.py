"""Prompts: what is read from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.config import GenerateConfig, Img2ImgConfig
from sdlab.inference.prompts.lines import Line, gather


def read(tmp_path: Path, text: str, suffix: str = ".txt", config_type: type = GenerateConfig) -> list[Line]:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(text.encode("utf-8"))
    return gather((), path, config_type=config_type)


def settings(tmp_path: Path, text: str, suffix: str = ".txt", config_type: type = GenerateConfig) -> list:
    found = read(tmp_path, text, suffix, config_type)
    assert not any(line.fault for line in found)
    return [(line.prompt, dict(line.settings)) for line in found]


def faults(tmp_path: Path, text: str, suffix: str = ".txt") -> list[str]:
    """Of each line; one that is good is put before them, so that there is something to make."""
    good = {".txt": "good\n", ".jsonl": '{"prompt": "good"}\n'}.get(suffix, "")
    return [line.fault for line in read(tmp_path, good + text, suffix)[1 if good else 0 :]]


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
    assert [line.prompt for line in gather((), path, config_type=GenerateConfig)] == expected


def test_prompts_of_flags_come_before_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("c")
    found = gather(("a --seed 7", "b"), path, config_type=GenerateConfig)
    assert found == [Line("a --seed 7"), Line("b"), Line("c", where="prompts.txt:1")]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"# nothing\n\n", "no prompt"), (b"good\nb\xffd\n", "line 2 is not UTF-8"), (None, "cannot read it")],
)
def test_bad_prompt_file_is_refused_with_its_name(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SdlabError, match=word) as caught:
        gather((), path, config_type=GenerateConfig)
    assert str(path) in str(caught.value)


def test_no_prompt_at_all_says_what_to_type() -> None:
    with pytest.raises(SdlabError, match="--prompt ") as caught:
        gather((), None, config_type=GenerateConfig)
    assert caught.value.exit_code == 2


def test_prompt_that_is_not_text_is_refused() -> None:
    with pytest.raises(SdlabError, match="UTF-8"):
        gather(("caf\udce9",), None, config_type=GenerateConfig)


# ------------------------------------------------------------------------------------------------ flags on a line


@pytest.mark.parametrize(
    ("line", "prompt", "wanted"),
    [
        (
            "red star --seed 7 --steps 30 --negative bad hands, text --cfg_scale 5",
            "red star",
            {"seed": 7, "steps": 30, "negative": "bad hands, text", "guidance": 5.0},
        ),
        ("a--b, cat -- dog --- x, a - --5", "a--b, cat -- dog --- x, a - --5", {}),
        (
            r"""--prompt "a \"q\" --cat \(x\)" --negative_prompt 'it --s 5' --sampler_name "Euler a" """,
            r'a "q" --cat \(x\)',
            {"negative": "it --s 5", "scheduler": "euler a"},
        ),
        (
            "k --n bad --w 64 --h 72 --s 5 --d 9 --l 3.5",
            "k",
            {"negative": "bad", "width": 64, "height": 72, "steps": 5, "seed": 9, "guidance": 3.5},
        ),
        ("x --batch_size 2 --n_iter 3", "x", {"num": 6}),
        ("x --num 4", "x", {"num": 4}),
        ("x --sampler_index dpmpp_2m_karras", "x", {"scheduler": "dpm++ 2m karras"}),
        ("x --negative --seed=5 --no-prefix", "x", {"negative": "", "seed": 5, "no_prefix": True}),
        ("""x --prefix "best, " --negative ''""", "x", {"prefix": "best, ", "negative": ""}),
        ('say "hi" --negative "bad" worse --s 3', 'say "hi"', {"negative": '"bad" worse', "steps": 3}),
        ("""x --negative it's bad""", "x", {"negative": "it's bad"}),
        ('--prompt "" --seed 5', "", {"seed": 5}),
        (
            "x --emphasis comfy --clip_skip 2 --hires 1.5 --hires-steps 9 --hires_strength 0.4 --image_size 64",
            "x",
            {
                "emphasis": "comfy",
                "clip_skip": 2,
                "hires": 1.5,
                "hires_steps": 9,
                "hires_strength": 0.4,
                "image_size": 64,
            },
        ),
    ],
)
def test_flags_behind_a_prompt_are_its_settings(tmp_path, line, prompt, wanted):
    assert settings(tmp_path, line) == [(prompt, wanted)]


def test_strength_is_a_setting_where_the_command_has_it(tmp_path):
    assert settings(tmp_path, "x --strength 0.5", config_type=Img2ImgConfig) == [("x", {"strength": 0.5})]
    assert faults(tmp_path, "x --strength 0.5") == ["--strength has no meaning for this command"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x --sed 7", "unknown setting '--sed', did you mean 'seed'?"),
        ("x --ar 16:9", "unknown setting '--ar', if it is part of the prompt write the line as --prompt"),
        ("x --load-model y", "--load-model holds for the whole job and cannot stand on a line"),
        ("x --steps 0", "steps 0 is not within 1 to 1000"),
        ("x --steps many", "'many' is no value for steps"),
        ("x --width 65", "--width 65 is no multiple of 8"),
        ("x --seed", "--seed needs a value"),
        ("x --seed -1", "seed -1 is not within"),
        ("x --guidance nan", "guidance nan is not within"),
        ("x --sampler eular", "unknown scheduler 'eular', did you mean 'euler'?"),
        ("x --emphasis loud", "'loud' is no emphasis"),
        ("x --seed 1 --d 2", "--d is said twice"),
        ("x --num 2 --n_iter 2", "--n_iter is said twice"),
        ("x --prompt y", "--prompt is said twice"),
        ("--seed 5", "no prompt"),
        ("x --no-prefix --prefix y", "exclude each other"),
        ("x --sed 7 --steps 0", "unknown setting '--sed', did you mean 'seed'?; steps 0 is not within"),
    ],
)
def test_a_bad_flag_is_a_fault_of_its_line_alone(tmp_path, line, said):
    good, bad, last = read(tmp_path, f"# comment\ngood --seed 1\n{line}\nlast\n")
    assert not good.fault and not last.fault and said in bad.fault
    assert (good.where, bad.where, last.where) == ("prompts.txt:2", "prompts.txt:3", "prompts.txt:4")


def test_a_line_at_fault_keeps_what_could_be_read(tmp_path):
    """So that the pictures behind it keep their numbers when it is mended."""
    assert read(tmp_path, "good\nbad --num 5 --sed 7")[1].settings == {"num": 5}


def test_a_file_of_faults_is_refused_with_the_first_of_them(tmp_path):
    with pytest.raises(
        SdlabError, match=r"prompts.txt:1: unknown .*; prompts.txt:2: .*; and 2 more"
    ) as refused:
        read(tmp_path, "\n".join(["x --sed 7"] * 5))
    assert "\n" not in str(refused.value)
    (tmp_path / "prompts.txt").write_text("x --sed 7")
    found = gather(("typed",), tmp_path / "prompts.txt", config_type=GenerateConfig)
    assert [bool(line.fault) for line in found] == [False, True]


# ------------------------------------------------------------------------------------------------ tables and JSON


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL"])
def test_json_lines_hold_the_same_settings(tmp_path, suffix):
    text = '{"prompt": "a", "seed": 7, "cfg_scale": 5, "negative": null}\n\n# no\n{"prompt": "b\\n{c}", "steps": "9"}'
    assert settings(tmp_path, text, suffix) == [("a", {"seed": 7, "guidance": 5.0}), ("b\n{c}", {"steps": 9})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "is no object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"seed": 3}', "no prompt"),
        ('{"prompt": "b", "steps": 30.5}', "'30.5' is no value for steps"),
        ('{"prompt": "b", "seed": true}', "'True' is no value for seed"),
        ('{"prompt": "b", "guidance": NaN}', "guidance nan is not within"),
        ('{"prompt": "b", "negative": {"a": 1}}', "negative is not text"),
        ('{"prompt": "\\ud800"}', "prompt is not UTF-8"),
        ('{"prompt": ["x"]}', "prompt is not text"),
        ('{"prompt": "x", "size": 3}', "unknown setting 'size'"),
    ],
)
def test_a_bad_json_line_is_a_fault_of_its_line_alone(tmp_path, line, said):
    [fault] = faults(tmp_path, line, ".jsonl")
    assert said in fault


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".CSV", ","), (".tsv", "\t"), (".csv", ";")])
def test_a_row_of_a_table_is_a_line(tmp_path, suffix, comma):
    text = (
        (
            'prompt,Seed,CFG scale,negative prompt,steps\r\n"red, ""star"";\nnew",7,,"bad\thands, text",\r\n'
            ",,,,\r\nblue,, 2.5 ,,9\r\n"
        )
        .replace("red, ", "red@")
        .replace("hands, ", "hands@")
        .replace(",", comma)
        .replace("@", ", ")
    )
    wanted = [
        ('red, "star";\nnew', {"seed": 7, "negative": "bad\thands, text"}),
        ("blue", {"guidance": 2.5, "steps": 9}),
    ]
    assert settings(tmp_path, "\ufeff" + text, suffix) == wanted
    assert [line.where for line in read(tmp_path, text, suffix)] == [f"prompts{suffix}:{n}" for n in (2, 5)]


def test_a_bad_row_is_a_fault_of_its_row_alone(tmp_path):
    text = 'prompt,seed\n,5\nblue,x\na,1,2\n"abc"x,1\nlast,2\n"never closed,1\nmore,2'
    found = read(tmp_path, text, ".csv")
    assert [line.where[-1] for line in found] == ["2", "3", "4", "5", "6", "7"]
    words = (
        "no prompt",
        "'x' is no value",
        "3 cells under 2 names",
        "no row of a table",
        "",
        "no row of a table",
    )
    assert all(word in line.fault for word, line in zip(words, found, strict=True))
    assert found[4] == Line("last", {"seed": 2}, "prompts.csv:6")


@pytest.mark.parametrize(
    ("text", "suffix", "said"),
    [
        ("red star\nblue\n", ".csv", "its first row names no column 'prompt'"),
        ('"prompt', ".csv", "its first row names no column 'prompt'"),
        ("", ".csv", "the file holds no prompt"),
        ("prompt\n", ".tsv", "the file holds no prompt"),
        ("[]", ".json", "call the file .jsonl"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, text, suffix, said):
    with pytest.raises(SdlabError, match=said):
        read(tmp_path, text, suffix)
