"""From what was typed to the pictures of a job: which model, what each picture is, and who shares a batch.

session = open_session(config, tuned=..., hasher=...)      # the model's headers, no weights
plan = planned(session, lines, seed=7)                     # every picture, and what cannot be made
loaded = loaded_for(session, plan)                         # the weights
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import show
from sdlab.errors import SdlabError, gathered
from sdlab.inference.jobs.session import Session, check, format_of, misfits, prefix_for
from sdlab.inference.spec import MAX_SEED, Shot, Spec

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.batch import Batch
    from sdlab.inference.config import GenerateConfig
    from sdlab.inference.load import Loaded, Opened, Source
    from sdlab.inference.prompts.lines import Line
    from sdlab.inference.prompts.reading import Reading
    from sdlab.inference.spec import Reference


@dataclass(frozen=True)
class Item:
    """One picture of the job."""

    shot: Shot
    config: GenerateConfig  # the command's, with what its own line says
    spec: Spec | None = None  # None where it takes the size of the picture it starts from
    where: str = ""  # "prompts.txt:5"; "" for what was typed on the command line
    loras: tuple[tuple[Source, float], ...] = ()  # that the prompt names, with their weights
    embeddings: tuple[Source, ...] = ()
    num_chunks: int = 1  # of CLIP, the longer of prompt and negative prompt


@dataclass(frozen=True)
class Fault:
    """A picture that cannot be made, and why."""

    index: int
    why: str
    where: str = ""
    prompt: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class Plan:
    """Every picture of the job, and what of it cannot be made."""

    items: tuple[Item, ...]
    faults: tuple[Fault, ...]
    num: int  # pictures in all, those at fault too


def num_of(config: GenerateConfig, lines: Sequence[Line]) -> int:
    """Pictures that the lines ask for, of each start picture where there are some."""
    return sum(_num(config, line) for line in lines)


def _num(config: GenerateConfig, line: Line) -> int:
    return int(line.settings.get("num", config.num))


def check_seeds(config: GenerateConfig, count: int) -> None:
    """Raises SdlabError where the seed of the last of `count` pictures would pass 2**53 - 1."""
    if config.seed is not None and config.seed + count - 1 > MAX_SEED:
        raise SdlabError(f"picture {count - 1} would pass the largest seed, {MAX_SEED}", where="--seed")


def planned(
    session: Session,
    lines: Sequence[Line],
    *,
    seed: int,
    spec_for: Callable[[GenerateConfig], Spec] | None = None,
    times: int = 1,
) -> Plan:
    """Every picture of the lines, `times` times over, seeds and indices running on.

    `spec_for` tells how pictures are made, where that is known before a picture is opened.

    What is wrong with one line is a Fault of its pictures. Raises SdlabError where nothing is left to make, and for a
    textual inversion that is named and cannot be read.
    """
    _tell_choices(session, lines)
    made: list[Item | Fault] = []
    tagged = _Tagged(session)
    index = 0
    for _ in range(times):
        for line in lines:
            num = _num(session.config, line)
            first = int(line.settings.get("seed", seed + index))
            like = _like(session, line, spec_for)
            for place in range(num):
                if isinstance(like, Fault):
                    made.append(replace(like, index=index + place))
                else:
                    made.append(_item(session, line, like, tagged, index + place, first + place))
            index += num
    items = [one for one in made if isinstance(one, Item)]
    faults = [one for one in made if isinstance(one, Fault)]
    if not items:
        raise gathered(_said(faults), where="")
    return Plan(_measured(session, items), tuple(faults), index)


def _tell_choices(session: Session, lines: Sequence[Line]) -> None:
    """Warn of braces that do not close, and of wildcards where no folder for them was given."""
    from sdlab.inference.prompts.dynamic import warnings_of, wildcards_in

    own = (session.config.negative, prefix_for(session.config, session.advice.prefix))
    texts = dict.fromkeys([*own, *(line.prompt for line in lines if not line.fault)])
    for warning in dict.fromkeys(warning for text in texts for warning in warnings_of(text)):
        show.warn(warning)
    if session.wildcards is None:
        for name in dict.fromkeys(name for text in texts for name in wildcards_in(text)):
            show.warn(f"__{name}__ is sent as it is, as no folder of --wildcards was given")


def _said(faults: Sequence[Fault]) -> list[str]:
    said = dict.fromkeys(f"{fault.where}: {fault.why}" if fault.where else fault.why for fault in faults)
    return list(said)[:10]


def _like(session: Session, line: Line, spec_for: Callable[[GenerateConfig], Spec] | None) -> Item | Fault:
    """A picture of the line without its prompt, or what is wrong with the line."""
    nothing = Shot(0, "", "", "", 0)
    try:
        if line.fault:
            raise SdlabError(line.fault)
        said = {option: value for option, value in line.settings.items() if option not in ("num", "seed")}
        config = replace(session.config, **said)
        if said:
            check(config)
            if faults := misfits(config, session.opened.engine, session.grid):
                raise gathered(faults, where="")
        return Item(nothing, config, spec_for(config) if spec_for else None, line.where)
    except SdlabError as reason:
        return Fault(0, str(reason), line.where, line.prompt)


def _item(session: Session, line: Line, like: Item, tagged: _Tagged, index: int, seed: int) -> Item | Fault:
    from sdlab.inference.prompts.dynamic import expand

    config = like.config
    try:
        if seed > MAX_SEED:
            raise SdlabError(f"seed {seed} passes the largest, {MAX_SEED}")
        typed = expand(line.prompt, seed=seed, wildcards=session.wildcards, part="prompt")
        negative = expand(config.negative, seed=seed, wildcards=session.wildcards, part="negative")
        prefix = prefix_for(config, session.advice.prefix)
        prefix = expand(prefix, seed=seed, wildcards=session.wildcards, part="prefix")
        loras = tagged.in_text(prefix + typed)
    except SdlabError as reason:
        return Fault(index, str(reason), line.where, line.prompt, seed)
    shot = Shot(index, typed, prefix, negative, seed, "" if typed == line.prompt else line.prompt)
    return replace(like, shot=shot, loras=loras)


class _Tagged:
    """The LoRAs that prompts name: each found, hashed and checked against the model once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[str, Source | SdlabError] = {}

    def in_text(self, text: str) -> tuple[tuple[Source, float], ...]:
        """Raises SdlabError for one that is not there or does not fit the model."""
        from sdlab.inference.prompts.tags import loras_in

        found = []
        for tag in loras_in(text):
            if tag.name not in self._known:
                self._known[tag.name] = self._looked_up(tag.name)
            source = self._known[tag.name]
            if isinstance(source, SdlabError):
                raise source
            found.append((source, tag.weight))
        return tuple(found)

    def _looked_up(self, name: str) -> Source | SdlabError:
        from sdlab.inference import load

        try:
            source = load.lora_source(self._session.shelf.find(name), self._session.hasher)
            load.check_tagged(self._session.opened, [(source, 1.0)])
            return source
        except SdlabError as reason:
            return reason


