"""What is written and shown on the sheets, from the plan of every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdlab import show
from sdlab.inference.config import SamplesConfig
from sdlab.inference.jobs.plan import Item, Plan
from sdlab.inference.jobs.session import Session, format_of
from sdlab.inference.samples.about import About, sheet_name
from sdlab.inference.samples.plan import Arrangement, as_generate
from sdlab.inference.samples.sheet import Cell, Sheet, check_sheets, look_for, scaled

CELLS = "cells"


@dataclass(frozen=True)
class Group:
    """The pictures of one model."""

    session: Session
    plan: Plan  # with the pictures' numbers on the sheets


def told(config: SamplesConfig, arrangement: Arrangement, groups: Sequence[Group], *, seed: int) -> About:
    """What will be on the sheets. Raises SdlabError where one would be too large."""
    suffix = format_of(as_generate(config)).suffix
    sheets = _sheets(arrangement, groups, suffix=suffix)
    specs = [item.spec for group in groups for item in group.plan.items if item.spec is not None]
    sizes = [
        (spec.hires.width, spec.hires.height) if spec.hires else (spec.width, spec.height) for spec in specs
    ]
    largest = max(width for width, _ in sizes), max(height for _, height in sizes)
    look, missing = look_for(sheets, scaled(largest, config.cell))
    if missing:
        show.warn(f"no font here has these letters of the labels: {missing[:40]}")
    check_sheets(sheets, look)
    return About(seed, (*config.grid, *config.axes), look, tuple(sheets))


def _sheets(arrangement: Arrangement, groups: Sequence[Group], *, suffix: str) -> list[Sheet]:
    columns = tuple(one.label for one in arrangement.columns.values)
    rows = tuple(one.label for one in arrangement.rows.values)
    facts = {item.shot.index: _facts(group.session, item) for group in groups for item in group.plan.items}
    size = len(columns) * len(rows)
    sheets = []
    for number, chosen in enumerate(arrangement.sheets()):
        first = number * size
        named = [
            one.label
            for axis, one in zip(arrangement.others, chosen, strict=True)
            if axis.field == "prompt" or len(axis.values) > 1
        ]
        shared = _common([facts[i] for i in range(first, first + size) if i in facts])
        shown = {axis.field for axis in (arrangement.rows, arrangement.columns, *arrangement.others)}
        common = [text for key, text in shared.items() if key not in shown or key == "seed"]
        cells = [
            tuple(
                Cell(f"{CELLS}/{first + row * len(columns) + column:04d}{suffix}")
                for column in range(len(columns))
            )
            for row in range(len(rows))
        ]
        sheets.append(
            Sheet(sheet_name(number), " · ".join(named), " · ".join(common), columns, rows, tuple(cells))
        )
    return sheets


def _common(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all have alike."""
    first = facts[0] if facts else {}
    return {key: text for key, text in first.items() if text and all(one[key] == text for one in facts)}


def _facts(session: Session, item: Item) -> dict[str, str]:
    """What can be told of a picture, by option; "" for what is as ever."""
    config, spec, chosen = item.config, item.spec, session.opened.chosen
    assert spec is not None
    loras = ", ".join(f"{source.name}:{weight:g}" for source, weight in chosen.loras)
    return {
        "load_model": chosen.model.name,
        "unet": f"unet {chosen.unet.name}" if chosen.unet else "",
        "vae": f"vae {chosen.vae.name}" if chosen.vae else "",
        "lora": f"lora {loras}" if loras else "",
        "image_size": f"{spec.width}x{spec.height}",
        "hires": f"then {spec.hires.width}x{spec.hires.height}" if spec.hires else "",
        "steps": f"{spec.steps} step{'s' * (spec.steps != 1)}",
        "guidance": f"guidance {spec.guidance:g}",
        "scheduler": spec.scheduler,
        "clip_skip": f"clip skip {spec.clip_skip}" if spec.clip_skip != 1 else "",
        "emphasis": f"emphasis {spec.emphasis}" if spec.emphasis != "a1111" else "",
        "seed": f"seed {item.shot.seed}",
        "prefix": f"prefix: {item.shot.prefix.strip(', ')}" if config.prefix else "",
        "negative": f"negative: {item.shot.negative}" if item.shot.negative else "",
    }
