"""Processes killed with -9 in the worlds of trees.py; run as a program, since a light one is forked quickly.

python -m tests.curate.journal.kills undo copy /dev/shm/somewhere
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sdlab.curate.journal.run import act, locked, read, resume, undo
from sdlab.errors import SdlabError
from tests.curate.journal.trees import (
    SMALL,
    Seen,
    World,
    contents,
    killed_after,
    killed_at,
    many,
    random_world,
    seen,
    sha,
)


def undone(world: World) -> None:
    """Undo the last run; there is nothing to undo where no journal was begun."""
    try:
        with locked(world.folder, make=False):
            result = undo(world.folder, within=[world.real])
    except SdlabError as reason:
        assert "no journal" in str(reason)
        return
    assert not result.left and not result.noted and not result.stopped


def resumed(world: World) -> None:
    """What a command does that is started again."""
    with locked(world.folder):
        acted = resume(world.folder, within=[world.real])
        if acted is None and not read(world.folder):
            acted = act(world.folder, world.operations, settings={}, num_workers=0)
    assert acted is None or (not acted.faults and acted.num_done == len(world.operations))


def assert_all_there(before: Seen, world: World) -> None:
    """No content is gone; words that are rewritten are in the journal."""
    rewritten = {sha(operation.old) for operation in world.operations if operation.kind == "rewrite"}
    assert not set(contents(before) - contents(seen(world.top))) - rewritten


def at_each_step(top: Path, name: str, trial: Callable[[World, int], bool]) -> int:
    """Kills at the first step, the second, …, each in a new world, until `trial` says that it lived; how many steps.

    Nothing is lost, and undone the world is as it was.
    """
    for number in itertools.count(1):
        world = SMALL[name](top / str(number))
        before = seen(world.top)
        killed = trial(world, number)
        assert_all_there(before, world)
        undone(world)
        assert seen(world.top) == before, number
        if not killed:
            break
    return number


def kill_then_undo(top: Path, name: str) -> int:
    return at_each_step(top, name, lambda world, number: killed_at(number, world.act))


def kill_then_resume(top: Path, name: str) -> int:
    whole = SMALL[name](top / "whole")
    whole.act()
    expected = seen(whole.top, times=False, journal=False)

    def trial(world: World, number: int) -> bool:
        killed = killed_at(number, world.act)
        if number % 3 == 0:
            killed_at(1 + number % 17, lambda: resumed(world))
        resumed(world)
        assert seen(world.top, times=False, journal=False) == expected, number
        return killed

    return at_each_step(top, name, trial)


def kill_undo_then_undo(top: Path, name: str) -> int:
    def trial(world: World, number: int) -> bool:
        world.act()
        return killed_at(number, lambda: undone(world))

    return at_each_step(top, name, trial)


def kill_random(top: Path, count: str) -> int:
    """Trees of all sorts, killed up to four times in a run, a resumed run and an undo."""
    for seed in range(int(count)):
        rng = random.Random(seed)
        world = random_world(top / str(seed), seed)
        before = seen(world.top)
        killed_at(rng.randint(1, 120), world.act)
        assert_all_there(before, world)
        for _ in range(rng.randint(0, 3)):
            step = rng.choice((go_on, undone))
            killed_at(rng.randint(1, 60), lambda world=world, step=step: step(world))
            assert_all_there(before, world)
        undone(world)
        assert seen(world.top) == before, seed
    return int(count)


def kill_threads(top: Path, kind: str) -> int:
    """Killed by the clock with operations under way on several threads; the runs that were in their middle."""
    rng = random.Random(kind)
    num_halfway = 0
    for number in range(8):
        world = many(top / str(number), kind)
        before = seen(world.top)

        def work(advance: Callable[[float], object], world: World = world) -> None:
            with locked(world.folder):
                act(world.folder, world.operations, settings={}, advance=advance, num_workers=3)

        killed = killed_after(rng.uniform(0, 0.004), work)
        num_done = sum((world.folder / operation.path).exists() for operation in world.operations)
        num_halfway += killed and not read(world.folder)[-1].finished and num_done > 0
        assert_all_there(before, world)
        undone(world)
        assert seen(world.top) == before, number
    return num_halfway


def go_on(world: World) -> None:
    """Resume, where no undo was begun."""
    with locked(world.folder), contextlib.suppress(SdlabError):
        resume(world.folder, within=[world.real])


STEPS: dict[str, Callable[[Path, str], int]] = {
    "undo": kill_then_undo,
    "resume": kill_then_resume,
    "undo-undo": kill_undo_then_undo,
    "random": kill_random,
    "threads": kill_threads,
}


@contextlib.contextmanager
def links_refused(disk: str) -> Iterator[None]:
    """os.link fails as on the disk: one without hard links, or another one for the folder."""
    real = os.link
    if not disk:
        yield
        return

    def link(source: str, target: str, **kwargs: bool) -> None:
        crosses = ("/raw/" in source) != ("/raw/" in target)
        if disk == "no-links" or (disk == "other-disk" and crosses):
            raise OSError(errno.EPERM if disk == "no-links" else errno.EXDEV, "not here")
        real(source, target, **kwargs)

    os.link = link  # type: ignore[assignment]
    try:
        yield
    finally:
        os.link = real


def main(top: Path, step: str, names: list[str]) -> int:
    num_kills = 0
    for name in names:
        world, _, disk = name.partition("/")
        with links_refused(disk):
            try:
                num_kills += STEPS[step](top / name.replace("/", "-"), world)
            except AssertionError as reason:
                raise AssertionError(f"{step} {name}: {reason}") from reason
    return num_kills


if __name__ == "__main__":
    sys.stdout.write(str(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