def reading(opened: Opened, items: Sequence[Item]) -> Reading:
    """How the model reads the items' prompts. Raises SdlabError for a textual inversion that cannot be read."""
    from sdlab.inference.load import embeddings_of
    from sdlab.inference.prompts.reading import reading_of

    return reading_of(opened, embeddings_of(opened, [t for item in items for t in _texts(opened, item)]))


def _texts(opened: Opened, item: Item) -> tuple[str, ...]:
    """What is sent to the model."""
    return (item.shot.prompt,) if opened.engine.no_negative else (item.shot.prompt, item.shot.negative)


def _measured(session: Session, items: Sequence[Item]) -> tuple[Item, ...]:
    """The items with their length, and with those of the textual inversions that they name; says what is odd."""
    from sdlab.inference.prompts.embeddings import named_in

    opened, is_told = session.opened, not session.config.explain  # which shows every warning itself
    reads = reading(opened, items)
    sources = {source.name: source for source in opened.chosen.embeddings}
    known: dict[tuple[str, str], int] = {}
    warned: set[str] = set()
    measured = []
    for item in items:
        emphasis, num_chunks = item.config.emphasis, 1
        texts = _texts(opened, item)
        for text in texts:
            if (text, emphasis) not in known:
                known[text, emphasis] = reads.num_chunks(text, emphasis)
                new = [warning for warning in reads.warnings(text, emphasis) if warning not in warned]
                warned.update(new)
                for warning in new if is_told else ():
                    show.warn(warning)
            num_chunks = max(num_chunks, known[text, emphasis])
        named = tuple(sources[name] for name in named_in(texts, sources))
        measured.append(replace(item, num_chunks=num_chunks, embeddings=named))
    return tuple(measured)


