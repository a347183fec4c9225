"""`--set`: one thing of a recipe changed."""

from __future__ import annotations

from typing import Any

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.config import Img2ImgConfig
from sdlab.inference.prompts import dynamic
from sdlab.inference.record import change
from sdlab.inference.record.recipe import LiteralShot, batch_of, spec_of
from sdlab.inference.record.schema import checked
from tests.inference.record.recipes import HIRES, INIT, SHOT, old_recipe, recipe

BATCH = {"batch": [SHOT, {**SHOT, "prompt": "blue fish", "index": 1}], "batch_position": 1}


def changed(about: dict[str, Any], *changes: str, grid: int = 8) -> dict[str, Any]:
    """What is different in the changed recipe."""
    new = change.changed(about, change.drawn(about, change.given(changes)), grid=grid)
    assert checked(new, "a.png") == new
    return {name: value for name, value in new.items() if value != about[name]}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("steps=30", {"steps": 30}),
        ("--steps=30", {"steps": 30}),
        ("negative=a, b=c", {"negative": "a, b=c"}),
        ("prefix=", {}),
        ("seed=0", {"seed": 0}),
        ("guidance=1.5", {"guidance": 1.5}),
        ("width=640", {"width": 640}),
        ("height=512", {"height": 512}),
        ("clip-skip=2", {"clip_skip": 2}),
        ("clip_skip=2", {"clip_skip": 2}),
        ("emphasis=comfy", {"emphasis": "comfy"}),
        ("format=webp", {"format": "webp"}),
        ("hires=1", {}),
        ("prompt=red star", {}),
        ("prompt=a|b = c", {"prompt": "a|b = c"}),
        ("load_model=mini-sd", {}),  # files are not the recipe's business: it is written from what was loaded
    ],
)
def test_one_thing_changes_and_nothing_else(typed: str, expected: dict[str, Any]) -> None:
    assert changed(recipe(), typed) == expected


def test_scheduler_goes_by_any_of_its_names() -> None:
    for name in ("DPM++ 2M", "dpmpp_2m"):
        assert changed(recipe(), f"scheduler={name}")["scheduler"]["name"] == "dpm++ 2m"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["steps"], "'steps' sets nothing. Write --set steps=30"),
        (["step=3"], "'step' cannot be set, did you mean 'steps'"),
        (["num=3"], "'num' cannot be set"),
        (["output=x"], "'output' cannot be set"),
        (["=3"], "'' cannot be set"),
        (["steps=x"], "'x' is no value for steps"),
        (["steps=0"], "steps 0 is not within 1 to 1000"),
        (["guidance=nan"], "guidance nan is not within"),
        (["seed=-1"], "not within"),
        (["seed=9007199254740992"], "not within"),
        (["emphasis=compel"], "there are a1111, comfy, none"),
        (["format=gif"], "there are png, jpeg, webp"),
        (["scheduler=euleri"], "did you mean 'euler'"),
        (["steps=3", "steps=4"], "steps is set twice"),
        (["prompt=half \udce9"], "not UTF-8"),
        (["step=3", "num=3"], "'step' cannot be set.*'num' cannot be set"),
    ],
)
def test_what_cannot_be_set_is_refused_in_words(changes: list[str], word: str) -> None:
    with pytest.raises(SdlabError, match=word) as caught:
        change.given(changes)
    assert str(caught.value).startswith("--set: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("about", "changes", "word"),
    [
        ({}, ["width=516"], "width 516 is not a multiple of 8"),
        ({}, ["strength=0.5"], "not made by noising another"),
        ({"init": INIT, "strength": 0.5}, ["steps=1"], "1 steps at strength 0.5 leave no step"),
        ({"init": INIT, "strength": 0.5}, ["strength=0"], "leave no step"),
        ({}, ["hires_steps=3"], "no second pass; set hires=2"),
        ({}, ["hires=8"], "hires gives 4096x6144, more than 4096"),
        ({"hires": HIRES}, ["hires_strength=0"], "leave no step"),
        ({}, ["quality=80"], "a PNG has none"),
    ],
)
def test_values_without_a_use_are_refused(about: dict[str, Any], changes: list[str], word: str) -> None:
    with pytest.raises(SdlabError, match=word):
        changed(recipe(**about), *changes)
    with pytest.raises(SdlabError, match="multiple of 16"):
        changed(recipe(), "width=520", grid=16)


