"""What goes where on the sheets of `sdlab samples`: prompts, seeds and any option, as columns, rows and sheets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError, gathered
from sdlab.inference.config import GenerateConfig, SamplesConfig
from sdlab.inference.prompts.lines import PER_LINE, Line
from sdlab.inference.samples.axes import Axis, Value
from sdlab.inference.spec import MAX_SEED
from sdlab.options import normalise

_SIZES = ("width", "height", "image_size")
_NOT_HERE = {
    "from_picture": "a picture is made again by sdlab generate --from",
    "change": "it belongs to sdlab generate --from",
    "explain": "sdlab generate --explain shows how prompts are read",
}
_SETS = Path(__file__).with_name("prompt_sets")


@dataclass(frozen=True)
class Place:
    """One picture: where it stands and what is made there."""

    index: int  # sheet after sheet, row after row
    line: Line  # with everything that can differ within one model
    of_model: Mapping[str, Any]  # options, by field, that need the model opened anew


@dataclass(frozen=True)
class Arrangement:
    """Columns, rows, and axes whose every combination is a sheet of its own."""

    columns: Axis
    rows: Axis
    others: tuple[Axis, ...]

    @property
    def num_pictures(self) -> int:
        """How many pictures there are on all sheets."""
        return self.num_sheets * len(self.rows.values) * len(self.columns.values)

    @property
    def num_sheets(self) -> int:
        """How many sheets there are."""
        return math.prod(len(axis.values) for axis in self.others)

    def sheets(self) -> list[tuple[Value, ...]]:
        """The values of `others` on each sheet."""
        return list(itertools.product(*(axis.values for axis in self.others)))

    def places(self, *, seed: int) -> list[Place]:
        """Every picture, in the order of their indices; `seed` is counted on from by seeds that are no axis's own."""
        fields = [axis.field for axis in (*self.others, self.rows, self.columns)]
        combined = itertools.product(*(axis.values for axis in (*self.others, self.rows, self.columns)))
        return [
            _place(index, dict(zip(fields, values, strict=True)), seed)
            for index, values in enumerate(combined)
        ]


def _place(index: int, chosen: Mapping[str, Value], seed: int) -> Place:
    line: Line = chosen["prompt"].value
    taken = {field: one.value for field, one in chosen.items() if field not in ("", "prompt")}
    if "offset" in taken:
        taken["seed"] = seed + taken.pop("offset")
    settings = {**{k: v for k, v in line.settings.items() if k not in ("num", "seed")}, **taken}
    said = [one.label for field, one in chosen.items() if field not in ("", "prompt")]
    return Place(
        index,
        dataclasses.replace(
            line,
            settings={field: value for field, value in settings.items() if field in PER_LINE},
            where=", ".join([*([line.where] if line.where else []), *said]),
        ),
        {field: value for field, value in settings.items() if field not in PER_LINE},
    )


def check(config: SamplesConfig, given: frozenset[str], axes: Sequence[Axis]) -> None:
    """Raises SdlabError for what shows without a model, all at once: options that mean nothing here or that an axis
    has already, values of an axis that cannot be.
    """
    from sdlab.inference.jobs import session

    faults = [f"--{_spelled(field)}: {why}" for field, why in _NOT_HERE.items() if field in given]
    for axis in axes:
        also = {"prompt": ("prompt", "prompt_file"), "seed": ("seed", "num"), "image_size": _SIZES}
        for field in also.get(axis.field, (axis.field,)):
            if field in given:
                faults.append(f"--{_spelled(field)} is on the axis {axis.place}: already, so leave it out")
    named = {axis.field for axis in axes}
    if "image_size" in named & set(_SIZES) and len(named & set(_SIZES)) > 1:
        faults.append("image_size is width and height at once: take it or those two")
    if faults:
        raise gathered(faults, where="")
    session.check(as_generate(config))
    for axis in axes:
        for one in axis.values:
            try:
                session.check(
                    as_generate(config, **({} if axis.field == "prompt" else {axis.field: one.value}))
                )
            except SdlabError as reason:
                faults.append(f"{axis.place}: {one.label}: {reason}")
    if faults:
        raise gathered(faults[:10], where="--grid")


def _spelled(field: str) -> str:
    return {"from_picture": "from", "change": "set"}.get(field, normalise(field))


