"""The journal: what act makes, what undo takes back and what it leaves, strangers' journals, full disks, locks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlab.curate.journal import deeds, lines, lock, run
from sdlab.curate.journal.lock import _part
from sdlab.curate.journal.run import JOURNAL, Operation, act, locked, on_one_disk, read, resume, undo
from sdlab.curate.journal.seal import NO_SEAL, Seal
from sdlab.dataset.disk import name_new
from sdlab.errors import OutOfResources, SdlabError
from tests.curate.journal.trees import (
    WORLDS,
    World,
    contents,
    failing_at,
    many,
    organised,
    random_world,
    seen,
    sha,
)


def undone(world: World):
    with locked(world.folder, make=False):
        return undo(world.folder, within=[world.real])


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, if there is one: quick to sync."""
    there = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=there if os.access(there, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def reasons(refused) -> dict[str, str]:
    return {one.id: one.reason for one in refused}


@pytest.mark.parametrize("num_workers", [0, 4])
@pytest.mark.parametrize("name", WORLDS)
def test_undo_brings_back_names_bytes_and_times(name, num_workers, tmp_path):
    world = WORLDS[name](tmp_path)
    before = seen(tmp_path)
    world.act(num_workers)
    assert seen(tmp_path) != before
    assert undone(world).num_undone == len(world.operations)
    assert seen(tmp_path) == before


def test_copies_have_the_bytes_and_times_of_their_sources(tmp_path):
    world = organised("copy")(tmp_path)
    world.act(4)
    for operation in world.operations[:-1]:
        made, source = world.folder / operation.path, Path(operation.source)
        assert made.read_bytes() == source.read_bytes()
        assert made.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert not [name for name in seen(tmp_path) if name.endswith(".part")]


def test_links_share_their_bytes_with_the_source(tmp_path):
    world = organised("link")(tmp_path)
    world.act()
    first = world.operations[0]
    assert os.path.samefile(first.source, world.folder / first.path)


def test_several_runs_are_taken_back_one_by_one(tmp_path):
    world = organised("copy")(tmp_path)
    late = world.file("raw/late.png")
    before = seen(tmp_path)
    world.act()
    middle = seen(tmp_path)
    world.operations = []
    world.add("copy", "cat/late.png", late)
    world.act()
    assert [len(run.operations) for run in read(world.folder)] == [4, 1]
    undone(world)
    assert seen(tmp_path, journal=False) == {p: a for p, a in middle.items() if not p.endswith(JOURNAL)}
    undone(world)
    assert seen(tmp_path) == before


def test_the_plan_is_on_disk_before_a_file_is_touched(tmp_path):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    looks = []

    def stop() -> bool:
        looks.append((seen(tmp_path / "raw"), [len(run.operations) for run in read(world.folder)]))
        return True

    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={}, stop=stop, num_workers=2)
    assert acted.stopped and acted.num_done == 0
    assert looks[0][1] == [4]
    assert contents(looks[0][0]) == contents(before)
    assert not read(world.folder)[-1].finished


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    world = organised("move")(tmp_path)
    heard = []
    answers = iter([False, False, True])
    with locked(world.folder):
        acted = act(
            world.folder, world.operations, settings={}, stop=lambda: next(answers), advance=heard.append
        )
        assert acted.stopped and acted.num_done == 2 and heard == [1, 2]
        again = resume(world.folder, within=[world.real])
        assert again and again.num_done == 4 and not again.stopped and not again.faults
        assert resume(world.folder, within=[world.real]) is None


def test_a_stopped_undo_goes_on_and_nothing_else_may(tmp_path):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    world.act()
    answers = iter([False, True])
    with locked(world.folder):
        assert undo(world.folder, within=[world.real], stop=lambda: next(answers)).stopped
        assert read(world.folder)[-1].undoing
        with pytest.raises(SdlabError, match="--undo"):
            resume(world.folder, within=[world.real])
        with pytest.raises(SdlabError, match="--undo"):
            act(world.folder, world.operations, settings={})
    undone(world)
    assert seen(tmp_path) == before


