"""What goes where on the sheets."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.config import SamplesConfig
from sdlab.inference.prompts.lines import Line
from sdlab.inference.samples import plan
from sdlab.inference.samples.axes import parse_all
from sdlab.inference.samples.plan import arranged, as_generate, default_prompts, largest_px
from sdlab.testing.colours import COLOURS
from sdlab.testing.shapes import BASE_SHAPES

A, B = Line("a"), Line("b", {"steps": 9, "seed": 99, "num": 5}, "p.txt:2")


def labels(arrangement: plan.Arrangement) -> tuple[list[str], list[str], list[list[str]]]:
    return (
        [one.label for one in arrangement.columns.values],
        [one.label for one in arrangement.rows.values],
        [[one.label for one in sheet] for sheet in arrangement.sheets()],
    )


@pytest.mark.parametrize(
    ("axes", "lines", "num_seeds", "expected"),
    [
        ([], [A, B], 2, (["seed 7", "seed 8"], ["a", "b"], [[]])),
        ([], [A], 2, (["seed 7", "seed 8"], [""], [["a"]])),
        ([], [A, B], 1, ([""], ["a", "b"], [["seed 7"]])),
        (["x:cfg=1,2"], [A, B], 1, (["cfg 1", "cfg 2"], ["a", "b"], [["seed 7"]])),
        (["x:cfg=1,2"], [A], 2, (["cfg 1", "cfg 2"], ["seed 7", "seed 8"], [["a"]])),
        (["y:cfg=1,2"], [A, B], 2, (["seed 7", "seed 8"], ["cfg 1", "cfg 2"], [["a"], ["b"]])),
        (["y:cfg=1,2"], [A, B], 1, (["a", "b"], ["cfg 1", "cfg 2"], [["seed 7"]])),
        (
            ["x:cfg=1,2", "y:steps=3"],
            [A, B],
            2,
            (
                ["cfg 1", "cfg 2"],
                ["steps 3"],
                [["a", "seed 7"], ["a", "seed 8"], ["b", "seed 7"], ["b", "seed 8"]],
            ),
        ),
        (["x:seed=1,2", 'y:prompt="c, d",e'], [], 1, (["seed 1", "seed 2"], ["c, d", "e"], [[]])),
        (["z:cfg=1,2"], [A, B], 2, (["seed 7", "seed 8"], ["a", "b"], [["cfg 1"], ["cfg 2"]])),
    ],
)
def test_a_free_side_shows_prompts_or_seeds(axes, lines, num_seeds, expected) -> None:
    assert labels(arranged(parse_all(axes), lines, num_seeds=num_seeds, first_seed=7)) == expected


def test_every_place_has_its_prompt_seed_and_options() -> None:
    axes = parse_all(["x:cfg=1,2", "y:model=m,n"])
    places = arranged(axes, [A, B], num_seeds=1, first_seed=7).places(seed=7)
    assert [place.index for place in places] == list(range(8))
    assert [place.line.prompt for place in places] == list("aaaabbbb")
    assert [dict(place.of_model) for place in places] == [{"load_model": m} for m in "mmnnmmnn"]
    assert dict(places[1].line.settings) == {"guidance": 2.0, "seed": 7}
    assert dict(places[4].line.settings) == {
        "guidance": 1.0,
        "seed": 7,
        "steps": 9,
    }  # its own seed does not count
    assert places[4].line.where.startswith("p.txt:2")


@pytest.mark.parametrize(
    ("axes", "given", "said"),
    [
        (["x:cfg=1,2"], {"guidance"}, "--guidance is on the axis x: already"),
        (["x:seed=1,2"], {"num"}, "--num is on the axis x:"),
        (["x:prompt=a,b"], {"prompt_file"}, "--prompt-file is on the axis x:"),
        (["x:image_size=64,128"], {"width"}, "--width is on the axis x:"),
        (["x:image_size=64,128", "y:width=64,128"], set(), "width and height at once"),
        ([], {"from_picture"}, "--from: .*generate --from"),
        ([], {"explain"}, "--explain"),
        (["x:sampler=eulr,ddim"], set(), "x: sampler eulr: .*eulr"),
        (["x:width=64,65"], set(), "x: width 65: .*multiple of 8"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_looked_for(axes, given, said) -> None:
    with pytest.raises(SdlabError, match=said):
        plan.check(SamplesConfig(), frozenset(given), parse_all(axes))


def test_the_largest_picture_is_known_from_the_options() -> None:
    sides = {"": 128, "big": 1024}
    config = as_generate(SamplesConfig())
    assert largest_px(config, [], sides.__getitem__) == (128, 128)
    assert largest_px(config, parse_all(["x:model=big,big2"])[:0], sides.__getitem__) == (128, 128)
    assert largest_px(as_generate(SamplesConfig(load_model="big", hires=2.0)), [], sides.__getitem__) == (
        2048,
        2048,
    )
    axes = parse_all(["x:width=64,256", "y:height=512,32"])
    assert largest_px(config, axes, sides.__getitem__) == (256, 512)


def test_a_command_without_a_model_is_sized_without_torch(tmp_path: Path) -> None:
    assert plan.own_side("", tuned=tmp_path, allow_pickle=False) == 128
    assert plan.own_side("mini-flux2", tuned=tmp_path, allow_pickle=False) == 128
    with pytest.raises(SdlabError, match="no model of that name"):
        plan.own_side("nothing-like-it", tuned=tmp_path, allow_pickle=False)


@pytest.mark.parametrize("base", ["mini-sd", "mini-flux2", "sd15", "anything"])
def test_default_prompts_suit_the_model(base: str) -> None:
    lines = default_prompts(base)
    assert len(lines) == len({line.prompt for line in lines}) == 8
    if base.startswith("mini"):
        for line in lines:
            assert any(shape in line.prompt for shape in BASE_SHAPES)
            assert sum(colour in line.prompt for colour in COLOURS) == 2
    else:
        assert lines == default_prompts("flux2-klein-4b") != default_prompts("mini-sd")


def test_an_impossible_seed_is_refused() -> None:
    plan.check_seeds(2**53 - 4, 4)
    with pytest.raises(SdlabError, match="--seed"):
        plan.check_seeds(2**53 - 3, 4)
