"""From lines to pictures: who gets which seed, what one bad line costs, and who shares a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.choose import Source
from sdlab.inference.config import GenerateConfig
from sdlab.inference.identity import Hasher
from sdlab.inference.jobs import plan as planning
from sdlab.inference.jobs.output import numbered
from sdlab.inference.jobs.plan import Plan
from sdlab.inference.jobs.session import Session, check, open_session, size_of, spec_of
from sdlab.inference.prompts.lines import gather


@pytest.fixture
def plan_of(tiny_sd_folder: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Plans a prompt file's text or prompts with a tiny model: ``plan_of("a\\nb", num=2)``."""

    def made(text: str, *, seed: int = 7, times: int = 1, **options: object) -> Plan:
        file = tmp_path / "prompts.txt"
        file.write_text(text, encoding="utf-8")
        config = GenerateConfig(load_model=str(tiny_sd_folder), no_prefix=True, **options)  # type: ignore[arg-type]
        session = open_session(config, tuned=tmp_path / "none", hasher=Hasher())
        lines = gather((), file, config_type=GenerateConfig)
        return planning.planned(session, lines, seed=seed, spec_for=_spec(session), times=times)

    return made


def _spec(session: Session) -> Callable[[GenerateConfig], planning.Spec]:
    return lambda config: spec_of(session, config, size=size_of(session, config))


def test_picture_k_does_not_depend_on_how_many_there_are(plan_of: Callable[..., Plan]) -> None:
    few, many = (plan_of("a {red|green|blue|black|white} star", num=num) for num in (4, 40))
    assert [item.shot for item in few.items] == [item.shot for item in many.items][:4]
    assert len({item.shot.typed for item in many.items}) == 5
    assert few.items[0].shot.template == "a {red|green|blue|black|white} star"


def test_a_bad_line_changes_no_other_seed(plan_of: Callable[..., Plan]) -> None:
    good = plan_of("one\ntwo\nthree", num=2)
    bad = plan_of("one\ntwo --stepz 3\nthree", num=2)
    assert [i.shot for i in bad.items] == [i.shot for i in good.items if i.shot.typed != "two"]
    assert [(f.index, f.where) for f in bad.faults] == [(2, "prompts.txt:2"), (3, "prompts.txt:2")]
    assert "steps" in bad.faults[0].why and bad.num == good.num == 6


def test_what_a_line_says_holds_for_it_alone(plan_of: Callable[..., Plan]) -> None:
    one, two, three, four = plan_of(
        "one\ntwo --seed 100 --steps 3 --width 64 --num 2 --negative grey\nthree", image_size=32
    ).items
    assert [i.shot.seed for i in (one, two, three, four)] == [7, 100, 101, 10]
    assert two.spec and one.spec and (two.spec.steps, two.spec.width, two.spec.height) == (3, 64, 32)
    assert one.spec == four.spec and one.spec.steps != 3
    assert (two.shot.negative, one.shot.negative) == ("grey", "")


def test_lines_that_only_the_model_refuses_are_faults(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("one --width 33\ntwo <lora:nobody:1>\nthree --clip-skip 12\nfour")
    assert [item.shot.typed for item in plan.items] == ["four"]
    said = [fault.why for fault in plan.faults]
    assert "multiple" in said[0] and "nobody" in said[1] and "layers" in said[2]


def test_nothing_left_to_make_is_an_error(plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(SdlabError, match="nobody"):
        plan_of("two <lora:nobody:1>")


def batched(plan: Plan, **options: object) -> list[list[int]]:
    session = SimpleNamespace(config=GenerateConfig(**options), seen=())  # type: ignore[arg-type]
    names = lambda shot: numbered("x", shot.index)  # noqa: E731
    made = planning.batches(session, plan, folder=Path(), names=names)  # type: ignore[arg-type]
    return [[shot.index for shot in batch.shots] for batch in made]


def test_pictures_of_one_make_share_a_batch(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("a\nb --steps 3\nc\nd --steps 3\ne")
    assert batched(plan, batch=2) == [[0, 2], [1, 3], [4]]
    assert batched(plan, batch=2, exact=True) == [[0], [1], [2], [3], [4]]


def test_pictures_with_the_same_loras_follow_each_other(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("a\nb\nc\nd")
    ink = Source("ink", "ink", Path("ink"), {}, "file")
    items = tuple(
        dataclasses.replace(item, loras=((ink, 0.5),) if item.shot.index % 2 else ()) for item in plan.items
    )
    assert batched(dataclasses.replace(plan, items=items)) == [[0], [2], [1], [3]]


def test_long_and_short_prompts_share_no_batch(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("short\n" + "word " * 100)
    short, long = plan.items
    assert short.num_chunks == 1 and long.num_chunks > 1
    assert planning.alike(short) != planning.alike(long)


def test_seeds_run_on_over_the_pictures_of_a_folder(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("one\ntwo", times=3)
    assert [(i.shot.index, i.shot.seed) for i in plan.items] == [(n, 7 + n) for n in range(6)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hires": 2.0, "hires_strength": 0.0}, "--hires-strength"),
        ({"change": ("steps=3",)}, "--from"),
        ({"prefix": "a", "no_prefix": True}, "exclude"),
        ({"guidance": float("nan")}, "--guidance"),
        ({"scheduler": "euler b"}, "did you mean"),
        ({"width": 33}, "nearest"),
    ],
)
def test_faults_that_show_without_a_model_are_told(change: dict[str, object], said: str) -> None:
    with pytest.raises(SdlabError, match=said):
        check(dataclasses.replace(GenerateConfig(), **change))  # type: ignore[arg-type]