def test_nothing_is_overwritten(tmp_path):
    world = organised("copy")(tmp_path)
    mine = world.file("__raw/dog/0.png", b"mine")
    world.operations.append(world.operations[1]._replace(source=world.operations[0].source))
    before = seen(tmp_path)
    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={})
    assert list(reasons(acted.faults)) == ["dog/0.png", "cat/white/1.png"]
    assert mine.read_bytes() == b"mine"
    assert [op.path for op in read(world.folder)[0].operations] == [
        "cat/white/1.png",
        "cat/white/2.png",
        "dog/0.cap",
    ]
    assert undone(world).left == ()
    assert seen(tmp_path) == before


def test_what_comes_in_between_is_not_overwritten_either(tmp_path):
    world = organised("copy")(tmp_path)
    first = world.folder / world.operations[0].path

    def stop() -> bool:
        if not first.exists():
            first.write_bytes(b"mine")
        return False

    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={}, stop=stop, num_workers=4)
    assert reasons(acted.faults) == {world.operations[0].path: "something else stands there"}
    assert acted.num_done == 3 and first.read_bytes() == b"mine"
    assert undone(world).left == ()
    assert first.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["copy", "move"])
def test_a_source_that_changed_since_is_not_taken(kind, tmp_path):
    world = organised(kind)(tmp_path)
    source = Path(world.operations[0].source)
    if kind == "copy":
        source.write_bytes(b"new")

    def stop() -> bool:
        source.write_bytes(b"new")
        return False

    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={}, stop=stop)
    assert reasons(acted.faults) == {world.operations[0].path: "changed since it was looked at"}
    assert source.read_bytes() == b"new"
    assert len(read(world.folder)[0].operations) == 3


def test_links_and_folders_are_no_files_to_move(tmp_path):
    world = World(tmp_path, tmp_path / "__raw")
    link = tmp_path / "link.png"
    link.symlink_to(world.file("raw/a.png"))
    world.add("move", "a.png", link)
    world.operations.append(Operation("copy", "b.png", str(tmp_path / "raw"), sha(b"")))
    world.operations.append(Operation("copy", "c.png", str(tmp_path / "gone.png"), sha(b"")))
    before = seen(tmp_path)
    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={})
    assert len(acted.faults) == 3 and acted.num_done == 0
    assert seen(tmp_path) == before


@pytest.mark.parametrize("kind", ["copy", "link", "move"])
def test_undo_leaves_what_the_user_has_changed(kind, tmp_path):
    world = organised(kind)(tmp_path)
    before = seen(tmp_path)
    world.act()
    edited, words = world.folder / "dog/0.png", world.folder / "dog/0.cap"
    words.write_bytes(b"my words")
    edited.unlink()
    edited.write_bytes(b"my picture")
    done = undone(world)
    assert words.read_bytes() == b"my words"
    if kind == "move":  # its old place is empty: back it goes
        assert reasons(done.left) == {"dog/0.cap": "changed since"}
        assert "changed" in reasons(done.noted)["dog/0.png"]
        assert (tmp_path / "raw/red/a.png").read_bytes() == b"my picture"
    else:
        assert reasons(done.left) == {"dog/0.cap": "changed since", "dog/0.png": "changed since"}
        assert edited.read_bytes() == b"my picture"
        assert not set(before) - set(seen(tmp_path))
    assert read(world.folder) == ()


@pytest.mark.parametrize(
    "how",
    ["deleted", "edited", "edited at the same size and time", "a link to the copy", "to one of two names"],
)
def test_undo_keeps_a_copy_that_is_the_only_one_left(how, tmp_path):
    world = organised("copy")(tmp_path)
    world.act()
    source, copy = Path(world.operations[0].source), world.folder / world.operations[0].path
    data, info = source.read_bytes(), source.stat()
    source.unlink()
    if how == "edited":
        source.write_bytes(b"other")
    elif how == "edited at the same size and time":
        source.write_bytes(data[:-1] + b"!")
        os.utime(source, ns=(info.st_atime_ns, info.st_mtime_ns))
    elif how != "deleted":
        source.symlink_to(copy)
    if how == "to one of two names":
        os.link(copy, tmp_path / "backup.png")
    done = undone(world)
    assert "the only one left" in reasons(done.left)[world.operations[0].path]
    assert copy.read_bytes() == data


