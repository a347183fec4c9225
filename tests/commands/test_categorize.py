"""`sdlab categorize`: a heap becomes folders that are prompts, and nothing of it is ever lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlab.commands import categorize as commands
from sdlab.commands.categorize import CategorizeConfig, categorize
from sdlab.curate.categorize import captioning, sheets
from sdlab.curate.categorize.captioning import Captioned, faults_of
from sdlab.curate.journal import run as journal
from sdlab.curate.keywords import tagger as keywords
from sdlab.curate.keywords.filler import read_filler
from sdlab.dataset import tree
from sdlab.dataset.cache import content_hashes
from sdlab.models.captioner import Caption
from tests.program import sdlab

COLOURS = {
    "a red fish": (220, 30, 30),
    "a blue fish": (30, 30, 220),
    "a red house": (140, 10, 10),
    "a green tree": (20, 160, 30),
}
OLD = "# mine\nan old castle"
DOUBTFUL = "a green tree"  # the fake model is not sure of this one
Snapshot = dict[str, str]


@pytest.fixture(scope="session")
def tagger() -> keywords.Tagger:
    """The real pipeline, loaded once."""
    return keywords.open_tagger(None, read_filler(None))


@pytest.fixture(scope="session", autouse=True)
def key() -> None:
    """The user's key, which else the first run makes: each then takes the same steps."""
    assert commands._seal().of("")


class Model:
    """In place of the captioner: says what the colour of a picture stands for, and counts."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.at: Callable[[], None] = lambda: None  # called before an answer

    def captions(
        self, paths: Any, *, folder: Path, num_workers: int, max_pixels: int, **others: Any
    ) -> Captioned:
        self.at()
        hashes, faults = content_hashes(folder, paths, num_workers, lambda what, done, total: None)
        faults |= faults_of(
            paths, hashes=hashes, folder=folder, num_workers=num_workers, max_pixels=max_pixels
        )
        good = [path for path in paths if path in hashes and path not in faults]
        self.num_asked += len(good)
        return Captioned({path: self._say(path) for path in good}, hashes, faults, len(good))

    def _say(self, path: str) -> Caption:
        with Image.open(path) as image:
            shown = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        away = {
            text: sum(abs(a - b) for a, b in zip(rgb, shown, strict=True)) for text, rgb in COLOURS.items()
        }
        text = min(away, key=away.__getitem__)
        return Caption(text, 0.2 if text == DOUBTFUL else 0.9)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tagger: keywords.Tagger) -> Model:
    fake = Model()
    monkeypatch.setattr(captioning, "caption_pictures", fake.captions)
    monkeypatch.setattr("sdlab.curate.categorize.run.open_tagger", lambda name, filler: tagger)
    return fake


def draw(root: Path, files: dict[str, str]) -> Path:
    """Pictures by what they show, each of other bytes."""
    for number, (name, caption) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16 + number, 16), COLOURS[caption])
        image.save(path, {".png": "PNG"}.get(path.suffix.lower(), "JPEG"))
        os.utime(path, ns=(10**18 + number, 10**18 + number))
    return root


@pytest.fixture
def heap(tmp_path: Path, model: Model) -> Path:
    """Four red and blue fish, a red house, a tree; captions, references and names that collide."""
    root = draw(
        tmp_path / "heap",
        {
            "a.png": "a red fish",
            "b.jpg": "a red fish",
            "more/a.png": "a red fish",
            "more/A.PNG": "a blue fish",
            "more/deep/c.jpg": "a blue fish",
            "d.png": "a red house",
            "d.ref.png": "a blue fish",
            "d.ref2.png": "a green tree",
            "e.jpg": "a green tree",
            "f.png": "a green tree",
        },
    )
    (root / "f.cap").write_text(f"{OLD}\n")
    (root / "more/a.txt").write_text("a small fish of mine\n")
    return root


def snapshot(root: Path, *, times: bool = True) -> Snapshot:
    """Every folder and file below, by hash, size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == journal.JOURNAL:
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            info = path.stat()
            when = info.st_mtime_ns if times else 0
            found[name] = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {when}"
    return found


def files(root: Path) -> list[str]:
    return [name for name, what in snapshot(root).items() if what != "folder"]


def contents(root: Path) -> list[str]:
    return sorted(what.split()[0] for what in snapshot(root).values() if what != "folder")


