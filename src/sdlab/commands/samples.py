"""`sdlab samples`: prompts, seeds and any option beside each other on labelled sheets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdlab import show
from sdlab.commands.generate import TUNED, hasher
from sdlab.errors import ItemsFailed, SdlabError
from sdlab.inference.config import GenerateConfig, SamplesConfig
from sdlab.options import normalise

if TYPE_CHECKING:
    from sdlab.inference.prompts.lines import Line
    from sdlab.inference.samples.axes import Axis

WITH_REDRAW = ("redraw", "cell")


def samples(config: SamplesConfig, given: frozenset[str]) -> None:
    """Compare prompts, seeds, models and options on labelled sheets.

    sdlab samples --grid x:guidance=4,7,10 y:checkpoint=tuned/a,tuned/b. Without --grid: a row for each prompt, a
    column for each seed. Without --prompt, prompts that suit the model. Everything goes to
    output/samples_{time}/: sheet.png, samples.json and cells/, where each picture lies whole, with its recipe.
    """
    if config.redraw is not None:
        _redraw(config, given)
        return
    from sdlab.inference.samples import axes, plan

    asked = axes.parse_all((*config.grid, *config.axes))
    plan.check(config, given, asked)
    lines = _lines(config, asked)
    num_seeds = config.num if "num" in given or not asked else 1
    plan.check_seeds(config.seed, num_seeds)
    _check_size(config, asked, lines, num_seeds)

    from sdlab.inference.samples import run

    run.make(config, asked, lines, num_seeds=num_seeds, tuned=TUNED, hasher=hasher())


def _lines(config: SamplesConfig, asked: Sequence[Axis]) -> list[Line]:
    """The prompts that were given; none where an axis has them, or those that suit the model are meant."""
    from sdlab.inference.prompts.lines import check_text, gather

    for axis in asked:
        for one in axis.values:
            check_text(one.label, where="--grid")
    if not config.prompt and config.prompt_file is None:
        return []
    lines = gather(config.prompt, config.prompt_file, config_type=GenerateConfig)
    if any(name in line.settings for line in lines for name in ("seed", "num")):
        show.warn("--seed and --num of single lines do not count here: all prompts have the same seeds")
    return lines


def _check_size(config: SamplesConfig, asked: Sequence[Axis], lines: Sequence[Line], num_seeds: int) -> None:
    """Raises SdlabError where the sheets would be too large, before a model is opened."""
    from sdlab.inference.samples import plan, sheet

    lines = lines or plan.default_prompts("")
    grid = plan.arranged(asked, lines, num_seeds=num_seeds, first_seed=0)
    num_columns, num_rows = len(grid.columns.values), len(grid.rows.values)
    sheet.check_size(num_columns, num_rows, grid.num_sheets, (1, 1))

    def side_of(load_model: str) -> int:
        return plan.own_side(load_model, tuned=TUNED, allow_pickle=config.allow_pickle)

    largest = plan.largest_px(plan.as_generate(config), asked, side_of)
    sheet.check_size(num_columns, num_rows, grid.num_sheets, sheet.scaled(largest, config.cell))


def _redraw(config: SamplesConfig, given: frozenset[str]) -> None:
    from sdlab.inference.samples import about

    also = [f"--{normalise(name)}" for name in sorted(given - {*WITH_REDRAW})]
    if also:
        raise SdlabError(f"takes --cell and nothing else, so leave out {', '.join(also)}", where="--redraw")
    assert config.redraw is not None
    paths, bad = about.redraw(config.redraw, cell=config.cell)
    for path in paths:
        show.out(str(path))
    if bad:
        raise ItemsFailed(f"the sheets are drawn, but {'; '.join(bad[:10])}", next_step="Make them again")