def test_undo_of_moves_waits_for_an_occupied_place(tmp_path):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    world.act()
    place = Path(world.operations[0].source)
    place.write_bytes(b"new")
    done = undone(world)
    assert list(reasons(done.left)) == ["dog/0.png"] and "holds something else" in done.left[0].reason
    assert place.read_bytes() == b"new"
    run = read(world.folder)[-1]
    assert run.undone and run.finished and [operation.path for operation in run.operations] == ["dog/0.png"]
    place.unlink()
    assert undone(world).left == ()
    assert seen(tmp_path) == before


def test_undo_makes_a_folder_again_that_has_gone(tmp_path):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    world.act()
    shutil.rmtree(tmp_path / "raw")
    undone(world)
    assert seen(tmp_path) == before


def test_undo_leaves_folders_with_something_in_them(tmp_path):
    world = organised("copy")(tmp_path)
    world.act()
    (world.folder / "cat/mine.txt").write_bytes(b"mine")
    assert undone(world).left == ()
    assert set(seen(world.folder)) == {"cat", "cat/mine.txt"}


def test_undo_keeps_the_words_before_where_the_new_ones_were_changed(tmp_path):
    world = WORLDS["captions"](tmp_path)
    before = seen(tmp_path)
    world.act()
    caption = world.folder / "b.cap"
    caption.write_bytes(b"my own")
    assert "journal keeps" in reasons(undone(world).left)["b.cap"]
    assert caption.read_bytes() == b"my own"
    caption.unlink()
    assert undone(world).left == ()
    assert seen(tmp_path) == before


def test_a_renamed_folder_can_be_undone(tmp_path):
    world = WORLDS["captions"](tmp_path / "x")
    before = seen(world.folder)
    world.act()
    world.folder.rename(tmp_path / "renamed")
    world.folder = tmp_path / "renamed"
    assert undone(world).left == ()
    assert seen(world.folder) == before


def test_a_folder_made_with_those_above_it_goes_with_them(tmp_path):
    world = World(tmp_path, tmp_path / "a/b/__c")
    world.add("copy", "x.png", world.file("raw/x.png"))
    before = seen(tmp_path)
    world.act()
    undone(world)
    assert seen(tmp_path) == before
    with locked(world.folder):
        pass
    assert seen(tmp_path) == before


