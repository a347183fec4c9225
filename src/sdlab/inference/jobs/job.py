"""A job: batches in, files out, and a count of what failed.

Batches are made in worker threads and written here, in their order, so that a picture is compressed and brought to
disk while the next ones are drawn. Few batches wait at any time, so a job of any length takes the same memory.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import progress, show
from sdlab.errors import OutOfResources, SdlabError, Stopped
from sdlab.inference.batch import Batch
from sdlab.inference.jobs import output
from sdlab.inference.jobs.journal import Journal
from sdlab.inference.jobs.missing import kept, key, missing
from sdlab.inference.jobs.report import Picture, Report
from sdlab.inference.record.schema import SCHEMA
from sdlab.signals import StopRequest, stop_on_signals

if TYPE_CHECKING:
    from sdlab.inference.engines.checks import Made
    from sdlab.inference.load import Loaded

NUM_TRIED = 3  # batches without one picture, at least, after which the model is taken to be at fault
ASK_S = 0.5  # a thread that waits for another sees a signal only now and then on Windows


def make(
    loaded: Loaded,
    batches: Iterable[Batch],
    *,
    total: int,
    exact: bool,
    report: Report,
    journal: Journal | None = None,
) -> None:
    """Make and write the pictures of every batch, print each new path on stdout, and note failures in the report.

    `total` is of all pictures of the job, for the bar; those in `report.already` count as done. What the journal
    knows is not made again; the other pictures of its batch are made with it, so that their bits stay the same.
    A batch that fails is reported and the next is made, but where the first three (and as many as there were pictures
    already) give no picture, or all, the model is at fault and `report.stopped` says so. Raises Stopped at Ctrl-C and
    SIGTERM, within a step; OutOfResources at a full disk or memory. What is finished by then is written and complete,
    and the journal is let go.
    """
    import torch

    num_threads, began = torch.get_num_threads(), time.monotonic()
    try:
        with _stop_request() as stop:
            _make(_Work(loaded, total, exact, report, journal, stop), batches)
            if stop:
                raise _stopped(stop.signum, report, total, journal)
    except BaseException as reason:  # passed on; only the lock must not stay
        if journal is not None:
            journal.let_go()
        if isinstance(reason, KeyboardInterrupt):
            raise _stopped(signal.SIGINT, report, total, journal) from reason
        raise
    finally:
        torch.set_num_threads(num_threads)  # a part of it is the whole process's
        report.seconds += time.monotonic() - began


def _stopped(signum: int, report: Report, total: int, journal: Journal | None) -> Stopped:
    made = f"stopped, {len(report.paths)} of {total} pictures are made"
    return Stopped(signum, made, next_step="The same command makes the rest" if journal is not None else "")


@contextmanager
def _stop_request() -> Iterator[StopRequest]:
    """Set at the first signal; never outside the main thread, where Python takes none."""
    if threading.current_thread() is threading.main_thread():
        with stop_on_signals() as stop:
            yield stop
    else:
        yield StopRequest()


class _Halted(Exception):
    """The batch was left in the middle, because the job ends."""


@dataclass
class _Work:
    """What is the same for all batches of a job, and how far it is."""

    loaded: Loaded
    total: int
    exact: bool
    report: Report
    journal: Journal | None
    stop: StopRequest
    advance: progress.Advance = lambda done: None
    is_over: bool = False
    gave_up: bool = False  # the model is taken to be at fault
    num_barren: int = 0  # batches that gave no picture, as long as this process has made none
    _settled: int = 0  # pictures that were made or have failed
    _parts: dict[int, float] = field(default_factory=dict)  # of pictures under way, by batch
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count_barren(self) -> None:
        """Note a batch that gave no picture, where there is none from this process, and give up after enough.

        Pictures of an earlier run speak for the model: what failed then comes first now, and must not end each run.
        """
        if not self.report.pictures:
            self.num_barren += 1
            if self.num_barren >= max(NUM_TRIED, len(self.report.already)):
                self.gave_up = self.is_over = True

    def sampled(self, batch: Batch, number: int) -> list[Made]:
        """The batch's pictures; called in a thread. Raises _Halted within a step when the job ends."""
        num = len(kept(batch))

        def on_step(done: int, steps: int) -> None:
            if self.stop or self.is_over:
                raise _Halted
            with self._lock:
                self._parts[number] = num * min(1.0, done / max(1, steps))
                self._show()

        from sdlab.inference.record.recipe import check_fits

        if self.stop or self.is_over:
            raise _Halted
        check_fits(batch, loaded=self.loaded, exact=self.exact)
        mask = None
        if batch.mask is not None and batch.mask_picture is not None:
            mask = (batch.mask_picture, batch.mask.blur_px)
        return self.loaded.sampler.sample(
            batch.shots,
            batch.spec,
            init=batch.picture,
            mask=mask,
            references=batch.looked_at,
            on_step=on_step,
        )

    def settle(self, number: int, num: int) -> None:
        """So many pictures of the batch are done with."""
        with self._lock:
            self._parts.pop(number, None)
            self._settled += num
            self._show()

    def _show(self) -> None:
        done = len(self.report.already) + self._settled + sum(self._parts.values())
        self.advance(min(float(self.total), done))