def test_a_batch_stays_together_unless_one_of_it_becomes_another() -> None:
    about = recipe(**BATCH, template="{red|blue} star")
    assert changed(about, "steps=30") == {"steps": 30}
    alone = {"batch": [], "batch_position": 0}
    assert changed(about, "seed=5") == {"seed": 5, **alone}
    assert changed(about, "negative=") == {"negative": "", **alone}
    assert changed(about, "prompt=fish") == {"prompt": "fish", "template": "", **alone}


def test_second_pass_follows_size_and_factor() -> None:
    about = recipe(hires=HIRES)
    assert changed(about, "hires=1") == {"hires": None}
    assert changed(about, "hires=1.5")["hires"] == {**HIRES, "width": 768, "height": 1152}
    assert changed(about, "width=256")["hires"] == {**HIRES, "width": 512}
    assert changed(about, "hires_steps=7") == {"hires": {**HIRES, "steps": 7}}
    assert changed(about, "steps=7") == {"steps": 7}
    new = changed(recipe(), "hires=1.3", "steps=6")["hires"]
    assert new == {"width": 664, "height": 1000, "steps": 6, "strength": Img2ImgConfig().hires_strength}
    same_size = {**HIRES, "width": 512, "height": 768}  # --hires 1.02
    about = recipe(hires=same_size)
    assert changed(about, "steps=7") == {"steps": 7} and changed(about, "hires=1") == {"hires": None}
    assert changed(about, "hires_strength=0.5") == {"hires": {**same_size, "strength": 0.5}}
    assert changed(about, "width=256") == {"width": 256, "hires": {**same_size, "width": 256}}
    assert changed(recipe(), "hires=1.005")["hires"] is not None
    odd = recipe(hires={**HIRES, "width": 1000})  # of a version that rounded in another way
    assert changed(odd, "steps=7") == {"steps": 7}


def test_choices_of_a_changed_text_are_made_by_the_seed() -> None:
    typed = "{blue|green|pink} {star|fish|moon}"
    texts = {changed(recipe(), f"prompt={typed}", f"seed={seed}")["prompt"] for seed in range(20)}
    assert 3 < len(texts) <= 9 and not any(sign in text for text in texts for sign in "{|}")
    for seed in (3, 4):
        new = changed(recipe(seed=seed), f"prompt={typed}", "negative={a|b}", r"prefix=\{best\} ")
        assert new["prompt"] == dynamic.expand(typed, seed=seed, wildcards=None, part="prompt")
        assert new["negative"] == dynamic.expand("{a|b}", seed=seed, wildcards=None, part="negative")
        assert new["template"] == typed and new["prefix"] == "{best} "
    assert "template" not in changed(recipe(template="{a|b}"), "seed=3")  # its prompt is drawn already
    with pytest.raises(SdlabError, match=r"^--set prompt: .*weight 0"):
        changed(recipe(), "prompt={0::a|0::b}")


def test_texts_that_may_mean_another_thing_are_told() -> None:
    found = change.oddities(change.given(["prompt={a|b", "negative=__ugly__", "prefix={a|b}", "steps=3"]))
    assert len(found) == 2 and "'{' is never closed" in found[0] and "__ugly__ is sent as it is" in found[1]


def test_files_are_given_as_on_the_command_line() -> None:
    values = change.given(["load_model=tuned/a", "transformer=b", "vae=", "lora=c:0.5", "lora=d"])
    assert values == {"load_model": "tuned/a", "unet": "b", "vae": "", "lora": ("c:0.5", "d")}
    assert change.given(["lora="]) == {"lora": ()}


def test_pictures_of_older_versions_are_read_as_they_were() -> None:
    about = checked(old_recipe(prompt="a <lora:pen:1> b", prefix="best, "), "a.png")
    spec, [shot] = spec_of(about), batch_of(about)
    assert spec.emphasis == "none" and spec.long_prompts is False and spec.hires is None
    assert isinstance(shot, LiteralShot) and shot.prompt == "best, a <lora:pen:1> b"
    new = change.changed(about, change.given(["prompt=c <lora:pen:1>"]), grid=8)
    assert (
        batch_of(new)[0].prompt == "best, c " and spec_of(new).long_prompts
    )  # a new prompt is read as today
    assert spec_of(new).emphasis == "a1111" and changed(about, "prefix=")["emphasis"] == "a1111"
    assert changed(about, "prompt=c", "emphasis=comfy")["emphasis"] == "comfy"
    assert changed(about, "prompt=c", "emphasis=none")["long_prompts"] is True
    assert changed(about, "negative=c", "steps=3").keys() == {"negative", "steps"}
    assert changed(recipe(emphasis="none"), "prompt=c") == {"prompt": "c"}
    [same] = batch_of(change.changed(about, change.given(["steps=3"]), grid=8))
    assert same == shot