def test_only_a_journal_can_be_undone(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(SdlabError, match="no journal"), locked(folder, make=False):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_every_random_tree_comes_back(memory):
    num_faults = 0
    for seed in range(1000, 1100):
        world = random_world(memory / str(seed), seed)
        before = seen(world.top)
        with locked(world.folder):
            acted = act(world.folder, world.operations, settings={}, num_workers=seed % 3)
        num_faults += len(acted.faults)
        assert acted.num_done + len(acted.faults) == len(world.operations)
        after = seen(world.top)
        assert set(contents(before)) - {sha(b"mine")} <= set(contents(after))
        done = undone(world) if acted.num_done else None
        assert done is None or not (done.left or done.noted), seed
        assert seen(world.top) == before, seed
    assert num_faults > 10  # collisions there were


HEAD_STRANGE = [
    {"token": "../../x"},
    {"token": "0" * 15 + "/"},
    {"token": "0" * 17},
    {"made": ["../out"]},
    {"settings": 7},
]

STRANGE = [
    {"path": "../out.png"},
    {"path": "/etc/out.png"},
    {"path": "a/../../out.png"},
    {"path": "a//out.png"},
    {"path": ""},
    {"path": JOURNAL},
    {"path": "nul\0.png"},
    {"path": 7},
    {"source": "relative.png"},
    {"within": "../../x.png"},
    {"kind": "delete"},
    {"size": "many"},
    {"mtime": 1e999},
    {"data": "!"},
    {"is": "surprise"},
]


@pytest.mark.parametrize(
    ("record", "change"),
    [*((1, change) for change in HEAD_STRANGE), *((2, change) for change in STRANGE)],
    ids=str,
)
def test_a_stranger_s_journal_touches_nothing(record, change, tmp_path):
    world = organised("move")(tmp_path)
    world.act()
    rewritten(world.folder, lambda records: records[record].update(change))
    before = seen(tmp_path)
    with pytest.raises(SdlabError, match="line"), locked(world.folder, make=False):
        undo(world.folder, within=[world.real])
    with pytest.raises(SdlabError, match="line"):
        read(world.folder)
    assert seen(tmp_path) == before


def rewritten(folder: Path, change) -> None:
    """The folder's journal with records changed and its digest made right again."""
    records = [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
    change(records)
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    planned = next(n for n, record in enumerate(records) if record["is"] == "planned")
    lines[planned] = json.dumps({"is": "planned", "sha256": sha(b"".join(lines[1:planned]))}).encode() + b"\n"
    (folder / JOURNAL).write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "junk", [b"no json\n", b"[]\n", b"{}\n", b"\0\0\n", b"\xff\n", b"[" * 100_000 + b"\n"], ids=len
)
def test_a_damaged_journal_is_refused(junk, tmp_path):
    world = organised("move")(tmp_path)
    world.act()
    path = world.folder / JOURNAL
    good = path.read_bytes()
    for bad in (junk + good, good + junk, good.replace(b"dog", b"cow", 1)):
        path.write_bytes(bad)
        before = seen(tmp_path)
        with pytest.raises(SdlabError, match="line"), locked(world.folder, make=False):
            undo(world.folder, within=[world.real])
        assert seen(tmp_path) == before
    path.write_bytes(good)
    assert undone(world).left == ()


def test_a_torn_end_of_the_journal_is_cut_off(tmp_path):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    world.act()
    path = world.folder / JOURNAL
    second = {"is": "run", "token": "0" * 16, "settings": {}, "made": []}
    path.write_bytes(path.read_bytes() + json.dumps(second).encode() + b'\n{"is": "oper')
    assert len(read(world.folder)) == 1
    undone(world)
    assert seen(tmp_path) == before


def test_a_link_in_the_folder_leads_nobody_out(tmp_path):
    world = organised("copy")(tmp_path)
    world.act()
    outside = world.file("outside/0.cap", b"a dog\n")
    shutil.rmtree(world.folder / "dog")
    (world.folder / "dog").symlink_to(outside.parent)
    assert reasons(undone(world).left)["dog/0.cap"] == "a link leads out of the folder"
    assert outside.exists()

    other = World(tmp_path, tmp_path / "raw")
    (tmp_path / "raw/out").symlink_to(outside.parent)
    other.add("write", "out/new.cap", data=b"words\n")
    with locked(other.folder):
        acted = act(other.folder, other.operations, settings={})
    assert reasons(acted.faults) == {"out/new.cap": "a link leads out of the folder"}
    assert sorted(p.name for p in outside.parent.iterdir()) == ["0.cap"]


def test_a_journal_that_is_a_link_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / JOURNAL).symlink_to(elsewhere)
    for make in (True, False):
        with pytest.raises(SdlabError), locked(tmp_path / "dir", make=make):
            raise AssertionError
    with pytest.raises(SdlabError):
        read(tmp_path / "dir")
    assert elsewhere.read_bytes() == b"precious"


def test_settings_and_odd_names_survive_the_journal(tmp_path):
    world = World(tmp_path, tmp_path / "__raw")
    world.add("copy", "\udcff\n'ä.png", world.file("raw/\udcfe.png"))
    world.act()
    (run,) = read(world.folder)
    assert run.operations == tuple(world.operations)
    assert run.settings == {"depth": 2} and run.finished and not run.undone and not run.undoing


