"""``x:guidance=4,7,10``: an option of `sdlab generate` and the values that it takes along one side of a sheet."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from sdlab.errors import SdlabError
from sdlab.inference.config import GenerateConfig
from sdlab.options import did_you_mean, parse_value

MAX_VALUES = 10_000
PLACES = ("x", "y", "z")  # columns, rows, and one sheet for each value
HOW = "Write x:guidance=4,7,10 or y:model=tuned/a,tuned/b"
ALIASES = {
    "checkpoint": "load_model",
    "model": "load_model",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "sampler": "scheduler",
    "size": "image_size",
    "prompts": "prompt",
    "seeds": "seed",
    "negative_prompt": "negative",
    "transformer": "unet",
}
VARYING = frozenset(
    ("prompt", "negative", "prefix", "no_prefix", "ref", "seed", "steps", "guidance", "width", "height", "image_size",
     "scheduler", "clip_skip", "emphasis", "hires", "hires_steps", "hires_strength", "load_model", "unet", "vae",
     "lora", "dtype", "vae_tiling")
)  # fmt: skip
_PATHS = ("load_model", "unet", "vae", "lora", "ref")
_NONE = ("none", "default", "")  # of options that may be left out
_MAY_BE_LEFT_OUT = ("unet", "vae", "lora", "ref", "negative", "prefix", "scheduler")
_TAKES_RANGES = ("seed", "steps", "guidance", "width", "height", "image_size", "clip_skip", "hires", "hires_steps",
                 "hires_strength")  # fmt: skip
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\.\.({_NUMBER}))?")


@dataclass(frozen=True)
class Value:
    """One place along an axis: what is written there, and what the option is."""

    label: str
    value: Any


@dataclass(frozen=True)
class Axis:
    """An option of `sdlab generate` (its field's name) with the values that it takes in turn."""

    place: str  # one of PLACES; "" where it finds its own
    field: str
    values: tuple[Value, ...]


def parse_all(texts: Sequence[str]) -> list[Axis]:
    """The axes, in the order of PLACES. Raises SdlabError where two share a place or an option, and as `parse` does."""
    axes = [parse(text) for text in texts]
    for what, named in (("place", [a.place for a in axes]), ("option", [a.field for a in axes])):
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise SdlabError(f"two axes have the {what} {twice}", where="--grid", next_step=HOW)
    return sorted(axes, key=lambda axis: PLACES.index(axis.place))


def parse(text: str) -> Axis:
    """The axis that ``x:guidance=4,7,10`` means; every value has been checked against the option's type and range.

    Values are separated by commas, quoted as in CSV where they hold one (``x:prompt="a, b",c``); ``1..4`` and
    ``20..50..10`` are numbers from, to and by. Raises SdlabError for anything else.
    """
    place, colon, rest = text.strip().partition(":")
    option, equals, values = rest.partition("=")
    if place.lower() not in PLACES or not colon or not equals:
        raise SdlabError(
            f"'{text}' is no axis", where="--grid", next_step=f"{HOW}; z: makes a sheet for each value"
        )
    word = option.strip().lower().lstrip("-").replace("-", "_")
    field = _field(word)
    taken = [_checked(field, one) for one in _values(field, values, text)]
    if len(set(taken)) < len(taken):
        twice = next(_text(one) for one in taken if taken.count(one) > 1)
        raise SdlabError(f"{word} has the value {twice} twice", where="--grid")
    name = "" if field in ("prompt", "load_model") else f"{word.replace('_', ' ')} "
    labels = _labels(field, taken)
    return Axis(
        place.lower(),
        field,
        tuple(Value(f"{name}{said}", one) for said, one in zip(labels, taken, strict=True)),
    )


def _field(word: str) -> str:
    """The field of the option; SdlabError for one that is unknown or makes no other picture."""
    field = ALIASES.get(word, word)
    known = [one.name for one in dataclasses.fields(GenerateConfig)]
    if field not in known:
        near = did_you_mean(word, [*known, *ALIASES])
        raise SdlabError(
            f"there is no option '{word}'{near}", where="--grid", next_step="Options are those of generate"
        )
    if field not in VARYING:
        raise SdlabError(
            f"{word} does not change what is in a picture",
            where="--grid",
            next_step=f"These do: {', '.join(sorted(VARYING))}",
        )
    return field


def _values(field: str, text: str, axis: str) -> list[str]:
    if not text.strip():
        raise SdlabError(f"'{axis}' has no values", where="--grid", next_step=HOW)
    try:
        [row] = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as reason:
        raise SdlabError(
            f"the quotes in '{axis}' are not closed or stand inside a value", where="--grid"
        ) from reason
    found: list[str] = []
    for one in row:
        match = _RANGE.fullmatch(one.strip()) if field in _TAKES_RANGES else None
        found += _between(match, axis) if match else [one.strip()]
        if len(found) > MAX_VALUES:
            raise SdlabError(f"'{axis}' has more than {MAX_VALUES:,} values", where="--grid")
    return found


def _between(match: re.Match[str], axis: str) -> list[str]:
    """The numbers of ``4..8..2``: both ends, if the steps meet the last."""
    try:
        first, last, step = Decimal(match[1]), Decimal(match[2]), Decimal(match[3] or 1)
        count = int((last - first) / step) + 1 if step else 0
    except (InvalidOperation, OverflowError) as reason:
        raise SdlabError(f"'{match[0]}' is no range", where="--grid") from reason
    if step <= 0 or count < 1:
        raise SdlabError(f"'{match[0]}' in '{axis}' has no number in it", where="--grid")
    if count > MAX_VALUES:
        raise SdlabError(f"'{axis}' has more than {MAX_VALUES:,} values", where="--grid")
    return [format(first + step * i, "f") for i in range(count)]


def _checked(field: str, text: str) -> Any:
    if text.lower() in _NONE and field in _MAY_BE_LEFT_OUT:
        return () if field in ("lora", "ref") else ""
    if not text:
        raise SdlabError(f"{field} has an empty value", where="--grid")
    try:
        _, value = parse_value(GenerateConfig, field, text)
    except SdlabError as reason:
        raise SdlabError(str(reason), where="--grid") from reason
    return value[0] if field == "prompt" else value


def _labels(field: str, values: Sequence[Any]) -> list[str]:
    """What is written beside the values; of paths only what tells them apart."""
    texts = [_text(value) for value in values]
    if field == "scheduler":
        return [text.replace("none", "default") for text in texts]
    if field not in _PATHS:
        return texts
    short = _without_shared([_short(text) for text in texts])
    return short if len(set(short)) == len(short) else texts


def _short(path: str) -> str:
    """``tuned/cats/checkpoints/step-000500`` is ``cats step 500``."""
    plain = path.replace("\\", "/").removeprefix("./").removeprefix("tuned/").rstrip("/")
    return re.sub(r"/checkpoints/step-0*(\d)", r" step \1", plain).replace(".safetensors", "")


def _without_shared(paths: list[str]) -> list[str]:
    """The paths without the folders that all of them lie in; a single one is its last part."""
    parts = [path.split("/") for path in paths if path != "none"]
    shared = min((len(one) - 1 for one in parts), default=0)
    while len({tuple(one[:shared]) for one in parts}) > 1:
        shared -= 1
    return [path if path == "none" else "/".join(path.split("/")[shared:]) for path in paths]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        value = ", ".join(str(one) for one in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"
