"""Prompts and what is said beside them: --prompt, and prompt files of four kinds.

    .txt           red star, blue background --seed 7 --steps 30 --negative blurry, text
    .jsonl         {"prompt": "red star", "seed": 7, "cfg_scale": 5}
    .csv  .tsv     a header of such names, then a row a prompt; an empty cell says nothing

A line may set what stands in `PER_LINE`, in sdlab's own words, A1111's or kohya's. A line at fault is handed on with
its fault, so that the others can be made. No heavy imports.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.inference.prompts.text_file import numbered, read_text
from sdlab.options import did_you_mean, normalise, parse_value

PER_LINE = (
    *("negative", "seed", "steps", "guidance", "width", "height", "image_size", "scheduler", "num", "prefix"),
    *("no_prefix", "clip_skip", "emphasis", "hires", "hires_steps", "hires_strength", "strength"),
)
OTHER_WORDS = {  # A1111's and those of kohya's gen_img
    **dict.fromkeys(("negative-prompt", "n"), "negative"),
    **dict.fromkeys(("cfg-scale", "cfg", "l"), "guidance"),
    **dict.fromkeys(("sampler-name", "sampler-index", "sampler", "ss"), "scheduler"),
    **dict.fromkeys(("batch-size", "n-iter"), "num"),
    "d": "seed",
    "s": "steps",
    "w": "width",
    "h": "height",
    "denoising-strength": "strength",
    "hr-scale": "hires",
    "hr-second-pass-steps": "hires_steps",
}
SIDE_PX = 8  # widths and heights are multiples of it
NUM_SHOWN = 3  # faults named where no line is left

_FLAG = re.compile(r"(?:^|(?<=\s))--([A-Za-z][\w-]*)(?:=|(?=\s)|$)")
_QUOTED = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)')(?:\s*$|\s+(?=--[A-Za-z][\w-]*(?:=|\s|$)))""")


@dataclass(frozen=True)
class Line:
    """A prompt, and how it differs from the other prompts of the job."""

    prompt: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of the config, to checked values
    where: str = ""  # "prompts.txt:5"; "" for what was typed as --prompt
    fault: str = ""  # why it cannot be made; its settings are then those that could be read


@dataclass(frozen=True)
class _Row:
    """What a file says in one place: names as typed, to values, in order; or why it cannot be read."""

    number: int  # of the line, from 1
    said: Sequence[tuple[str, Any]] = ()
    fault: str = ""


def gather(prompts: Sequence[str], file: Path | None, *, config_type: type[Any]) -> list[Line]:
    """The prompts given one by one, as they are, then the lines of the file, with those that are at fault.

    Raises SdlabError where there is no prompt, where the file cannot be read, where a prompt that was typed is not
    text, and where every line is at fault.
    """
    for prompt in prompts:
        check_text(prompt, where="--prompt")
    found = [Line(prompt) for prompt in prompts]
    if file is not None:
        found += read_file(file, config_type=config_type)
    if not found:
        raise SdlabError(
            "the file holds no prompt" if file is not None else "no prompt",
            where=str(file) if file is not None else "",
            next_step='Say what to draw: --prompt "red star, blue background", or --prompt-file prompts.txt',
        )
    if all(line.fault for line in found):
        raise _none_left(found, file)
    return found


def check_text(text: str, *, where: str) -> None:
    """Raises SdlabError for bytes that are not UTF-8 (they reach us as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        raise SdlabError(
            f"not UTF-8 text: {text!r}", where=where, next_step="Save or type it as UTF-8"
        ) from reason


def read_file(path: Path, *, config_type: type[Any]) -> list[Line]:
    """The lines of a prompt file, of the kind that its suffix says; .txt for any other suffix.

    UTF-8, with or without a byte order mark. Raises SdlabError if it cannot be read or is not UTF-8, and for a table
    without a column of prompts.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise SdlabError(
            "is JSON", where=str(path), next_step="Write one object a line and call the file .jsonl"
        )
    text = read_text(path)
    rows: Iterable[_Row]
    if suffix in (".csv", ".tsv"):
        rows = _table(text, path, "\t" if suffix == ".tsv" else "")
    else:
        read = _json_row if suffix == ".jsonl" else _flag_row
        rows = (read(number, line) for number, line in numbered(text))
    kind = _Kind(config_type)
    return [kind.line(row, where=f"{path.name}:{row.number}") for row in rows]


def _none_left(lines: Sequence[Line], file: Path | None) -> SdlabError:
    more = len(lines) - NUM_SHOWN
    faults = [f"{line.where}: {line.fault}" for line in lines[:NUM_SHOWN]]
    return SdlabError(
        "no line of it can be made: " + "; ".join(faults) + (f"; and {more} more" if more > 0 else ""),
        where=str(file),
        next_step="Mend the file",
    )


# ------------------------------------------------------------------------------------------------ files


def _flag_row(number: int, line: str) -> _Row:
    """``prompt --name value --name "value"``: a value runs to the next flag, or is quoted."""
    first = _FLAG.search(line)
    head = line[: first.start()].strip() if first else line
    said: list[tuple[str, Any]] = [("prompt", head)] if head else []
    while first:
        quoted = _QUOTED.match(line, first.end())
        following = _FLAG.search(line, quoted.end() if quoted else first.end())
        if quoted:
            value = quoted[2] if quoted[1] is None else re.sub(r'\\(["\\])', r"\1", quoted[1])
        else:
            value = line[first.end() : following.start() if following else None].strip()
        bare = not quoted and not value
        said.append((f"--{first[1]}", None if bare else value))
        first = following
    return _Row(number, said)


