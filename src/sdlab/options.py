"""A frozen dataclass says all about a command's options; flags, TOML keys, checks and run.json come from it.

    @dataclass(frozen=True)
    class CropConfig:
        images: Annotated[Path, opt("Folder of pictures.", argument=True)] = Path("images")
        size: Annotated[int, opt("Side, in pixels.", min=8, old=("--image_side",))] = 512

``add_command(app, "crop", CropConfig, run)`` gives ``sdlab crop [IMAGES] --size 512 --config crop.toml``.
Typer is touched here and in cli.py only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

import typer

from sdlab.errors import SdlabError, gathered


@dataclass(frozen=True)
class Opt:
    """What a field says of its option besides its type and default; see `opt`."""

    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    argument: bool = False
    flag: str = ""
    old: tuple[str, ...] = ()
    group: str = "Options"
    after: str = ""


def opt(
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] = (),
    argument: bool = False,
    flag: str = "",
    old: tuple[str, ...] = (),
    group: str = "Options",
    after: str = "",
) -> Opt:
    """Describe an option: help line, range, allowed words, other spellings (`old`), panel of the help page.

    `flag` gives the whole spelling where the field's name is not it, for instance ``--no-txt`` for a bool.
    `after` names the inherited field that the option stands after in the help, where its place is not the end.
    """
    return Opt(help, min, max, choices, argument, flag, old, group, after)


def normalise(name: str) -> str:
    """The dashed spelling of an option or command name: ``image_size`` is ``image-size``."""
    return name.replace("_", "-")


def add_command(
    app: typer.Typer, name: str, config_type: type[Any], run: Callable[..., None], *, panel: str
) -> None:
    """Register `run(config)` as a subcommand whose options are the fields of `config_type`.

    A `run(config, given)` also gets the names of the options that a flag or the TOML file set.

    The help text is the docstring of `run`. Values come from, in this order: flags, the TOML file given by
    ``--config``, the dataclass's defaults. Range and choice checks are the same for both.
    """
    hints = _hints(config_type)
    fields = _in_order(config_type)

    wants_given = len(inspect.signature(run).parameters) == 2

    def command(context: typer.Context, **values: Any) -> None:
        config = config_type(**{f.name: _frozen(hints[f.name], values[f.name]) for f in fields})
        if wants_given:
            run(config, frozenset(f.name for f in fields if _was_given(context, f.name)))
        else:
            run(config)

    parameters = [_parameter(f, hints[f.name]) for f in fields]
    if "config" not in hints:
        parameters.append(_config_parameter(config_type))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
    command.__doc__ = inspect.cleandoc(run.__doc__ or "")
    app.command(name, rich_help_panel=panel)(command)


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a config as plain JSON values, paths as posix text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.as_posix()
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return {f.name: plain(getattr(config, f.name)) for f in _in_order(type(config))}


def read_toml(path: Path, config_type: type[Any]) -> dict[str, Any]:
    """Option values from a TOML file, keyed by field name; every unknown key is named with the nearest known.

    Raises SdlabError if the file cannot be read or parsed, or has unknown keys.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as reason:
        raise SdlabError(f"cannot read it ({reason.strerror})", where=str(path)) from reason
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise SdlabError(f"not a TOML file ({reason})", where=str(path)) from reason
    known = _spellings(config_type)
    hints = _hints(config_type)
    faults, values = [], {}
    for key, value in table.items():
        name = known.get(normalise(key))
        if name is None:
            faults.append(f"unknown key '{key}'{did_you_mean(normalise(key), list(known))}")
        elif isinstance(value, dict):
            faults.append(f"'{key}' is a table; options stand at the top level")
        else:
            alone = isinstance(value, str) and _is_tuple(_split(hints[name])[0])
            values[name] = [value] if alone else value
    if faults:
        raise gathered(faults, where=str(path), next_step="Keys are the flags without dashes, see --help")
    return values


def parse_value(config_type: type[Any], option: str, value: Any) -> tuple[str, Any]:
    """(field, value) for one option of `config_type` given as text, or as a number or list from JSON.

    `option` is any spelling of it. Raises SdlabError for an unknown option, with the nearest one, and for a value of
    the wrong type, out of range or not among the choices.
    """
    known = _spellings(config_type)
    name = known.get(normalise(option.strip().lstrip("-")))
    if name is None:
        raise SdlabError(f"unknown option '{option}'{did_you_mean(normalise(option), list(known))}")
    kind, about = _split(_hints(config_type)[name])
    if _is_tuple(kind):
        items = value if isinstance(value, (list, tuple)) else [value]
        return name, tuple(_value(get_args(kind)[0], about, option, item) for item in items)
    return name, _value(kind, about, option, value)