def arranged(
    axes: Sequence[Axis], lines: Sequence[Line], *, num_seeds: int, first_seed: int | None
) -> Arrangement:
    """The sheets. `lines` are the prompts, unless an axis has them.

    A side that no axis names shows the prompts (rows) and seeds (columns), as far as there are several of them.
    """
    by_place = {axis.place: _with_lines(axis) for axis in axes}
    named = {axis.field for axis in axes}
    free = []
    if "prompt" not in named:
        free.append(Axis("", "prompt", tuple(Value(line.prompt or "(empty)", line) for line in lines)))
    if "seed" not in named:
        free.append(_seeds(num_seeds, first_seed))
    columns, rows = by_place.get("x"), by_place.get("y")
    if rows is None:
        rows = _taken(free, prefer="prompt", leave="offset" if columns is None else "")
    if columns is None:
        columns = _taken(free, prefer="offset", leave="")
    others = [*free, *([by_place["z"]] if "z" in by_place else [])]
    return Arrangement(columns, rows, tuple(others))


def _seeds(num: int, first: int | None) -> Axis:
    """The seeds as counted from the first, which may not be known yet."""
    labels = [f"seed {first + i}" if first is not None else f"seed + {i}" for i in range(num)]
    return Axis("", "offset", tuple(Value(label, i) for i, label in enumerate(labels)))


def _with_lines(axis: Axis) -> Axis:
    """An axis of prompts has lines as its values."""
    if axis.field != "prompt":
        return axis
    return dataclasses.replace(axis, values=tuple(Value(v.label, Line(v.value)) for v in axis.values))


def _taken(free: list[Axis], *, prefer: str, leave: str) -> Axis:
    """The free axis with several values that suits a side best, taken out of `free`; else an empty side."""
    several = [axis for axis in free if len(axis.values) > 1 and axis.field != leave]
    if not several:
        return Axis("", "", (Value("", None),))
    best = next((axis for axis in several if axis.field == prefer), several[0])
    free.remove(best)
    return best


def default_prompts(base: str) -> list[Line]:
    """The prompts that are shown where none was given, for a model made from `base` (mini-sd, sd15 ...)."""
    path = _SETS / f"{base if base in ('mini-sd', 'mini-flux2') else 'large'}.txt"
    texts = path.read_text(encoding="utf-8").splitlines()
    return [Line(text) for text in texts if text and not text.startswith("#")]


def largest_px(
    config: GenerateConfig, axes: Sequence[Axis], side_of: Callable[[str], int]
) -> tuple[int, int]:
    """(width, height) that holds every picture; `side_of` tells the side that a model's own pictures have."""
    sized = [axis for axis in axes if axis.field in (*_SIZES, "hires", "load_model")]
    found = []
    for values in itertools.product(*(axis.values for axis in sized)):
        chosen = {axis.field: one.value for axis, one in zip(sized, values, strict=True)}
        found.append(_result_px(dataclasses.replace(config, **chosen), side_of))
    return max(width for width, _ in found), max(height for _, height in found)


def _result_px(config: GenerateConfig, side_of: Callable[[str], int]) -> tuple[int, int]:
    width, height = config.width or config.image_size, config.height or config.image_size
    if not (width and height):
        side = side_of(config.load_model)
        width, height = width or side, height or side
    return round(width * config.hires), round(height * config.hires)


def own_side(load_model: str, *, tuned: Path, allow_pickle: bool) -> int:
    """The side of the model's own pictures, from its files' headers: the smallest it can be where none is named.

    Raises SdlabError where there is no such model.
    """
    from sdlab.models.bases import RECOMMENDED
    from sdlab.models.opening import recommended
    from sdlab.models.resolve import newest_run, resolve

    if not load_model.strip() and newest_run(tuned) is None:
        return RECOMMENDED[
            "mini-sd"
        ].image_size  # a large one if there is a card, and asking for that takes seconds
    model = resolve(load_model, training=False, tuned=tuned, allow_pickle=allow_pickle)
    return recommended(model).image_size


def as_generate(config: SamplesConfig, **changes: Any) -> GenerateConfig:
    """The options of generate that make one picture of each line."""
    names = [field.name for field in dataclasses.fields(GenerateConfig)]
    values = {name: getattr(config, name) for name in names}
    return GenerateConfig(**{**values, "grid": False, "num": 1, "prompt": (), "prompt_file": None, **changes})


def check_seeds(first: int | None, num: int) -> None:
    """Raises SdlabError where the last of the seeds would pass 2**53 - 1."""
    if first is not None and first + num - 1 > MAX_SEED:
        raise SdlabError(f"seed {first + num - 1} passes the largest, {MAX_SEED}", where="--seed")