@pytest.mark.parametrize("name", WORLDS)
def test_a_full_disk_loses_nothing(name, memory):
    for number in itertools.count(1):
        world = WORLDS[name](memory / str(number))
        before = seen(world.top)
        try:
            with failing_at(number, errno.ENOSPC):
                world.act()
            break
        except (OutOfResources, SdlabError) as reason:
            assert "o space left" in str(reason)
        assert set(contents(before)) - {sha(b"mine\n")} <= set(contents(seen(world.top)))
        assert not [path for path in seen(world.top) if path.endswith(".part")], number
        if number % 2:
            with locked(world.folder):
                resume(world.folder, within=[world.real])
        if world.folder.exists() and (world.folder / JOURNAL).exists():
            assert undone(world).left == ()
        assert seen(world.top) == before, number
    assert number > 8


def test_a_disk_that_is_really_full_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        world = World(tmp_path, disk / "__raw")
        for number in range(40):
            world.add("copy", f"cat/{number}.png", world.file(f"raw/{number}.png", os.urandom(10_000)))
        before = seen(tmp_path)
        with pytest.raises(OutOfResources, match="MB free"):
            world.act()
        assert seen(tmp_path) == before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
            with pytest.raises(OutOfResources, match="o space left"):
                world.act(4)
        assert len(list((world.folder / "cat").iterdir())) > 10
        with locked(world.folder), pytest.raises(OutOfResources):
            resume(world.folder, within=[world.real])
        assert undone(world).left == ()
        assert seen(tmp_path) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_move_to_another_disk_is_verified_and_comes_back(tmp_path):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or on_one_disk(str(tmp_path), memory):
        pytest.skip("needs a second disk")
    other = memory / f"sdlab-test-{os.getpid()}"
    world = World(tmp_path, other / "__raw")
    source = world.file("raw/a.png")
    source.chmod(0o640)
    world.add("move", "cat/a.png", source)
    world.add("link", "b.png", world.file("raw/b.png"))
    before = seen(tmp_path)
    try:
        with locked(world.folder):
            acted = act(world.folder, world.operations, settings={})
        assert "--mode copy" in reasons(acted.faults)["b.png"]
        assert not source.exists() and (world.folder / "cat/a.png").stat().st_mode & 0o777 == 0o640
        assert undone(world).left == ()
        assert seen(tmp_path) == before and source.stat().st_mode & 0o777 == 0o640
        assert not other.exists()
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_a_second_process_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sdlab.curate.journal.run import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "__raw"
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        for make in (True, False):
            with pytest.raises(SdlabError, match="another sdlab"), locked(folder, make=make):
                raise AssertionError
    finally:
        other.kill()
        other.communicate()
    with locked(folder):
        pass
    assert not folder.exists()


def test_a_plan_of_thousands_is_done_and_undone(memory):
    world = World(memory, memory / "__raw")
    source = world.file("raw/a.png")
    same = Operation("link", "", str(source), sha(source.read_bytes()))
    world.operations = [same._replace(path=f"{n % 50}/{n}.png") for n in range(2000)]
    world.act()
    assert len(list(world.folder.rglob("*.png"))) == 2000
    undone(world)
    assert not world.folder.exists()


def test_many_small_operations_report_each_advance(tmp_path):
    world = many(tmp_path, "copy")
    heard: list[float] = []
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, advance=heard.append)
        assert heard == list(range(1, len(world.operations) + 1))
        heard.clear()
        undo(world.folder, within=[world.real], advance=heard.append)
    assert heard == list(range(1, len(world.operations) + 1))


def crossing(monkeypatch, *, no_unlink: str = "") -> None:
    """Between raw and __raw is the edge of two disks; names that hold `no_unlink` cannot be removed."""
    link, unlink = os.link, os.unlink

    def linking(source, target, **how):
        if ("/raw/" in str(source)) != ("/raw/" in str(target)):
            raise OSError(errno.EXDEV, "not here")
        link(source, target, **how)

    def unlinking(path, **how):
        if no_unlink and no_unlink in str(path) and not str(path).endswith(".part"):
            raise OSError(errno.EROFS, "read-only", path)
        unlink(path, **how)

    monkeypatch.setattr(os, "link", linking)
    monkeypatch.setattr(os, "unlink", unlinking)