def report(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert sdlab("categorize", *args, "--json") == code
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


SORTED = [
    "_other/e.jpg",
    "_other/f.cap",
    "_other/f.png",
    "fish/a.png",
    "fish/a.txt",
    "fish/blue/A.PNG",
    "fish/blue/c.jpg",
    "fish/red/a.png",
    "fish/red/b.jpg",
    "red/d.png",
    "red/d.ref.png",
    "red/d.ref2.png",
]


def test_the_heap_becomes_folders_by_keyword_and_stays_as_it_was(heap: Path) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--organize", "--num-workers", 0) == 0
    output = heap.parent / "__heap"
    assert files(output) == SORTED
    assert snapshot(heap) == before
    assert contents(output) == contents(heap)
    prompts = {s.id: s.prompt for s in tree.scan(output).samples}
    assert prompts["fish/red/b.jpg"] == "fish, red"
    assert prompts["fish/a.png"] == "a small fish of mine"
    assert [len(s.references) for s in tree.scan(output).samples if s.id == "red/d.png"] == [2]


def test_the_default_output_is_left_out_by_training_until_it_is_renamed(heap: Path) -> None:
    assert sdlab("categorize", heap, "--organize") == 0
    scan = tree.scan(heap.parent)
    assert ("__heap", 12) in scan.skipped
    (heap.parent / "__heap").rename(heap.parent / "ready")
    assert len(tree.scan(heap.parent / "ready").samples) == 8


def test_without_organize_and_caption_nothing_is_written_but_the_cache(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("categorize", heap) == 0
    shown = capsys.readouterr().out
    assert "5  fish" in shown and "fish/" in shown and "--organize" in shown
    assert sorted(p.name for p in heap.parent.iterdir()) == [".sdlab-cache", "heap"]


@pytest.mark.parametrize("flags", [["--organize"], ["--organize", "--caption", "--sheet"], ["--caption"]])
def test_a_dry_run_prints_the_tree_and_writes_nothing(
    heap: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--dry-run", *flags) == 0
    shown = capsys.readouterr().out
    assert "Nothing but the cache was written" in shown
    if "--organize" in flags:
        assert [" ".join(line.split()) for line in shown.splitlines() if "/  " in line] == [
            "_other/ 2", "fish/ 5", "blue/ 2", "red/ 2", "red/ 1",
        ]  # fmt: skip
    assert snapshot(heap) == before
    assert sorted(p.name for p in heap.parent.iterdir()) == [".sdlab-cache", "heap"]
    assert report(capsys, heap, "--dry-run", *flags)["counts"]["asked"] == 6  # the fake has no cache


@pytest.mark.parametrize("mode", ["copy", "hardlink", "move"])
@pytest.mark.parametrize(
    "flags", [[], ["--caption", "--captions", "append"], ["--caption", "--captions", "replace"]]
)
def test_undo_brings_back_the_exact_tree(heap: Path, mode: str, flags: list[str]) -> None:
    before, bytes_before = snapshot(heap), contents(heap)
    assert sdlab("categorize", heap, "--organize", "--mode", mode, "--sheet", *flags) == 0
    output = heap.parent / "__heap"
    assert (snapshot(heap) == before) == (mode != "move")
    everything = contents(output) + contents(heap)
    assert set(bytes_before) <= set(everything)
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(heap) == before
    assert not output.exists()


@pytest.mark.parametrize("mode", ["copy", "hardlink", "move"])
def test_the_same_command_again_changes_nothing(
    heap: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("categorize", heap, "--organize", "--caption", "--mode", mode, "--sheet")
    assert sdlab(*command) == 0
    first = snapshot(heap), snapshot(heap.parent / "__heap")
    journal_before = (heap.parent / "__heap" / journal.JOURNAL).read_bytes()
    assert sdlab(*command) == 0
    assert "nothing to do: 8 pictures in" in capsys.readouterr().out
    assert (snapshot(heap), snapshot(heap.parent / "__heap")) == first
    assert (heap.parent / "__heap" / journal.JOURNAL).read_bytes() == journal_before
    assert report(capsys, *command[1:])["counts"]["placed_before"] == 8


def test_a_picture_the_user_has_moved_away_does_not_come_again(heap: Path) -> None:
    assert sdlab("categorize", heap, "--organize") == 0
    output = heap.parent / "__heap"
    (output / "fish/red/b.jpg").rename(output / "fish/b.jpg")
    (output / "fish/red/a.png").unlink()
    before = snapshot(output)
    assert sdlab("categorize", heap, "--organize") == 0
    assert snapshot(output) == before


@pytest.mark.parametrize("mode", ["copy", "move"])
def test_new_pictures_are_added_and_counted_with_the_old(heap: Path, mode: str) -> None:
    command = ("categorize", heap, "--organize", "--mode", mode)
    assert sdlab(*command) == 0
    output = heap.parent / "__heap"
    before = snapshot(output)
    draw(heap, {"new/b.jpg": "a red fish", "new/t.png": "a green tree"})
    new = snapshot(heap)
    assert sdlab(*command) == 0
    added = snapshot(output)
    assert {name: added[name] for name in before} == before
    assert sorted(added.keys() - before.keys()) == [
        "fish/red/b_2.jpg",
        "green",
        "green/tree",
        "green/tree/t.png",
    ]
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(output) == before
    assert snapshot(heap) == new


def test_other_settings_are_refused_with_the_two_ways_on(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("categorize", heap, "--organize") == 0
    before = snapshot(heap.parent)
    assert sdlab("categorize", heap, "--organize", "--min-count", 3, "--review") == 2
    told = capsys.readouterr().err
    assert "--min-count 2, now 3" in told and "--review off, now on" in told
    assert "--undo" in told and "--output-dir" in told
    assert snapshot(heap.parent) == before
    assert (
        sdlab("categorize", heap, "--organize", "--min-count", 3, "--output-dir", heap.parent / "other") == 0
    )


class Shuffled:
    """Looks like what os.scandir returns."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self._entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self._entries)

    def __enter__(self) -> Shuffled:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_result_does_not_depend_on_how_the_system_lists_files(
    heap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir
    results = []
    for seed in range(3):

        def scandir(path: Any = ".", seed: int = seed) -> Any:
            entries = sorted(listed(path), key=lambda entry: entry.name)
            random.Random(seed).shuffle(entries)
            return Shuffled(entries)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            output = heap.parent / f"out{seed}"
            assert sdlab("categorize", heap, "--organize", "--caption", "--output-dir", output) == 0
        results.append(snapshot(output, times=False))
    assert results[0] == results[1] == results[2]


def test_nothing_in_the_output_is_overwritten(heap: Path) -> None:
    output = heap.parent / "mine"
    (output / "fish/red").mkdir(parents=True)
    (output / "fish/red/a.png").write_text("not a picture, and mine")
    (output / "fish/red/B.cap").write_text("mine")
    before = snapshot(output)
    assert sdlab("categorize", heap, "--organize", "--output-dir", output) == 0
    after = snapshot(output)
    assert {name: after[name] for name in before} == before
    assert "fish/red/a_2.png" in after and "fish/red/b_2.jpg" in after
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(output) == before


@pytest.mark.parametrize("where", ["heap", ".", "heap/sorted", "heap/more/sorted", "heap/f.png"])
def test_an_output_that_would_mix_with_the_pictures_is_refused(heap: Path, where: str) -> None:
    before = snapshot(heap.parent)
    assert sdlab("categorize", heap, "--organize", "--output-dir", heap.parent / where) == 2
    assert snapshot(heap.parent) == before


@pytest.mark.parametrize("where", ["__sorted", "more/__sorted", ".sorted"])
def test_an_output_among_the_pictures_that_training_skips_is_fine(heap: Path, where: str) -> None:
    command = ("categorize", heap, "--organize", "--output-dir", heap / where)
    assert sdlab(*command) == 0
    assert files(heap / where) == SORTED
    before = snapshot(heap)
    assert sdlab(*command) == 0
    assert snapshot(heap) == before
    assert (heap.parent / ".sdlab-cache").is_dir()


def test_a_cache_among_the_pictures_is_refused(heap: Path) -> None:
    assert sdlab("categorize", heap, "--cache-dir", heap / "more/cache") == 2
    assert not (heap / "more/cache").exists()


def test_a_link_is_copied_rather_than_moved(
    heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = draw(
        tmp_path / "others", {"x.png": "a red fish", "y.png": "a red fish", "z.jpg": "a green tree"}
    )
    before = snapshot(others)
    (heap / "x.png").symlink_to(others / "x.png")
    (heap / "linked").symlink_to(others)
    heap_before = snapshot(heap)
    assert sdlab("categorize", heap, "--organize", "--mode", "move", "--caption") == 0
    assert "4 pictures copied, as they are links" in capsys.readouterr().out
    assert snapshot(others) == before
    output = heap.parent / "__heap"
    assert {"fish/red/x.png", "fish/red/x_2.png", "fish/red/y.png"} <= set(files(output))
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert files(heap) == ["linked", "x.png"]
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(heap) == heap_before


@pytest.mark.parametrize(
    ("settings", "folders"),
    [
        (["--depth", 1], {"_other": 2, "fish": 5, "red": 1}),
        (["--min_count", 4], {"_other": 3, "fish": 5}),
        (["--min-count", 1, "--depth", 3], {
            "castle/old": 1, "fish/blue": 2, "fish/red": 2, "fish/small": 1, "green/tree": 1, "red/house": 1,
        }),
    ],
)  # fmt: skip
def test_min_count_and_depth_shape_the_tree(
    heap: Path, settings: list[object], folders: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, heap, "--organize", "--dry_run", *settings)
    assert {one["path"]: one["pictures"] for one in found["folders"]} == folders


def test_hard_links_to_another_disk_are_refused_before_anything_is_written(
    heap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "on_one_disk", lambda source, folder: False)
    assert sdlab("categorize", heap, "--organize", "--mode", "hardlink") == 2
    assert "--mode copy" in capsys.readouterr().err
    assert not (heap.parent / "__heap").exists()


def test_captions_are_copied_where_pictures_are_linked(heap: Path) -> None:
    assert sdlab("categorize", heap, "--organize", "--mode", "hardlink") == 0
    output = heap.parent / "__heap"
    assert (output / "red/d.png").samefile(heap / "d.png")
    assert (output / "red/d.ref2.png").samefile(heap / "d.ref2.png")
    assert not (output / "_other/f.cap").samefile(heap / "f.cap")


def test_pictures_that_share_a_caption_stay_together(tmp_path: Path, model: Model) -> None:
    root = draw(tmp_path / "pair", {"a.png": "a red fish", "a.jpg": "a green tree", "b/a.png": "a red fish"})
    (root / "a.cap").write_text("two of a fish\n")
    assert sdlab("categorize", root, "--organize", "--min-count", 2) == 0
    assert files(tmp_path / "__pair") == ["fish/a.cap", "fish/a.jpg", "fish/a.png", "fish/a_2.png"]


# --caption


def test_captions_are_written_beside_pictures_and_kept_where_there_are_some(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--caption") == 0
    after = snapshot(heap)
    assert {name: after[name] for name in before} == before
    new = {name: (heap / name).read_text() for name in sorted(after.keys() - before.keys())}
    assert new == {
        "a.cap": "a red fish\n",
        "b.cap": "a red fish\n",
        "d.cap": "a red house\n",
        "e.cap": "a green tree\n",
        "more/A.cap": "a blue fish\n",
        "more/deep/c.cap": "a blue fish\n",
    }
    assert sdlab("categorize", heap, "--caption") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(heap) == after
    assert sdlab("categorize", "--undo", heap) == 0
    assert snapshot(heap) == before
    assert not (heap / journal.JOURNAL).exists()


@pytest.mark.parametrize(
    ("how", "made"),
    [
        (
            "append",
            {
                "f.cap": f"{OLD}, a green tree\n",
                "more/a.cap": "a small fish of mine, a red fish\n",
            },
        ),
        (
            "replace",
            {"f.cap": "a green tree\n", "f.cap.bak": f"{OLD}\n", "more/a.cap": "a red fish\n"},
        ),
    ],
)
def test_append_and_replace_lose_nothing_and_are_done_once(
    heap: Path, how: str, made: dict[str, str]
) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--caption", "--captions", how) == 0
    assert {name: (heap / name).read_text() for name in made} == made
    assert (heap / "more/a.txt").read_text() == "a small fish of mine\n"
    after = snapshot(heap)
    assert sdlab("categorize", heap, "--caption", "--captions", how) == 0
    assert snapshot(heap) == after
    assert sdlab("categorize", "--undo", heap) == 0
    assert snapshot(heap) == before


def test_replace_twice_keeps_both_backups(heap: Path) -> None:
    assert sdlab("categorize", heap, "--caption", "--captions", "replace") == 0
    (heap / "f.cap").write_text("written by hand\n")
    assert sdlab("categorize", heap, "--caption", "--captions", "replace") == 0
    assert (heap / "f.cap.bak").read_text() == f"{OLD}\n"
    assert (heap / "f.cap.bak2").read_text() == "written by hand\n"


@pytest.mark.parametrize(
    ("mode", "how", "made"),
    [
        ("copy", "keep", {"_other/f.cap": f"{OLD}\n"}),
        ("copy", "append", {"green/tree/f.cap": f"{OLD}, a green tree\n"}),
        (
            "move",
            "append",
            {
                "green/tree/f.cap": f"{OLD}, a green tree\n",
                "green/tree/f.cap.bak": f"{OLD}\n",
            },
        ),
        (
            "copy",
            "replace",
            {"green/tree/f.cap": "a green tree\n", "green/tree/f.cap.bak": f"{OLD}\n"},
        ),
        (
            "move",
            "replace",
            {"green/tree/f.cap": "a green tree\n", "green/tree/f.cap.bak": f"{OLD}\n"},
        ),
    ],
)
def test_organized_captions_are_written_beside_the_organized_pictures(
    heap: Path, mode: str, how: str, made: dict[str, str]
) -> None:
    command = ("categorize", heap, "--organize", "--caption", "--captions", how, "--mode", mode)
    assert sdlab(*command) == 0
    output = heap.parent / "__heap"
    assert {name: (output / name).read_text() for name in made} == made
    assert len([name for name in files(output) if name.endswith(".cap")]) == 8 - (how == "keep")
    assert not tree.scan(output).refused


def test_a_caption_that_is_not_text_is_left_and_named(heap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (heap / "a.cap").write_bytes(b"\x81\xff\xfe\x00\x01\x02")
    before = snapshot(heap)
    found = report(capsys, heap, "--caption")
    assert [note["path"] for note in found["notes"]] == ["a.cap"]
    assert "left as it is" in found["notes"][0]["text"]
    after = snapshot(heap)
    assert {name: after[name] for name in before} == before


def test_nothing_is_written_into_a_linked_folder(
    heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = draw(tmp_path / "others", {"x.png": "a red fish"})
    (heap / "linked").symlink_to(others)
    found = report(capsys, heap, "--caption")
    assert [note["path"] for note in found["notes"]] == ["linked/x.png"]
    assert files(others) == ["x.png"]


def test_two_pictures_with_one_cap_between_them_are_named(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    root = draw(tmp_path / "pair", {"a.png": "a red fish", "a.jpg": "a green tree"})
    found = report(capsys, root, "--caption")
    assert (root / "a.cap").read_text() == "a green tree\n"
    assert [note["text"] for note in found["notes"]] == [
        "shares its .cap with a.jpg, which says: a green tree"
    ]


# --review, --sheet, --json


def test_doubtful_captions_go_to_review(heap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, heap, "--organize", "--review", "--caption")
    where = {picture["path"]: picture["destination"] for picture in found["pictures"]}
    assert where["e.jpg"] == "_review/e.jpg"
    assert where["f.png"] == "_other/f.png"  # its caption is a person's
    assert [p["path"] for p in found["pictures"] if p["doubtful"]] == ["e.jpg"]
    assert (heap.parent / "__heap/_review/e.cap").read_text() == "a green tree\n"


def test_review_below_says_what_is_doubtful(heap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, heap, "--organize", "--review", "--review-below", 0.95)
    assert found["counts"]["doubtful"] == 6
    assert {f["path"]: f["pictures"] for f in found["folders"]} == {"_other": 2, "_review": 6}


def test_doubtful_captions_are_not_written_with_review(heap: Path) -> None:
    assert sdlab("categorize", heap, "--caption", "--review") == 0
    assert (heap / "a.cap").exists() and not (heap / "e.cap").exists()


def test_a_sheet_for_each_folder(heap: Path) -> None:
    assert sdlab("categorize", heap, "--organize", "--sheet") == 0
    output = heap.parent / "__heap"
    assert sorted(path.name for path in (output / "__sheets").iterdir()) == [
        "_other.jpg", "fish.jpg", "fish__blue.jpg", "fish__red.jpg", "red.jpg",
    ]  # fmt: skip
    with Image.open(output / "__sheets/fish__red.jpg") as image:
        assert image.width > 300
    assert len(tree.scan(output).samples) == 8


def test_sheets_of_captions_lie_among_the_pictures_where_training_skips_them(heap: Path) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--caption", "--sheet") == 0
    assert sorted(path.name for path in (heap / "__sheets").iterdir()) == [
        "_top.jpg", "more.jpg", "more__deep.jpg",
    ]  # fmt: skip
    after = snapshot(heap)
    assert sdlab("categorize", heap, "--caption", "--sheet") == 0
    assert snapshot(heap) == after
    assert sdlab("categorize", "--undo", heap) == 0
    assert snapshot(heap) == before


@pytest.mark.parametrize("mode", ["copy", "hardlink", "move"])
def test_sheets_can_be_had_afterwards(
    heap: Path, mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[str, ...], list[sheets.Tile]] = {}
    draw_them = sheets.write_sheets

    def watched(tiles: Any, **others: Any) -> Any:
        drawn.update(tiles)
        return draw_them(tiles, **others)

    monkeypatch.setattr(sheets, "write_sheets", watched)
    command, output = ("categorize", heap, "--organize", "--mode", mode), heap.parent / "__heap"
    assert sdlab(*command) == 0
    placed = snapshot(output)
    assert sdlab(*command, "--sheet") == 0
    assert f"8 pictures from earlier runs\n5 contact sheets in {output}/__sheets\n" in capsys.readouterr().out
    texts = [(Path(tile.path).name, tile.text) for tile in drawn["fish", "red"]]
    said = "fish, red" if mode == "move" else "0.90 a red fish"  # what was moved is not looked at again
    assert texts == [("a.png", said), ("b.jpg", said)]
    whole = snapshot(output)
    assert {name: whole[name] for name in placed} == placed
    assert sorted(whole.keys() - placed.keys()) == [
        "__sheets", *(f"__sheets/{name}.jpg" for name in ("_other", "fish", "fish__blue", "fish__red", "red")),
    ]  # fmt: skip
    for flags in (["--sheet"], []):
        assert sdlab(*command, *flags) == 0
        assert snapshot(output) == whole
    draw(heap, {"new.png": "a red fish"})
    assert sdlab(*command, "--sheet") == 0
    assert len(drawn["fish", "red"]) == 1 and (output / "__sheets/fish__red_2.jpg").exists()
    assert sdlab("categorize", "--undo", output) == sdlab("categorize", "--undo", output) == 0
    assert snapshot(output) == placed


def test_a_sheet_of_what_has_its_captions_can_be_had_afterwards(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("categorize", heap, "--caption") == 0
    captioned = snapshot(heap)
    assert sdlab("categorize", heap, "--caption", "--sheet") == 0
    assert f"\n3 contact sheets in {heap}/__sheets\n" in capsys.readouterr().out
    drawn = snapshot(heap)
    assert sorted(drawn.keys() - captioned.keys())[1:] == [
        "__sheets/_top.jpg", "__sheets/more.jpg", "__sheets/more__deep.jpg",
    ]  # fmt: skip
    assert sdlab("categorize", heap, "--caption", "--sheet") == 0
    assert "nothing to do" in capsys.readouterr().out and snapshot(heap) == drawn
    assert sdlab("categorize", "--undo", heap) == 0
    assert snapshot(heap) == captioned


def test_the_way_to_captions_afterwards_is_named_and_works(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = heap.parent / "__heap"
    assert sdlab("categorize", heap, "--organize") == 0
    placed = snapshot(output)
    assert sdlab("categorize", heap, "--organize", "--caption") == 2
    assert (
        f"For captions of what is there: sdlab categorize {output} --caption. Take" in capsys.readouterr().err
    )
    assert sdlab("categorize", output, "--caption") == 0
    assert (output / "fish/red/b.cap").read_text() == "a red fish\n"
    captioned = snapshot(output)
    assert sdlab("categorize", heap, "--organize") == 0
    assert snapshot(output) == captioned
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(output) == placed


def test_review_below_alone_says_that_it_only_lists(heap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdlab("categorize", heap, "--organize", "--review-below", 0.95) == 0
    assert "--review-below: doubtful captions are only listed" in capsys.readouterr().err
    assert sdlab("categorize", heap, "--review", "--review-below", 0.95) == 0
    assert "--review-below" not in capsys.readouterr().err


def test_numbers_and_words_fit_in_the_lines(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    root = draw(tmp_path / "heap", {"a.png": "a red fish"})
    (root / "a.cap").write_text(f"a {'zq' * 300}\n")
    assert sdlab("categorize", root, "--organize", "--min-count", 1) == 0
    told = capsys.readouterr().out
    assert "1 picture, 0 refused; 1 caption or reference file goes with them" in told
    shown = [line for line in told.splitlines() if "zqzq" in line]
    assert len(shown) == 2 and max(map(len, shown)) < 80
    assert report(capsys, root)["keywords"] == [{"keyword": "zq" * 300, "pictures": 1}]
    (root / "a.cap").unlink()
    assert sdlab("categorize", root, "--caption", "--dry-run") == 0
    assert "it would be 1 file, 1 caption of them" in capsys.readouterr().out
    assert sdlab("categorize", root, "--caption") == sdlab("categorize", "--undo", root) == 0
    assert "\n1 file taken back\n" in capsys.readouterr().out


def test_a_full_disk_of_the_cache_is_named(
    heap: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = heap.parent / "cache"
    for at, flags in (("sdlab.dataset.cache", []), ("sdlab.curate.categorize.sheets", ["--sheet"])):
        with monkeypatch.context() as patch:
            patch.setattr(f"{at}.write_whole", full)
            assert sdlab("categorize", heap, "--organize", "--cache-dir", cache, *flags) == 4
        said = capsys.readouterr().err
        assert f"{cache}: cannot be written (No space left on device)" in said
        assert "Free some space" in said and "--cache-dir" in said
    assert not (heap.parent / "__heap").exists()


def test_the_report_names_every_picture_and_every_refusal(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (heap / "empty.png").write_bytes(b"")
    (heap / "cut.jpg").write_bytes((heap / "b.jpg").read_bytes()[:300])
    (heap / "text.png").write_text("hello")
    (heap / "kept.png").write_bytes(b"GIF89a nothing more")
    (heap / "kept.cap").write_text("its caption is good\n")
    (heap / "bad.png").write_bytes((heap / "a.png").read_bytes())
    (heap / "bad.ref.png").write_text("hello")
    odd = os.fsdecode(b"caf\xe9.png")
    (heap / odd).write_bytes((heap / "a.png").read_bytes())
    os.mkfifo(heap / "pipe.png")
    found = report(capsys, heap, "--organize", "--mode", "move")
    refused = {one["path"]: one["reason"] for one in found["refused"]}
    assert sorted(refused) == ["bad.png", "cut.jpg", "empty.png", "kept.png", "pipe.png", "text.png"]
    assert all(refused.values())
    assert "bad.ref.png" in refused["bad.png"]
    assert found["counts"]["good"] == 9 == len(found["pictures"])
    assert {"seconds", "pictures_per_second", "captioner", "pipeline", "settings", "keywords"} <= found.keys()
    output = heap.parent / "__heap"
    assert (output / "fish/red/café.png").exists()
    stayed = {
        "bad.png",
        "bad.ref.png",
        "cut.jpg",
        "empty.png",
        "kept.cap",
        "kept.png",
        "pipe.png",
        "text.png",
    }
    assert stayed <= {p.name for p in heap.iterdir()} <= stayed | {"more"}


def test_a_folder_without_a_good_picture_ends_with_2(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heap").mkdir()
    (tmp_path / "heap/a.png").write_text("hello")
    assert sdlab("categorize", tmp_path / "heap", "--organize") == 2
    told = capsys.readouterr()
    assert "not a picture but text" in told.err
    assert told.out == "\nRefused\n  a.png: not a picture but text\n"
    (tmp_path / "heap/a.png").unlink()
    assert sdlab("categorize", tmp_path / "heap", "--organize") == 2
    told = capsys.readouterr()
    assert "the folder is empty" in told.err and not told.out
    assert not (tmp_path / "__heap").exists()
    assert sdlab("categorize", tmp_path / "none", "--caption") == 2
    assert not (tmp_path / "none").exists()


# stopped and killed


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(
    heap: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = heap.parent / "whole"
    command = ("categorize", heap, "--organize", "--caption")
    assert sdlab(*command, "--output-dir", whole) == 0
    model.at = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert sdlab(*command) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert not (heap.parent / "__heap").exists()
    model.at = lambda: None
    at_link = Countdown(50, signal.SIGINT)
    with monkeypatch.context() as patch:
        at_link.set(patch)
        assert sdlab(*command) == 130
    told = capsys.readouterr().err
    assert "--undo" in told
    output = heap.parent / "__heap"
    assert 0 < len(files(output)) < len(files(whole))
    assert sdlab(*command) == 0
    assert "completed: 8 pictures in" in capsys.readouterr().out
    assert snapshot(output, times=False) == snapshot(whole, times=False)


class Countdown:
    """Sends a signal to this process at the n-th of the calls that change what is on disk."""

    CALLS = ("link", "unlink", "replace", "fsync", "rename", "mkdir")

    def __init__(self, at: int, signum: int) -> None:
        self.num_calls, self._at, self._signum = 0, at, signum

    def set(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **settings: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self._at:
                os.kill(os.getpid(), self._signum)
            return call(*args, **settings)

        return counted


def test_other_pictures_complete_the_user_s_stopped_run_first(
    heap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = snapshot(heap), heap.parent / "out"
    others = draw(heap.parent / "others", {"new.png": "a red house"})
    command = ("--organize", "--mode", "move", "--output-dir", output)
    with monkeypatch.context() as patch:
        Countdown(30, signal.SIGINT).set(patch)
        assert sdlab("categorize", heap, *command) == 130
    assert not journal.read(output)[-1].finished
    assert sdlab("categorize", others, *command) == 0
    assert [run.finished for run in journal.read(output)] == [True, True]
    assert sdlab("categorize", "--undo", output) == sdlab("categorize", "--undo", output) == 0
    assert snapshot(heap) == before and files(others) == ["new.png"]


def killed(at: int, *command: object) -> int:
    """Run the command in a process that dies by SIGKILL at its at-th change of the disk; its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, of which none is at work
        child = os.fork()
    if child == 0:
        Countdown(at, signal.SIGKILL).set(pytest.MonkeyPatch())
        os._exit(sdlab(*command))
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("mode", ["copy", "move"])
def test_undo_after_kill_brings_back_every_byte(
    heap: Path, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, whole = heap.parent / "__heap", tmp_path / "whole"
    command = (
        "categorize", heap, "--organize", "--caption", "--captions", "append", "--mode", mode, "--sheet",
        "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert (
        sdlab("categorize", heap, "--cache-dir", tmp_path / "cache") == 0
    )  # each run then takes the same steps
    before = snapshot(heap)
    counter = Countdown(-1, 0)
    with monkeypatch.context() as patch:
        counter.set(patch)
        assert sdlab(*command) == 0
    shutil.copytree(output, whole)
    left = snapshot(heap)
    assert sdlab("categorize", "--undo", output) == 0
    moments = random.Random(7).sample(range(1, counter.num_calls), 12)
    for moment in moments:
        assert killed(moment, *command) == signal.SIGKILL
        everything = contents(heap) + (contents(output) if output.exists() else [])
        assert {what.split()[0] for what in before.values() if what != "folder"} <= set(everything)
        if output.exists():
            assert sdlab("categorize", "--undo", output) == 0
        assert snapshot(heap) == before, moment
        assert not output.exists()
    for moment in moments[:6]:
        assert killed(moment, *command) == signal.SIGKILL
        assert sdlab(*command) == 0
        assert snapshot(output, times=False) == snapshot(whole, times=False), moment
        assert snapshot(heap) == left
        assert sdlab("categorize", "--undo", output) == 0
        assert snapshot(heap) == before


@pytest.mark.parametrize("mode", ["copy", "move"])
def test_undo_knows_the_output_under_its_new_name(heap: Path, mode: str) -> None:
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--organize", "--mode", mode) == 0
    (heap.parent / "__heap").rename(heap.parent / "ready")
    assert sdlab("categorize", "--undo", heap.parent / "ready") == 0
    assert snapshot(heap) == before
    assert not (heap.parent / "ready").exists()


def test_undo_leaves_what_was_edited_since_and_ends_with_3(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdlab("categorize", heap, "--organize", "--caption") == 0
    output = heap.parent / "__heap"
    (output / "fish/red/b.cap").write_text("edited by hand\n")
    assert sdlab("categorize", "--undo", output) == 3
    told = capsys.readouterr()
    assert "fish/red/b.cap" in told.out
    assert files(output) == ["fish/red/b.cap"]


def test_undo_says_where_the_journal_is(heap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdlab("categorize", "--undo", heap) == 2
    assert "nothing to undo" in capsys.readouterr().err
    assert sdlab("categorize", heap, "--organize") == 0
    assert sdlab("categorize", "--undo", heap) == 2
    assert f"--undo {heap.parent / '__heap'}" in capsys.readouterr().err
    assert sdlab("categorize", heap, "--organize", "--undo", heap.parent / "__heap") == 2
    assert sdlab("categorize", "--undo", heap.parent / "__heap", "--json") == 0


def forge(folder: Path, *operations: dict[str, Any], finished: bool = False, **settings: Any) -> None:
    """A journal as anybody can write it, with a digest that fits, and a seal by another key."""
    head = {"is": "journal", "version": 1, "folder": str(folder), "made": 0}
    run = {"is": "run", "token": "0" * 16, "settings": settings, "made": []}
    lines = [json.dumps(record).encode() + b"\n" for record in (run, *operations)]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    ends = [{"is": "planned", "sha256": digest, "seal": hashlib.sha256(b"guessed").hexdigest()}]
    ends += [{"is": "finished", "faults": {}}] if finished else []
    ends_lines = [json.dumps(record).encode() + b"\n" for record in ends]
    (folder / journal.JOURNAL).write_bytes(b"".join([json.dumps(head).encode() + b"\n", *lines, *ends_lines]))


def operation(kind: str, path: str, source: Path, data: bytes) -> dict[str, Any]:
    about = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "mtime": 0}
    return {"is": "operation", "kind": kind, "path": path, "source": str(source), **about}


@pytest.mark.parametrize("flags", [["--caption"], ["--organize"]])
@pytest.mark.parametrize("kind", ["copy", "link", "move", "half-done move"])
def test_a_journal_that_came_with_a_folder_reaches_no_file_of_the_user(
    heap: Path, kind: str, flags: list[str], tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = heap if flags == ["--caption"] else heap.parent / "__heap"
    folder.mkdir(exist_ok=True)
    secret = heap.parent / "home/secret"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    if kind == "half-done move":  # to complete it removes what seems to be the rest of it
        (folder / "out").write_bytes(b"secret")
        os.utime(secret, ns=(0, 0))
    forge(folder, operation(kind.split()[-1], "out", secret, b"secret"))
    before = snapshot(heap.parent)
    assert sdlab("categorize", heap, *flags, "--cache-dir", tmp_path_factory.mktemp("cache")) == 2
    assert "not written by you" in capsys.readouterr().err
    assert snapshot(heap.parent) == before
    assert sdlab("categorize", "--undo", folder) == (2 if "move" in kind else 0)
    assert snapshot(heap.parent) == before


def test_undo_moves_nothing_to_where_a_stranger_s_journal_says(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = heap.parent / "home"
    home.mkdir()
    (heap / "link").symlink_to(home)  # the way out is shipped too
    (heap / "evil.sh").write_bytes(b"evil")
    before = snapshot(heap.parent)
    for place in (home / "autostart", heap / "link/autostart", heap.parent / "heap/../home/autostart"):
        forge(heap, operation("move", "evil.sh", place, b"evil"), finished=True)
        for images in ([], [heap]):
            assert sdlab("categorize", *images, "--undo", heap) == 2
            assert "not written by you" in capsys.readouterr().err
    assert snapshot(heap.parent) == before


@pytest.mark.parametrize("flags", [["--organize", "--mode", "move", "--sheet"], ["--caption", "--sheet"]])
def test_without_the_key_undo_asks_for_the_folder_of_the_pictures(
    heap: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    before = snapshot(heap)
    folder = heap if flags[0] == "--caption" else heap.parent / "__heap"
    assert sdlab("categorize", heap, *flags) == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("another home")))
    after = snapshot(heap)
    assert sdlab("categorize", "--undo", folder) == 2
    assert f"sdlab categorize IMAGES --undo {folder}" in capsys.readouterr().err
    if folder != heap:
        assert sdlab("categorize", heap.parent / "others", "--undo", folder) == 2
    assert snapshot(heap) == after
    assert sdlab("categorize", heap, "--undo", folder) == 0
    assert snapshot(heap) == before


@pytest.mark.parametrize("mode", ["copy", "move"])
def test_the_output_may_be_anywhere_for_the_user_s_own_undo(
    heap: Path, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = snapshot(heap)
    output = tmp_path_factory.mktemp("disk") / "sorted"
    assert sdlab("categorize", heap, "--organize", "--mode", mode, "--output-dir", output, "--sheet") == 0
    output = output.rename(tmp_path_factory.mktemp("other") / "renamed")
    assert sdlab("categorize", "--undo", output) == 0
    assert snapshot(heap) == before


@pytest.mark.parametrize(
    "keywords", [[[["fish"], 10**12]], [[["fish"], -1]], [["fish"]], 7, [[[7], 1]], [[7, 1]]]
)
def test_counts_in_a_stranger_s_journal_take_no_memory(heap: Path, keywords: Any) -> None:
    output = heap.parent / "__heap"
    assert sdlab("categorize", heap, "--organize") == 0
    (run,) = journal.read(output)
    settings = {**run.settings, "images": "/elsewhere", "keywords": keywords}
    assert sdlab("categorize", "--undo", output) == 0
    output.mkdir()
    forge(output, finished=True, **settings)
    assert sdlab("categorize", heap, "--organize") == (
        0 if "fish" in str(keywords) and len(keywords[0]) == 2 else 2
    )


def test_a_link_is_moved_and_brought_back_with_what_it_leads_to(
    heap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (heap / "z.png").symlink_to("a.png")
    before = snapshot(heap)
    assert sdlab("categorize", heap, "--organize", "--mode", "move") == 0
    assert sdlab("categorize", "--undo", heap.parent / "__heap") == 0
    assert snapshot(heap) == before
    assert not (heap.parent / "__heap").exists()


def test_pictures_that_stay_are_not_said_to_be_moved(
    heap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sdlab.curate.journal.deeds._move", refuse)
        assert sdlab("categorize", heap, "--organize", "--mode", "move") == 3
    assert "\n0 pictures moved" in capsys.readouterr().out


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


# the real model and the sample dataset


def test_organize_alone_works_on_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Path(__file__).parents[2] / "images"
    for folder in ("black_fish", "blue_house", "_captioned"):
        shutil.copytree(sample / folder, tmp_path / "images" / folder)
    monkeypatch.chdir(tmp_path)
    assert sdlab("categorize", "--organize", "--caption") == 0
    names = files(tmp_path / "__images")
    assert len([name for name in names if name.endswith(".cap")]) == 15
    shutil.rmtree(tmp_path / "__images")
    found = report(capsys, "--organize", "--caption")
    words = {one["path"].split("/")[0]: set(one["keywords"]) for one in found["pictures"]}
    assert {"black", "fish"} <= words["black_fish"] and {"blue", "house"} <= words["blue_house"]
    assert found["counts"]["asked"] == 0  # by the model, for the second time


def test_print_filler_prints_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    categorize(CategorizeConfig(print_filler=True))
    assert "araf*" in capsys.readouterr().out


def test_a_filler_file_of_the_user_is_used(
    heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    (tmp_path / "filler.txt").write_text("fish\n")
    monkeypatch.setattr(captioning, "caption_pictures", Model().captions)
    found = report(capsys, heap, "--filler", tmp_path / "filler.txt")
    assert "fish" not in {one["keyword"] for one in found["keywords"]}
    assert "tree" in {one["keyword"] for one in found["keywords"]}


def test_one_name_in_two_unicode_forms_is_two_pictures(tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    heap.mkdir()
    for number, name in enumerate(("e\u0301.png", "\u00e9.png")):
        Image.new("RGB", (64, 64), (200 * number, 20, 90)).save(heap / name)
    (heap / "e\u0301.cap").write_text("a red fish\n", encoding="utf-8")
    assert sdlab("categorize", heap, "--organize") == 0
    placed = [path for path in (tmp_path / "__heap").rglob("*.png")]
    assert len({path.read_bytes() for path in placed}) == 2
    before = sorted((tmp_path / "__heap").rglob("*"))
    assert sdlab("categorize", heap, "--organize") == 0
    assert sorted((tmp_path / "__heap").rglob("*")) == before


def test_a_file_named_like_a_folder_is_told_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heap, out = tmp_path / "heap", tmp_path / "out"
    heap.mkdir()
    out.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (200 * number, 20, 90)).save(heap / f"{number}.png")
        (heap / f"{number}.cap").write_text("a red fish\n", encoding="utf-8")
    (out / "fish").write_text("mine", encoding="utf-8")
    assert sdlab("categorize", heap, "--organize", "--output-dir", out) == 2
    assert "fish: is a file" in capsys.readouterr().err
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["fish"]
