"""Small worlds of files for the tests of the journal, what stands in them, and processes that are killed in them."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sdlab.curate.journal.run import JOURNAL, Operation, act, locked

Seen = dict[str, tuple[str, str, int]]  # path: kind, content, time

CALLS = ("open", "write", "fsync", "link", "unlink", "replace", "rename", "mkdir", "rmdir", "utime", "chmod")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen(top: Path, *, times: bool = True, journal: bool = True) -> Seen:
    """Everything below `top`: names, contents, times of files; folders by name."""
    found: Seen = {}
    for holder, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = os.path.join(holder, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):
                with open(path, "rb") as file:
                    about = ("file", sha(file.read()), info.st_mtime_ns if times else 0)
            elif stat.S_ISLNK(info.st_mode):
                about = ("link", os.readlink(path), 0)
            else:
                about = ("folder", "", 0)
            if journal or name != JOURNAL:
                found[os.path.relpath(path, top)] = about
    return found


def contents(found: Seen) -> Counter[str]:
    return Counter(content for kind, content, _ in found.values() if kind == "file")


@dataclass
class World:
    """A heap in `raw`, and what is to be done in `folder`."""

    top: Path
    folder: Path
    operations: list[Operation] = field(default_factory=list)
    num_files: int = 0

    @property
    def real(self) -> str:
        """The folder that everything is in, for `within`."""
        return os.path.realpath(self.top)

    def file(self, path: str, data: bytes | None = None) -> Path:
        """A file that differs from the others, with a time of its own; the path is relative to the world."""
        self.num_files += 1
        target = self.top / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(f"{path}\n".encode("utf-8", "surrogateescape") * 3 if data is None else data)
        at = 1_600_000_000_123_456_789 + self.num_files * 1_000_000_007
        os.utime(target, ns=(at, at))
        return target

    def add(self, kind: str, path: str, source: Path | None = None, data: bytes = b"") -> None:
        """One more operation; the old bytes of a rewrite are read."""
        old = (self.folder / path).read_bytes() if kind == "rewrite" else b""
        content = sha(source.read_bytes()) if source else ""
        self.operations.append(Operation(kind, path, str(source or ""), content, data, old))

    def act(self, num_workers: int = 0) -> None:
        with locked(self.folder):
            act(self.folder, self.operations, settings={"depth": 2}, num_workers=num_workers)


def organised(kind: str) -> Callable[[Path], World]:
    def build(top: Path) -> World:
        world = World(top, top / "__raw")
        for number, name in enumerate(("red/a.png", "b ü.png", "deep/er/c.png")):
            picture = world.file(f"raw/{name}")
            world.add(kind, f"{'cat/white' if number else 'dog'}/{number}.png", picture)
        world.add("write", "dog/0.cap", data=b"a dog\n")
        return world

    return build


def captioned(top: Path) -> World:
    """Captions written beside pictures: a new one, one with words added, one replaced with its backup."""
    world = World(top, top / "raw")
    for name in ("a.png", "b.png", "sub/c.png"):
        world.file(f"raw/{name}")
    world.file("raw/b.cap", b"mine\n")
    world.add("write", "a.cap", data=b"a cat\n")
    world.add("rewrite", "b.cap", data=b"mine, a cat\n")
    old = world.file("raw/sub/c.cap", b"first words\n")
    world.add("write", "sub/c.cap.bak", data=old.read_bytes())
    world.add("rewrite", "sub/c.cap", data=b"better words\n")
    return world


def small(kind: str) -> Callable[[Path], World]:
    """Two operations, for tests that try every moment."""

    def build(top: Path) -> World:
        world = World(top, top / "__raw")
        world.add(kind, "dog/0.png", world.file("raw/red/ä.png"))
        world.add("write", "dog/0.cap", data=b"a dog\n")
        return world

    return build


def small_captioned(top: Path) -> World:
    world = World(top, top / "raw")
    old = world.file("raw/sub/c.cap", b"first words\n")
    world.add("write", "sub/c.cap.bak", data=old.read_bytes())
    world.add("rewrite", "sub/c.cap", data=b"better words\n")
    return world


WORLDS: dict[str, Callable[[Path], World]] = {
    "copy": organised("copy"),
    "link": organised("link"),
    "move": organised("move"),
    "captions": captioned,
}


SMALL: dict[str, Callable[[Path], World]] = {
    "copy": small("copy"),
    "link": small("link"),
    "move": small("move"),
    "captions": small_captioned,
}


def many(top: Path, kind: str) -> World:
    world = World(top, top / "__raw")
    for number in range(40):
        world.add(kind, f"cat/{number % 4}/{number}.png", world.file(f"raw/{number % 3}/{number}.png"))
        world.add("write", f"cat/{number % 4}/{number}.cap", data=b"a cat\n")
    return world


def random_world(top: Path, seed: int) -> World:
    """Odd and long names, collisions, links, empty files, things that stand in the way."""
    rng = random.Random(seed)
    world = World(top, top / rng.choice(("__raw", "out/of/ten", "raw")))
    names = [
        "a.png",
        "A.png",
        "ä.png",
        "a\u0308.png",
        "n" * 196 + ".png",
        "\udcff.png",
        "x y'\"\n.png",
        "-rf",
        "é.jpeg",
    ]
    folders = ["", "cat", "Cat", "cat/white", "_other", "k" * 200]
    sources: list[Path] = []
    for number in range(rng.randint(1, 7)):
        data = rng.choice((None, b"", b"the same"))
        sources.append(world.file(f"raw/{rng.choice(('', 's/', 't/u/'))}{number}{rng.choice(names)}", data))
    link = None
    if rng.random() < 0.4:
        link = top / "raw" / "link.png"
        link.symlink_to(rng.choice(sources))
    if rng.random() < 0.5:  # the folder is there before, and something in it
        world.file(os.path.relpath(world.folder / "cat" / "a.png", top))
        world.file(os.path.relpath(world.folder / "mine.cap", top), b"mine")
        world.add("rewrite", "mine.cap", data=b"mine, and yours")
    kind = rng.choice(("copy", "link", "move"))
    if link:  # where the others are moved, copied before that
        world.add("copy" if kind == "move" else kind, "of a link.png", link)
    for source in sources:
        path = "/".join(filter(None, (rng.choice(folders), rng.choice(names))))
        world.add(kind, path, source)
        if rng.random() < 0.5:
            world.add("write", f"{path}.cap", data=rng.choice((b"", b"words\n")))
    return world


def after_fork(work: Callable[[], object], wait: Callable[[], object] | None = None) -> int:
    """Run the work in a process of its own; the signal that ended it, 0 if none did. Other ends fail the test.

    With `wait`, it is killed once that returns.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking a process with threads; these only sleep
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a forked process must not go on with the parent's work
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if wait:
        wait()
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child ended with an error"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run the work in a process that kills itself at its system call `number`; False if it had ended before.

    A write is killed in its middle.
    """

    def doomed() -> None:
        left = number

        def counted(call: Callable[..., object], name: str) -> Callable[..., object]:
            def counting(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    if name == "write":
                        data = bytes(args[1])  # type: ignore[call-overload]
                        call(args[0], data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name), name))
        work()

    return after_fork(doomed) == signal.SIGKILL


def killed_after(seconds: float, work: Callable[[Callable[[float], object]], object]) -> bool:
    """Run the work in a process that is killed some time after its first advance; False if it had ended before."""
    hears, says = os.pipe()

    def wait() -> None:
        os.close(says)
        os.read(hears, 1)
        time.sleep(seconds)

    def reporting() -> None:
        os.close(hears)
        work(lambda done: os.write(says, b".") if done == 1 else None)

    try:
        return after_fork(reporting, wait) == signal.SIGKILL
    finally:
        os.close(hears)


@contextmanager
def failing_at(
    number: int, errno_: int, names: tuple[str, ...] = ("write", "fsync", "open", "link")
) -> Iterator[None]:
    """The system call `number` of these names, and all that follow, fail."""
    left = number
    real = {name: getattr(os, name) for name in names}

    def counted(name: str) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            nonlocal left
            writes = name != "open" or (isinstance(args[1], int) and args[1] & os.O_CREAT)
            left -= bool(writes)
            if left <= 0 and writes:
                raise OSError(errno_, os.strerror(errno_))
            return real[name](*args, **kwargs)

        return counting

    try:
        for name in names:
            setattr(os, name, counted(name))
        yield
    finally:
        for name in names:
            setattr(os, name, real[name])