def test_a_move_out_of_a_folder_that_cannot_be_written_leaves_no_copy(tmp_path, monkeypatch):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    with monkeypatch.context() as patch, locked(world.folder):
        crossing(patch, no_unlink="/raw/")
        acted = act(world.folder, world.operations, settings={})
    assert acted.num_done == 1 and len(acted.faults) == 3
    assert [op.path for op in read(world.folder)[-1].operations] == ["dog/0.cap"]
    assert not list(world.folder.rglob("*.png"))
    assert undone(world).num_undone == 1
    assert seen(tmp_path) == before


def test_what_was_made_by_a_move_that_failed_can_be_undone(tmp_path, monkeypatch):
    world = organised("move")(tmp_path)
    before = seen(tmp_path)
    with monkeypatch.context() as patch, locked(world.folder):
        crossing(patch, no_unlink=".png")
        acted = act(world.folder, world.operations, settings={})
    assert len(acted.faults) == 3 and len(list(world.folder.rglob("*.png"))) == 3
    assert len(read(world.folder)[-1].operations) == 4
    assert undone(world).left == ()
    assert seen(tmp_path) == before


@pytest.mark.parametrize("fails", ["reading back", "a change meanwhile"])
def test_a_move_to_another_disk_that_goes_wrong_leaves_the_source(fails, tmp_path, monkeypatch):
    world = organised("move")(tmp_path)
    real = deeds.copy

    def copying(source, part):
        digest = real(source, part)
        if fails == "reading back":
            Path(part).write_bytes(b"rotten")
        else:
            Path(source).write_bytes(b"new words in it")
        return digest

    with monkeypatch.context() as patch, locked(world.folder):
        crossing(patch)
        patch.setattr(deeds, "copy", copying)
        acted = act(world.folder, world.operations[:1], settings={})
    assert ("read back" if fails == "reading back" else "while it was moved") in acted.faults[0].reason
    assert Path(world.operations[0].source).exists()
    assert not [path for path in seen(world.folder) if path.endswith((".png", ".part"))]


def test_undo_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    world = organised("move")(tmp_path)
    real = deeds.sha256_of

    def unreadable(path):
        if path.endswith(".part"):
            raise OSError(errno.EIO, "bad disk")
        return real(path)

    with monkeypatch.context() as patch:
        crossing(patch)
        world.act()
        patch.setattr(deeds, "sha256_of", unreadable)
        assert len(undone(world).left) == 3
    assert not [path for path in seen(tmp_path) if path.endswith(".part")]
    assert undone(world).left == ()


@pytest.mark.parametrize("killed", [False, True])
def test_a_caption_that_was_edited_meanwhile_is_not_rewritten(killed, tmp_path):
    world = WORLDS["captions"](tmp_path)
    caption = world.folder / "b.cap"

    def stop() -> bool:
        caption.write_bytes(b"edited")
        return killed

    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={}, stop=stop, num_workers=4)
        if killed:
            assert acted.stopped
            acted = resume(world.folder, within=[world.real])
    assert reasons(acted.faults) == {"b.cap": "changed since it was looked at"}
    assert caption.read_bytes() == b"edited"
    assert undone(world).left == ()
    assert caption.read_bytes() == b"edited"


def test_a_rewritten_caption_keeps_its_permissions(tmp_path):
    world = WORLDS["captions"](tmp_path)
    caption = world.folder / "b.cap"
    caption.chmod(0o604)
    world.act()
    assert caption.read_bytes() == b"mine, a cat\n" and caption.stat().st_mode & 0o777 == 0o604
    undone(world)
    assert caption.read_bytes() == b"mine\n" and caption.stat().st_mode & 0o777 == 0o604