def _json_row(number: int, line: str) -> _Row:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as reason:
        return _Row(number, fault=f"is not JSON ({getattr(reason, 'msg', reason)})")
    if not isinstance(said, dict):
        return _Row(number, fault='is no object; write {"prompt": "red star", "seed": 7}')
    return _Row(number, [(name, value) for name, value in said.items() if value is not None])


def _table(text: str, path: Path, delimiter: str) -> Iterator[_Row]:
    """Rows of a table with a header; a spreadsheet's semicolons are told from commas by the header."""
    head = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter or (";" if ";" in head and "," not in head else ","),
        strict=True,
    )
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as reason:
            cells, fault = [], f"is no row of a table ({reason}); look at its quotes"
        else:
            fault = ""
        if names is None:
            names = _header(cells, path, fault)
        elif fault or len(cells) > len(names):
            yield _Row(number, fault=fault or f"has {len(cells)} cells under {len(names)} names")
        elif any(cell.strip() for cell in cells):
            yield _Row(number, [(n, c) for n, c in zip(names, cells, strict=False) if c.strip()])


def _header(cells: Sequence[str], path: Path, fault: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if fault or "prompt" not in (name.lower() for name in names):
        raise SdlabError(
            "its first row names no column 'prompt'",
            where=str(path),
            next_step="Begin with prompt,seed,steps",
        )
    return names


# ------------------------------------------------------------------------------------------------ checks


class _Kind:
    """What a line may say in a job whose options are `config_type`."""

    def __init__(self, config_type: type[Any]) -> None:
        self._type = config_type
        self._options = {normalise(field.name) for field in dataclasses.fields(config_type)}
        own = [name for name in PER_LINE if normalise(name) in self._options]
        self._known = {normalise(name): name for name in own}
        self._known |= {word: name for word, name in OTHER_WORDS.items() if name in own}

    def line(self, row: _Row, *, where: str) -> Line:
        """The line with its settings checked, or with all its faults."""
        faults = [row.fault] if row.fault else []
        said: dict[str, tuple[str, Any]] = {}  # by field: the word that said it, and its value
        for typed, value in row.said:
            word = re.sub(r"[\s_]", "-", typed.strip().removeprefix("--").lower())
            try:
                field, checked = self._checked(word, typed, value)
                said[field] = (word, self._together(field, word, checked, typed, said))
            except SdlabError as reason:
                faults.append(reason.what)
        if "prompt" not in said and not faults:
            faults.append("no prompt")
        if "prefix" in said and "no_prefix" in said:
            faults.append("prefix and no-prefix exclude each other")
        _, prompt = said.pop("prompt", ("", ""))
        settings = {field: value for field, (_, value) in said.items()}
        return Line(prompt, settings, where, "; ".join(faults))

    def _checked(self, word: str, typed: str, value: Any) -> tuple[str, Any]:
        """(field, checked value); the prompt is one of the fields. Raises SdlabError."""
        field = "prompt" if word == "prompt" else self._known.get(word)
        if field is None:
            raise self._unknown(word, typed)
        if value is None:
            value = {"no_prefix": "true", "negative": "", "prefix": "", "prompt": ""}.get(field)
        if value is None:
            raise SdlabError(f"{typed} needs a value")
        if field in ("prompt", "negative", "prefix"):
            return field, _text(value, typed)
        _, checked = parse_value(self._type, field, value.strip() if isinstance(value, str) else value)
        if field == "scheduler":
            from sdlab.inference.engines.schedulers import canonical

            checked = canonical(checked)
        if field in ("width", "height") and checked % SIDE_PX:
            raise SdlabError(f"{typed} {checked} is no multiple of {SIDE_PX}")
        return field, checked

    def _together(
        self, field: str, word: str, value: Any, typed: str, said: Mapping[str, tuple[str, Any]]
    ) -> Any:
        """The value, where nothing else on the line says another; A1111's two counts are multiplied."""
        before, other = said.get(field, ("", None))
        if not before:
            return value
        if {before, word} == {"batch-size", "n-iter"}:
            return parse_value(self._type, field, other * value)[1]
        raise SdlabError(f"{typed} is said twice")

    def _unknown(self, word: str, typed: str) -> SdlabError:
        if word in self._options:
            return SdlabError(f"{typed} holds for the whole job and cannot stand on a line")
        if word in (*map(normalise, PER_LINE), *OTHER_WORDS):
            return SdlabError(f"{typed} has no meaning for this command")
        near = did_you_mean(word, ["prompt", *self._known])
        if not near and typed.startswith("--"):
            near = ', if it is part of the prompt write the line as --prompt "..."'
        return SdlabError(f"unknown setting '{typed}'{near}")


def _text(value: Any, typed: str) -> str:
    if not isinstance(value, str):
        raise SdlabError(f"{typed} is not text")
    try:
        check_text(value, where="")
    except SdlabError as reason:
        raise SdlabError(f"{typed} is {reason.what[:40]}") from reason
    return value