def _value(kind: Any, about: Opt, option: str, value: Any) -> Any:
    kind = str if about.choices else kind  # or a Literal of the same words
    [plain] = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
    fault = SdlabError(f"'{value}' is no value for {option}")
    if plain is bool:
        if str(value).lower() not in ("true", "false"):
            raise fault
        return str(value).lower() == "true"
    if isinstance(value, (bool, list, dict)) or value is None or (isinstance(value, float) and plain is int):
        raise fault
    try:
        made = plain(value)
    except (TypeError, ValueError) as reason:
        raise fault from reason
    if about.choices and made not in about.choices:
        raise SdlabError(f"'{value}' is no {option}; there are {', '.join(about.choices)}")
    low = -math.inf if about.min is None else about.min
    high = math.inf if about.max is None else about.max
    if plain in (int, float) and not low <= made <= high:
        raise SdlabError(f"{option} {value} is not within {low:g} to {high:g}")
    return made


def _in_order(config_type: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields as the help shows them: each where its class puts it, or after the one that it names."""
    hints = _hints(config_type)
    ordered: list[dataclasses.Field[Any]] = []
    for field in dataclasses.fields(config_type):
        about = next((a for a in get_args(hints[field.name]) if isinstance(a, Opt)), None)
        names = [other.name for other in ordered]
        place = names.index(about.after) + 1 if about and about.after else len(ordered)
        ordered.insert(place, field)
    return ordered


def did_you_mean(word: str, known: list[str]) -> str:
    """``, did you mean 'steps'?`` or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def _hints(config_type: type[Any]) -> dict[str, Any]:
    """The annotations of all fields, evaluated; those that are inherited are evaluated once for all classes."""
    merged: dict[str, Any] = {}
    for base in reversed(config_type.__mro__[:-1]):
        merged |= _own_hints(cast(Hashable, base))
    return merged


@functools.cache  # they take milliseconds, and are asked for with every line of a prompt file
def _own_hints(config_type: Any) -> dict[str, Any]:
    own = {
        "__module__": config_type.__module__,
        "__annotations__": inspect.get_annotations(config_type),
    }
    return typing.get_type_hints(type(config_type.__name__, (), own), include_extras=True)


def _spellings(config_type: type[Any]) -> dict[str, str]:
    """Every dashed spelling of every option, to its field's name."""
    hints = _hints(config_type)
    found = {}
    for field in dataclasses.fields(config_type):
        _, about = _split(hints[field.name])
        own = () if about.flag.startswith("--no-") else (about.flag,)  # a negation is not the field's value
        for spelling in (field.name, *own, *about.old):
            found[normalise(spelling.lstrip("-"))] = field.name
    found.pop("", None)
    return found


def _split(hint: Any) -> tuple[Any, Opt]:
    assert get_origin(hint) is Annotated, f"option without opt(): {hint}"
    kind, about = get_args(hint)[:2]
    return kind, about


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP")


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _frozen(hint: Any, value: Any) -> Any:
    kind, _ = _split(hint)
    return tuple(value or ()) if _is_tuple(kind) else value


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    kind, about = _split(hint)
    default = field.default
    assert default is not dataclasses.MISSING, f"{field.name}: every option has a default"
    if _is_tuple(kind):
        kind, default = list[get_args(kind)[0]], list(default) or None  # type: ignore[misc]
        kind = kind if default else Union[kind, None]  # noqa: UP007  (a runtime type)
    settings: dict[str, Any] = {"help": about.help}
    if about.min is not None or about.max is not None:
        whole = int in (kind, *get_args(kind))
        settings["min"] = about.min if about.min is None or not whole else int(about.min)
        settings["max"] = about.max if about.max is None or not whole else int(about.max)
    if about.choices:
        kind = _literal(kind, about.choices)
    if about.argument:
        info: Any = typer.Argument(**settings)
    else:
        dashed = normalise(field.name)
        switch = bool in (kind, *get_args(kind))
        spelling = about.flag or (f"--{dashed}/--no-{dashed}" if switch else f"--{dashed}")
        info = typer.Option(spelling, *about.old, rich_help_panel=about.group, **settings)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _literal(kind: Any, choices: tuple[str, ...]) -> Any:
    literal = typing.Literal[choices]  # type: ignore[valid-type]
    optional = isinstance(kind, types.UnionType) or get_origin(kind) is Union
    return Union[literal, None] if optional else literal  # noqa: UP007  (a runtime type)


def _config_parameter(config_type: type[Any]) -> inspect.Parameter:
    def fill(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            context.default_map = {**(context.default_map or {}), **read_toml(path, config_type)}
        return path

    info = typer.Option("--config", help="TOML file of options; flags win.", callback=fill, is_eager=True)
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Union[Path, None], info],  # noqa: UP007  (a runtime type)
    )