@pytest.mark.parametrize("stopped", [False, True])
def test_an_emptied_file_is_the_user_s(stopped, tmp_path):
    world = organised("copy")(tmp_path)
    answers = itertools.chain([False] * 3, itertools.repeat(stopped))
    with locked(world.folder):
        acted = act(world.folder, world.operations, settings={}, stop=lambda: next(answers), num_workers=0)
    assert acted.stopped == stopped
    for path in ("dog/0.png", "dog/0.cap"):
        (world.folder / path).write_bytes(b"")
    left = {path for path, _ in undone(world).left}
    assert left == {"dog/0.png", "dog/0.cap"}
    assert (world.folder / "dog/0.png").exists() and (world.folder / "dog/0.cap").exists()


def test_an_empty_file_at_the_old_place_is_in_the_way(tmp_path):
    world = organised("move")(tmp_path)
    world.act()
    place = Path(world.operations[0].source)
    place.touch()
    assert "holds something else" in reasons(undone(world).left)["dog/0.png"]
    assert place.read_bytes() == b""


def test_a_name_given_in_vain_is_taken_back(tmp_path, monkeypatch):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"words")

    def refuse(*_, **__):
        raise OSError(errno.EACCES, "no")

    real = os.unlink
    for broken in (("unlink",), ("link", "replace")):
        with monkeypatch.context() as patch:
            for name in broken:
                patch.setattr(os, name, refuse)
            if "unlink" in broken:
                patch.setattr(os, "unlink", lambda path: refuse() if path == str(source) else real(path))
            with pytest.raises(OSError, match="no"):
                name_new(str(source), str(target), marker=str(tmp_path / "marker"))
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_undo_counts_what_it_took_back(tmp_path):
    world = organised("copy")(tmp_path)
    answers = iter([False, False, True])
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, stop=lambda: next(answers), num_workers=0)
    assert undone(world).num_undone == 2


def test_a_file_that_comes_while_the_folder_goes_stays_in_its_place(tmp_path, monkeypatch):
    folder, real = tmp_path / "out/__raw", os.rename

    def rename(source, target):
        monkeypatch.setattr(os, "rename", real)
        (Path(source) / "__raw/mine.txt").write_bytes(b"mine")
        real(source, target)

    with locked(folder):
        monkeypatch.setattr(os, "rename", rename)
    assert set(seen(tmp_path)) == {"out", "out/__raw", "out/__raw/mine.txt"}
    with locked(folder):
        pass
    assert set(seen(tmp_path)) == {"out", "out/__raw", "out/__raw/mine.txt"}


def test_what_a_kill_hid_with_a_file_in_it_comes_back(tmp_path, monkeypatch):
    folder = tmp_path / "out/__raw"
    hidden = _part(tmp_path / "out")
    (hidden / "__raw").mkdir(parents=True)
    (hidden / "__raw/mine.txt").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda source, target: os.stat(tmp_path / "gone"))
        with pytest.raises(SdlabError, match="cannot be removed"), locked(folder):
            raise AssertionError
    with locked(folder):
        assert (folder / "mine.txt").read_bytes() == b"mine"
    assert set(seen(tmp_path)) == {"out", "out/__raw", "out/__raw/mine.txt"}


def test_a_journal_that_the_process_before_removed_is_made_again(tmp_path, monkeypatch):
    path, real = tmp_path / JOURNAL, lock.hold

    def late(handle: int) -> bool:
        monkeypatch.setattr(lock, "hold", real)
        path.unlink()
        return real(handle)

    monkeypatch.setattr(lock, "hold", late)
    with locked(tmp_path):
        assert path.exists()


def test_a_new_journal_is_on_disk_before_a_file_is_touched(tmp_path, monkeypatch):
    world = organised("copy")(tmp_path / "x")
    world.folder = tmp_path / "x/out/__raw"
    synced: list[str] = []
    real = deeds.sync_folder
    for module in (lines, lock):
        monkeypatch.setattr(module, "sync_folder", lambda path: (synced.append(path), real(path)))
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, stop=lambda: True)
    above = [str(tmp_path / name) for name in ("x/out/__raw", "x/out", "x")]
    assert synced == [*above, above[0]]


