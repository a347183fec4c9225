from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sdlab.errors import SdlabError
from sdlab.options import add_command, as_json, normalise, opt, read_toml


@dataclass(frozen=True)
class Config:
    images: Annotated[Path, opt("Folder.", argument=True)] = Path("images")
    image_size: Annotated[int | None, opt("Side.", min=8, max=64)] = None
    rate: Annotated[float, opt("Rate.", min=0.0, old=("--learning-rate",))] = 0.5
    ema: Annotated[bool, opt("Average.")] = False
    mode: Annotated[str, opt("Mode.", choices=("fast", "slow"))] = "fast"
    prompt: Annotated[tuple[str, ...], opt("Prompt.")] = ()
    resume: Annotated[bool | None, opt("Go on.", flag="--resume")] = None
    fused: Annotated[bool | None, opt("Fuse.")] = None
    again: Annotated[str, opt("From.", flag="--from")] = ""


def run(args: list[str]) -> tuple[Config, frozenset[str]]:
    seen: list[tuple[Config, frozenset[str]]] = []

    def show(config: Config, given: frozenset[str]) -> None:
        """Show."""
        seen.append((config, given))

    app = typer.Typer(context_settings={"token_normalize_func": normalise})
    add_command(app, "show", Config, show, panel="Test")
    result = CliRunner().invoke(app, args, standalone_mode=False)
    if result.exception:
        raise result.exception
    return seen[0]


def toml(folder: Path, text: str) -> Path:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    return folder / "run.toml"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], Config()),
        (["--image-size", "32"], Config(image_size=32)),
        (["--image_size", "32"], Config(image_size=32)),
        (["--image_size=32"], Config(image_size=32)),
        (["--learning_rate", "1e-3"], Config(rate=1e-3)),
        (["--ema"], Config(ema=True)),
        (["--no-ema"], Config()),
        (["--prompt", "a_b", "--prompt", "c"], Config(prompt=("a_b", "c"))),
        (["pics", "--mode", "slow", "--resume"], Config(images=Path("pics"), mode="slow", resume=True)),
    ],
)
def test_flags_in_every_spelling(args, expected):
    assert run(args)[0] == expected


@pytest.mark.parametrize(("args", "expected"), [([], None), (["--fused"], True), (["--no-fused"], False)])
def test_a_switch_that_the_model_decides_can_be_turned_on_and_off(args, expected):
    assert run(args)[0].fused is expected


def test_what_was_given_is_known_from_flags_and_file(tmp_path):
    path = toml(tmp_path, "ema = true")
    assert run(["--config", str(path), "--rate", "0.5"])[1] == {"ema", "rate"}


def test_a_file_and_flags_are_one_thing_and_flags_win(tmp_path):
    path = toml(
        tmp_path, 'image_size = 16\nlearning-rate = 2\nema = "False"\nprompt = ["x", "y"]\nimages = "p"\n'
    )
    config, _ = run(["--config", str(path), "--image-size", "24"])
    assert config == Config(images=Path("p"), image_size=24, rate=2.0, prompt=("x", "y"))


@pytest.mark.parametrize(
    "args", [["--image-size", "4"], ["--image-size", "65"], ["--mode", "mid"], ["--rate", "-1"]]
)
def test_ranges_and_choices_are_checked_for_flags_and_for_files(args, tmp_path):
    with pytest.raises(typer.exceptions.TyperException):
        run(args)
    value = args[1] if args[1].lstrip("-").isdigit() else f'"{args[1]}"'
    with pytest.raises(typer.exceptions.TyperException):
        run(["--config", str(toml(tmp_path, f"{args[0].lstrip('-')} = {value}"))])


def test_a_file_knows_an_option_by_its_flag_too(tmp_path):
    assert run(["--config", str(toml(tmp_path, 'from = "a.png"'))])[0].again == "a.png"


def test_every_unknown_key_is_named_with_the_nearest_known(tmp_path):
    with pytest.raises(
        SdlabError, match=r"'imagesize', did you mean 'image-size'.*'promt', did you mean 'prompt'"
    ):
        read_toml(toml(tmp_path, "imagesize = 3\npromt = 'x'"), Config)


@pytest.mark.parametrize("text", ["a = ", "[rate]\nx = 1\n"])
def test_a_broken_file_is_refused_by_name(text, tmp_path):
    with pytest.raises(SdlabError, match=r"run\.toml"):
        read_toml(toml(tmp_path, text), Config)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(SdlabError, match=r"nothing\.toml"):
        read_toml(tmp_path / "nothing.toml", Config)


def test_a_config_is_plain_json():
    assert as_json(Config(prompt=("a",)))["prompt"] == ["a"]
    assert as_json(Config())["images"] == "images"


def test_an_option_stands_after_the_inherited_one_that_it_names():
    @dataclass(frozen=True)
    class Base:
        one: Annotated[int, opt("One.")] = 1
        two: Annotated[int, opt("Two.")] = 2

    @dataclass(frozen=True)
    class More(Base):
        last: Annotated[int, opt("Last.")] = 3
        between: Annotated[int, opt("Between.", after="one")] = 4

    assert list(as_json(More())) == ["one", "between", "two", "last"]
