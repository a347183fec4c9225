"""An axis as it is typed: its option, its values, and what is refused."""

from __future__ import annotations

import time

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.samples.axes import parse, parse_all


@pytest.mark.parametrize(
    ("text", "field", "values", "labels"),
    [
        ("x:guidance=4,7,10", "guidance", [4.0, 7.0, 10.0], ["guidance 4", "guidance 7", "guidance 10"]),
        ("y:checkpoint=tuned/a,tuned/b", "load_model", ["tuned/a", "tuned/b"], ["a", "b"]),
        ("x:cfg=4..5..0.5", "guidance", [4.0, 4.5, 5.0], ["cfg 4", "cfg 4.5", "cfg 5"]),
        ("z:seed=1..3", "seed", [1, 2, 3], ["seed 1", "seed 2", "seed 3"]),
        ('y:prompt="a, b",c', "prompt", ["a, b", "c"], ["a, b", "c"]),
        (
            "Y:Sampler=euler a, dpmpp_2m",
            "scheduler",
            ["euler a", "dpmpp_2m"],
            ["sampler euler a", "sampler dpmpp_2m"],
        ),
        (
            "y:lora=none,/l/a.safetensors:0.8",
            "lora",
            [(), ("/l/a.safetensors:0.8",)],
            ["lora none", "lora a:0.8"],
        ),
        ("x:no-prefix=true,false", "no_prefix", [True, False], ["no prefix on", "no prefix off"]),
        ("x:scheduler=default,ddim", "scheduler", ["", "ddim"], ["scheduler default", "scheduler ddim"]),
        ("x:negative=none,ugly", "negative", ["", "ugly"], ["negative none", "negative ugly"]),
    ],
)
def test_values_are_those_of_the_option(text: str, field: str, values: list, labels: list[str]) -> None:
    axis = parse(text)
    assert axis.field == field
    assert [one.value for one in axis.values] == values
    assert [one.label for one in axis.values] == labels


def test_models_are_told_apart_by_short_labels() -> None:
    axis = parse("y:model=mini-sd,tuned/a,tuned/a/checkpoints/step-000500,tuned/a/checkpoints/step-001000")
    assert [one.label for one in axis.values] == ["mini-sd", "a", "a step 500", "a step 1000"]
    axis = parse(r"y:model=C:\m\a.safetensors,C:\m\b.safetensors")
    assert [one.label for one in axis.values] == ["a", "b"]
    axis = parse("y:model=a.safetensors,a")
    assert [one.label for one in axis.values] == ["a.safetensors", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guidance=4,7", "no axis.*x:guidance=4,7,10"),
        ("w:guidance=4,7", "no axis"),
        ("x:guidance=", "no values"),
        ("x:guidance=4,,7", "empty value"),
        ("x:guidanse=4", "did you mean 'guidance'"),
        ("x:output=a,b", "does not change what is in a picture"),
        ("x:from=a.png", "no option 'from'"),
        ("x:steps=0", "not within 1 to 1000"),
        ("x:steps=2.5", "'2.5' is no value for steps"),
        ("x:guidance=4,4.0", "value 4 twice"),
        ("x:vae=none,none", "value none twice"),
        ("x:steps=9..1", "no number in it"),
        ("x:steps=1..9..0", "no number in it"),
        ("x:seed=1..99999999999999999999", "more than 10,000 values"),
        ('x:prompt="a', "not closed"),
    ],
)
def test_what_is_no_axis_is_one_line(text: str, said: str) -> None:
    with pytest.raises(SdlabError, match=said) as raised:
        parse(text)
    assert "\n" not in str(raised.value)


def test_two_axes_share_neither_place_nor_option() -> None:
    assert [axis.place for axis in parse_all(["y:steps=1,2", "x:cfg=1,2"])] == ["x", "y"]
    with pytest.raises(SdlabError, match="place x"):
        parse_all(["x:steps=1,2", "x:cfg=1,2"])
    with pytest.raises(SdlabError, match="option guidance"):
        parse_all(["x:guidance=1,2", "y:cfg=3,4"])


def test_thousands_of_values_are_read_at_once() -> None:
    began = time.process_time()
    assert len(parse("x:seed=1..10000").values) == 10_000
    assert time.process_time() - began < 1.0