def test_a_journal_is_read_once_by_each_step(tmp_path, monkeypatch):
    world = organised("move")(tmp_path)
    reads: list[Path] = []
    for module in (run, lock):
        monkeypatch.setattr(module, "load", lambda folder: (reads.append(folder), lines.load(folder))[1])
    with locked(world.folder):
        act(world.folder, world.operations, settings={})
    assert len(reads) == 1
    undone(world)
    assert len(reads) == 3  # the last tells that the journal is empty


def test_only_the_user_s_own_journal_reaches_beyond(tmp_path):
    seal = Seal(tmp_path / "state/sdlab/journal.key")
    world = organised("move")(tmp_path / "x")
    before = seen(world.top)
    answers = iter([False, True])
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, seal=seal, stop=lambda: next(answers))
        middle = seen(world.top)
        for other in (NO_SEAL, Seal(tmp_path / "no such"), Seal(tmp_path / "other/journal.key")):
            other.of("some other plan") if "other" in str(other.path) else None
            for step in (resume, undo):
                for within in ((), [world.real + "/ra"], [os.path.realpath(world.folder)]):
                    with pytest.raises(SdlabError, match="not written by you"):
                        step(world.folder, seal=other, within=within)
        assert seen(world.top) == middle
        acted = resume(world.folder, seal=seal)
        assert acted and acted.num_done == 4
        assert undo(world.folder, seal=seal).left == ()
    assert seen(world.top) == before


def test_a_sealed_plan_with_another_line_is_not_the_user_s(tmp_path):
    seal = Seal(tmp_path / "journal.key")
    world = organised("move")(tmp_path / "x")
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, seal=seal)
    digest = json.loads((world.folder / JOURNAL).read_bytes().splitlines()[-2])["seal"]
    rewritten(world.folder, lambda records: records[2].update(source=str(tmp_path / "evil")))
    (world.folder / JOURNAL).write_bytes(
        (world.folder / JOURNAL)
        .read_bytes()
        .replace(b'"is": "planned"', b'"is": "planned", "seal": "%s"' % digest.encode())
    )
    before = seen(tmp_path)
    with pytest.raises(SdlabError, match="not written by you"), locked(world.folder):
        undo(world.folder, seal=seal)
    assert seen(tmp_path) == before


def test_a_link_on_the_way_leads_nobody_beyond(tmp_path):
    world = World(tmp_path, tmp_path / "__raw")
    world.add("move", "a.png", world.file("raw/a.png"))
    world.act()
    outside = tmp_path / "home"
    outside.mkdir()
    (tmp_path / "raw/link").symlink_to(outside)
    for way_out in ("raw/link/a.png", "raw/../home/a.png"):
        rewritten(world.folder, lambda records, way=way_out: records[2].update(source=str(tmp_path / way)))
        with pytest.raises(SdlabError, match="not written by you"), locked(world.folder):
            undo(world.folder, within=[os.path.realpath(tmp_path / "raw")])
    assert list(outside.iterdir()) == []


def test_what_is_copied_is_read_before_what_it_leads_to_is_moved(tmp_path, monkeypatch):
    world = World(tmp_path, tmp_path / "__raw")
    picture, link, real = world.file("raw/a.png"), tmp_path / "raw/z.png", deeds.stage
    link.symlink_to(picture)
    world.add("move", "a.png", picture)
    world.add("copy", "z.png", link)

    def slow(tree, entry):
        time.sleep(0.05 if entry.operation.kind == "copy" else 0)
        return real(tree, entry)

    monkeypatch.setattr(deeds, "stage", slow)
    with locked(world.folder):
        assert act(world.folder, world.operations, settings={}, num_workers=2).faults == ()


def test_what_came_to_the_old_place_of_a_move_later_stays(tmp_path):
    world = organised("move")(tmp_path)
    source = Path(world.operations[0].source)
    data = source.read_bytes()
    answers = iter([False, False, True])
    with locked(world.folder):
        act(world.folder, world.operations, settings={}, stop=lambda: next(answers), num_workers=0)
        source.write_bytes(data)
        resume(world.folder, within=[world.real])
    assert source.read_bytes() == data and (world.folder / "dog/0.png").read_bytes() == data