def batches(
    session: Session, plan: Plan, *, folder: Path, names: Callable[[Shot], Iterator[str]]
) -> Iterator[Batch]:
    """The pictures of the plan, which start from noise, in groups that can be made together.

    All of them, also what is made already: who shares a batch changes last digits. Those with the same LoRAs follow
    each other, as changing LoRAs takes as long as some pictures.
    """
    from sdlab.inference.jobs.batches import grouped

    groups = grouped(plan.items, num_together(session.config), key=alike)
    turns = {worn: turn for turn, worn in enumerate(dict.fromkeys(_worn(group[0]) for group in groups))}
    given = {**looked_at(session.seen), "format": format_of(session.config)}
    for group in sorted(groups, key=lambda group: turns[_worn(group[0])]):
        yield batch_of(group, folder, names, **given)


def num_together(config: GenerateConfig) -> int:
    """Pictures of one batch at the most."""
    return 1 if config.exact else config.batch


def looked_at(seen: Sequence[tuple[Reference, Image.Image]]) -> dict[str, Any]:
    """The pictures that are looked at, as fields of a Batch."""
    return {
        "references": tuple(reference for reference, _ in seen),
        "looked_at": tuple(picture for _, picture in seen),
    }


def batch_of(
    group: Sequence[Item], folder: Path, names: Callable[[Shot], Iterator[str]], **given: Any
) -> Batch:
    """The items, which are `alike`, as one Batch."""
    from sdlab.inference.batch import Batch

    assert group[0].spec is not None
    return Batch(
        [item.shot for item in group],
        group[0].spec,
        folder,
        names,
        loras=group[0].loras,
        embeddings=tuple({source.path: source for item in group for source in item.embeddings}.values()),
        where=tuple(item.where for item in group),
        **given,
    )


def alike(item: Item) -> Hashable:
    """What is the same for pictures that can be made together."""
    return item.spec, _worn(item), item.num_chunks


def _worn(item: Item) -> tuple[tuple[Path, float], ...]:
    return tuple((source.path, weight) for source, weight in item.loras)


def loaded_for(session: Session, shots: Sequence[Shot]) -> Loaded:
    """The weights, ready to make pictures of these shots."""
    from sdlab.inference import load
    from sdlab.inference.engines.kinds import texts

    config = session.config
    running = load.Running(
        device=config.device,
        dtype=config.dtype,
        compile=config.compile,
        vae_tiling=config.vae_tiling,
        offload=config.offload,
    )
    return load.load(session.opened, running, prompts=texts(session.opened.engine, shots))


def rehearse(session: Session, loaded: Loaded, plan: Plan) -> Plan:
    """The plan without the pictures whose scheduler cannot take so many steps; they become faults.

    Raises SdlabError where that is all of them.
    """
    from sdlab.inference.engines import schedulers

    if session.opened.engine.no_scheduler:
        return plan  # its one scheduler takes any number
    asked = {item.shot.index: _stepping(session, item.config) for item in plan.items}
    refused: dict[tuple[str, int], str] = {}
    for name, steps in dict.fromkeys(one for passes in asked.values() for one in passes):
        made = schedulers.fresh(name, loaded.sampler.pipeline.scheduler)
        try:
            schedulers.set_steps(made, steps, name=name)
        except SdlabError as reason:
            refused[name, steps] = str(reason)
    why = {index: refused[one] for index, passes in asked.items() for one in passes if one in refused}
    good = tuple(item for item in plan.items if item.shot.index not in why)
    faults = tuple(
        Fault(item.shot.index, why[item.shot.index], item.where, item.shot.typed, item.shot.seed)
        for item in plan.items
        if item.shot.index in why
    )
    if not good:
        raise gathered(_said(faults), where="")
    return replace(plan, items=good, faults=(*plan.faults, *faults))


def _stepping(session: Session, config: GenerateConfig) -> list[tuple[str, int]]:
    """Scheduler and number of steps of each pass."""
    from sdlab.inference.engines.schedulers import canonical

    name, steps = canonical(config.scheduler), config.steps or session.advice.steps
    return [(name, steps)] if config.hires == 1 else [(name, steps), (name, config.hires_steps or steps)]