def _make(work: _Work, batches: Iterable[Batch]) -> None:
    todo = missing(batches, work.report, work.journal)
    first = next(todo, None)  # so that what is there already is counted before the bar begins
    if first is None:
        return
    already = min(work.total, len(work.report.already))
    with (
        progress.pictures(work.total, already=already) as work.advance,
        ThreadPoolExecutor(work.loaded.num_workers, initializer=_begin_thread(work.loaded)) as pool,
    ):
        try:
            _run(work, itertools.chain([first], todo), pool)
        finally:
            work.is_over = True  # an error ends the other batches within a step
            pool.shutdown(cancel_futures=True)
    if work.num_barren and not work.stop and (work.gave_up or not work.report.paths):
        cure = "The model's own numbers are at fault" if _is_float32(work) else "Try --dtype fp32"
        early = "Stopped, as nothing" if work.gave_up else "Nothing"
        work.report.stopped = f"{early} of the first pictures came out. {cure}"


def _is_float32(work: _Work) -> bool:
    return str(work.loaded.dtype) == "torch.float32"


def _begin_thread(loaded: Loaded) -> Callable[[], None]:
    import torch

    return lambda: torch.set_num_threads(loaded.num_threads)  # a thread of its own begins with all


def _run(work: _Work, batches: Iterator[Batch], pool: ThreadPoolExecutor) -> None:
    """Hand the batches to the threads and write what comes back, in order."""
    waiting: deque[tuple[int, Batch, Future[list[Made]]]] = deque()
    most = work.loaded.num_workers + 1  # one more than are at work, so that none waits for the next
    worn: Any = None
    for number, batch in enumerate(batches):
        while len(waiting) >= most or (waiting and batch.loras != worn):
            _take(work, *waiting.popleft())
        if work.stop or work.gave_up:
            break
        if batch.loras != worn and not _wears(work, batch, number):
            worn = None
            continue
        worn = batch.loras
        waiting.append((number, batch, pool.submit(work.sampled, batch, number)))
    while waiting:
        _take(work, *waiting.popleft())


def _wears(work: _Work, batch: Batch, number: int) -> bool:
    """Put the batch's LoRAs on the model; no thread is at work. If one does not fit, the batch has failed."""
    try:
        work.loaded.wear(batch.loras)
        return True
    except OutOfResources:
        raise
    except SdlabError as reason:
        _fail(work, batch, number, str(reason))
        return False


def _take(work: _Work, number: int, batch: Batch, coming: Future[list[Made]]) -> None:
    """Write what a thread has made, or note why it has not."""
    while not coming.done() and not (work.stop and coming.cancel()):
        wait([coming], timeout=ASK_S)
    if coming.cancelled():
        return
    try:
        made = coming.result()
    except _Halted:
        return
    except OutOfResources:
        raise
    except SdlabError as reason:
        _fail(work, batch, number, str(reason))
        return
    num_made = sum(_finish(work, batch, position, made[position]) for position in kept(batch))
    if not num_made:
        work.count_barren()
    work.settle(number, len(kept(batch)))


def _fail(work: _Work, batch: Batch, number: int, why: str) -> None:
    for position in kept(batch):
        _fail_one(work, batch, position, why)
    work.settle(number, len(kept(batch)))


def _fail_one(work: _Work, batch: Batch, position: int, why: str, file: Path | None = None) -> None:
    shot = batch.shots[position]
    work.report.fail(
        _where(batch, position),
        why,
        index=shot.index,
        prompt=shot.template or shot.typed,
        seed=shot.seed,
        file=str(file or ""),
    )


def _where(batch: Batch, position: int) -> str:
    line = batch.where[position] if batch.where else ""
    return " ".join(str(part) for part in (line, batch.subject) if part)


def _finish(work: _Work, batch: Batch, position: int, made: Made) -> bool:
    """Write one picture and note it; False where there is none."""
    if made.image is None:
        _fail_one(work, batch, position, made.fault)
        return False
    shot = batch.shots[position]
    if made.vae_float32:
        where = f"{_where(batch, position)} picture {shot.index} (seed {shot.seed})".lstrip()
        show.warn(f"{where}: the VAE overflowed in {work.loaded.dtype}, so it worked in float32")
    try:
        path = output.write_new(batch.folder, batch.names(shot), _encoded(work, batch, position, made))
    except OutOfResources:
        raise
    except SdlabError as reason:  # as a name too long for the file system: the others are still made
        _fail_one(work, batch, position, str(reason))
        return True
    if path is None:
        show.note(
            f"picture {shot.index}: left out, another program has made {next(batch.names(shot))} meanwhile"
        )
        return True
    if work.journal is not None:
        work.journal.note_made(shot.index, key(batch, shot), path)
    where = batch.where[position] if batch.where else ""
    work.report.pictures.append(Picture(path, shot.index, shot.seed, where))
    show.out(str(path))
    sys.stdout.flush()  # a pipe sees each picture when it is there
    if made.safety == "flagged":
        _fail_one(work, batch, position, "the model's safety checker blacked it out", path)
    return True


def _encoded(work: _Work, batch: Batch, position: int, made: Made) -> bytes:
    from sdlab.inference.record.container import encoded
    from sdlab.inference.record.recipe import recipe

    assert made.image is not None
    about = recipe(made, batch, position, loaded=work.loaded, exact=work.exact)
    return encoded(made.image, about, batch.format)


def write_grid(report: Report, *, folder: Path, stamp: str) -> None:
    """A contact sheet of all pictures of the job, under its own name; nothing where there is no picture."""
    paths = report.paths
    if not paths:
        return
    names = (f"sd_{stamp}_grid{number}.png" for number in ["", *(f"_{n}" for n in range(2, 10_000))])
    about = {"schema": SCHEMA, "kind": "grid", "pictures": [path.name for path in paths]}
    show.out(str(output.write_new(folder, names, output.grid_bytes(paths, about))))
