"""A job: batches in, files out, and a count of what failed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab import progress, show
from sdlab.errors import ItemsFailed, OutOfResources, SdlabError, Stopped
from sdlab.inference.jobs import output
from sdlab.inference.load import Loaded
from sdlab.inference.record import metadata
from sdlab.inference.record.recipe import recipe
from sdlab.inference.spec import Init, Reference, Shot, Spec

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.engines.sd import Made
    from sdlab.models.resolve import Model


@dataclass(frozen=True)
class Batch:
    """Pictures that are made together, and where they go."""

    shots: list[Shot]
    spec: Spec
    folder: Path
    names: Callable[[Shot], Iterator[str]]
    init: Init | None = None
    picture: Image.Image | None = None  # `init`, opened and in the spec's size
    references: tuple[Reference, ...] = ()
    looked_at: tuple[Image.Image, ...] = ()  # `references`, opened and in their sizes
    keep: frozenset[int] | None = None  # only the pictures at these places are written

    @property
    def subject(self) -> Path | None:
        """The picture that is changed, if one is."""
        if self.init is not None:
            return self.init.path
        return self.references[0].source.path if self.references else None


@dataclass
class Report:
    """What came of a job."""

    paths: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: str = ""

    def close(self) -> None:
        """Raises ItemsFailed, naming them, if anything failed."""
        if not self.failed:
            return
        shown = "; ".join(self.failed[:10]) + (
            f"; and {len(self.failed) - 10} more" if len(self.failed) > 10 else ""
        )
        good = f"{len(self.paths)} picture{'s' * (len(self.paths) != 1)} made"
        raise ItemsFailed(f"{good}, {len(self.failed)} failed: {shown}", next_step=self.stopped)


def make(loaded: Loaded, batches: Iterable[Batch], *, total: int, exact: bool, report: Report) -> None:
    """Make and write the pictures of every batch, print each path on stdout, and note failures in the report.

    Stops early when a whole batch fails before anything succeeded: the model, not the picture, is at fault.
    Raises Stopped at Ctrl-C; what is finished by then is written and complete.
    """
    try:
        with progress.pictures(total) as advance:
            _make(loaded, batches, total=total, exact=exact, report=report, advance=advance)
    except KeyboardInterrupt as reason:
        raise Stopped(signal.SIGINT, f"stopped, {len(report.paths)} of {total} pictures are made") from reason


def _make(
    loaded: Loaded,
    batches: Iterable[Batch],
    *,
    total: int,
    exact: bool,
    report: Report,
    advance: progress.Advance,
) -> None:
    begun = 0
    for batch in batches:
        count = len(batch.shots if batch.keep is None else batch.keep)

        def on_step(done: int, steps: int, before: int = begun, count: int = count) -> None:
            advance(min(total, before + count * done / steps))

        made = loaded.sampler.sample(
            batch.shots, batch.spec, init=batch.picture, references=batch.looked_at, on_step=on_step
        )
        for position, one in enumerate(made):
            if batch.keep is None or position in batch.keep:
                _finish(one, batch, position, loaded=loaded, exact=exact, report=report)
        begun += count
        advance(min(total, begun))
        if not report.paths and not any(one.image for one in made):
            report.stopped = "Stopped, as nothing of the first batch came out: try --dtype fp32"
            break


def _finish(made: Made, batch: Batch, position: int, *, loaded: Loaded, exact: bool, report: Report) -> None:
    shot = batch.shots[position]
    subject = f"{batch.subject} " if batch.subject else ""
    label = f"{subject}picture {shot.index} (seed {shot.seed})"
    if made.image is None:
        report.failed.append(f"{label}: {made.fault}")
        return
    if made.vae_float32:
        show.warn(f"{label}: the VAE overflowed in {loaded.dtype}, so it was decoded in float32")
    about = recipe(
        made,
        batch.shots,
        position,
        batch.spec,
        loaded=loaded,
        init=batch.init,
        references=batch.references,
        exact=exact,
    )
    data = metadata.png(made.image, metadata.texts(about))
    try:
        path = output.write_new(batch.folder, batch.names(shot), data)
    except OutOfResources:
        raise
    except SdlabError as reason:  # as a name too long for the file system: the others are still made
        report.failed.append(f"{label}: {reason}")
        return
    if path is None:
        show.note(f"{label}: left out, another program has made {next(batch.names(shot))} meanwhile")
        return
    report.paths.append(path)
    show.out(str(path))
    sys.stdout.flush()  # a pipe sees each picture when it is there
    if made.flagged:
        report.failed.append(f"{path}: the model's safety checker blacked it out")


def write_grid(report: Report, *, folder: Path, stamp: str) -> None:
    """A contact sheet of all pictures of the job, under its own name; nothing where there is no picture."""
    if not report.paths:
        return
    names = (f"sd_{stamp}_grid{number}.png" for number in ["", *(f"_{n}" for n in range(2, 10_000))])
    about = {"schema": metadata.SCHEMA, "kind": "grid", "pictures": [path.name for path in report.paths]}
    data = metadata.png(output.grid(report.paths), {metadata.CHUNK: metadata.to_json(about)})
    show.out(str(output.write_new(folder, names, data)))


def warn_of_lost_words(model: Model, prompts: Iterable[str]) -> None:
    """Say which words of long prompts the text encoder will not see."""
    from sdlab.models.opening import prompt_window

    window = prompt_window(model)
    for prompt in dict.fromkeys(prompts):
        _, lost = window.lost(prompt)
        if lost:
            show.warn(f"the prompt is longer than {window.window} tokens, so this is cut off: {lost}")
        if "Negative prompt:" in prompt:
            show.warn(
                "other programs will take what follows 'Negative prompt:' in a prompt for the negative one"
            )
