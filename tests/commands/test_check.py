"""`sdlab check`: everything about a dataset is told, nothing is changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sdlab.commands.check import CheckConfig, check
from sdlab.dataset import sheet
from sdlab.dataset.inspect import may_be_too_long
from sdlab.dataset.report import shown
from sdlab.errors import SdlabError

Run = Callable[..., dict[str, Any]]


def tree_hash(root: Path) -> str:
    """Names, kinds, times and bytes of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        digest.update(
            f"{path}{info.st_mode}{info.st_mtime_ns}{info.st_size}".encode(errors="surrogateescape")
        )
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def images(pictures: Callable[..., Path]) -> Path:
    """A dataset with a bit of everything that goes right and wrong."""
    root = pictures(
        {
            "fish/red_fish/a.png": (64, 64),
            "fish/red_fish/b.jpg": (100, 200),
            "fish/c.webp": (200, 100),
            "_v2/house/d.png": (300, 300),
            "house/e.png": (32, 32),
            "house/e.ref.png": (32, 32),
            "house/__review/f.png": (8, 8),
            "top.png": (50, 60),
        }
    )
    (root / "fish/c.cap").write_text("# mine\na fish of its own\n")
    (root / "house/e.txt").write_text("a small house\n")
    (root / "house/orphan.cap").write_text("nobody's\n")
    (root / "fish/empty.cap").write_text("#\n")
    (root / "fish/empty.png").write_bytes((root / "fish/red_fish/a.png").read_bytes())
    data = (root / "fish/red_fish/b.jpg").read_bytes()
    (root / "fish/cut.jpg").write_bytes(data[: len(data) * 3 // 4])
    (root / "fish/text.jpg").write_text("not a picture")
    (root / "notes.md").write_text("x")
    os.mkfifo(root / "fish/pipe.png")
    return root


@pytest.fixture
def report(images: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run with --json and return the document."""

    def run(root: Path = images, **settings: Any) -> dict[str, Any]:
        settings.setdefault("image_size", 64)
        check(CheckConfig(images=root, json=True, **settings))
        document = json.loads(capsys.readouterr().out)
        assert isinstance(document, dict)
        return document

    return run


def test_the_report_names_everything(report: Run) -> None:
    found = report()
    assert found["captions"] == {"folder": 5, "cap": 1, "txt": 1}
    assert {p["prompt"]: p["pictures"] for p in found["prompts"]} == {
        "": 1, "a fish of its own": 1, "a small house": 1, "fish": 1, "fish, red fish": 2, "house": 1
    }  # fmt: skip
    assert {f["path"]: f["pictures"] for f in found["folders"]} == {
        "": 1, "_v2/house": 1, "fish": 2, "fish/red_fish": 2, "house": 1
    }  # fmt: skip
    assert found["companions"] == ["fish/c.cap", "fish/empty.cap", "house/e.ref.png", "house/e.txt"]
    assert found["skipped"] == [{"path": "house/__review", "files": 1}]
    assert found["empty_prompts"] == ["top.png"]
    assert found["duplicates"] == [["fish/empty.png", "fish/red_fish/a.png"]]
    assert [note["path"] for note in found["notes"]] == ["fish/empty.cap"]
    assert found["too_long"] == []
    assert found["sizes"] == {"min": [32, 32], "median": [64, 64], "max": [300, 300]}
    assert found["upscaled"] == 2
    buckets = {(b["height"], b["width"]): b["pictures"] for b in found["buckets"]}
    assert buckets == {(48, 88): 1, (64, 64): 4, (56, 72): 1, (88, 48): 1}
    reasons = {r["path"]: r["reason"] for r in found["refused"]}
    assert sorted(reasons) == [
        "fish/cut.jpg",
        "fish/pipe.png",
        "fish/text.jpg",
        "house/orphan.cap",
        "notes.md",
    ]
    assert all(reasons.values())


@pytest.mark.parametrize("deep", [False, True])
def test_used_and_refused_are_all_files_found(report: Run, images: Path, deep: bool) -> None:
    found = report(deep=deep)
    assert found["used"] + len(found["refused"]) == found["found"]
    files = [p for p in images.rglob("*") if not p.is_dir() and "__review" not in p.parts]
    assert found["found"] + len(found["companions"]) == len(files)
    assert sum(p["pictures"] for p in found["prompts"]) == found["used"]
    assert sum(b["pictures"] for b in found["buckets"]) == found["used"]


def test_deep_finds_what_only_decoding_shows(report: Run, images: Path) -> None:
    data = bytearray((images / "fish/red_fish/a.png").read_bytes())
    data[-20:-12] = b"\0" * 8
    (images / "house/damaged.png").write_bytes(data)
    plain, deep = report(), report(deep=True)
    assert plain["used"] == deep["used"] + 1
    assert "house/damaged.png" in {r["path"] for r in deep["refused"]}


def test_the_dataset_is_not_changed(report: Run, images: Path, tmp_path: Path) -> None:
    before = tree_hash(images)
    report(deep=True, sheet=tmp_path / "check.png")
    assert tree_hash(images) == before


def test_people_read_the_same_things(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(CheckConfig(images=images, image_size=64))
    text = capsys.readouterr().out
    for words in (
        "12 files found, 7 pictures used, 5 refused",
        'red_fish/  2  "fish, red fish"',
        "from folders 5, from .cap 1, from .txt 1",
        "smallest 32x32, median 64x64, largest 300x300",
        "88x48 bucket",
        "1 picture has 1:",
        "2 pictures smaller than their bucket",
        "house/__review/  1 file",
        "fish/empty.png = fish/red_fish/a.png",
        "fish/empty.cap: only comments and empty lines",
        "fish/text.jpg: not a picture but text",
        "top.png",
    ):
        assert words in text, words


def test_names_with_control_characters_are_shown_and_not_sent(
    pictures: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pictures({"a\x1b[2Jb\nc/\x07.png": (8, 8), "[red]x/a.png": (8, 8)})
    bad = os.fsencode(root) + b"/\xff\x1b.mp4"
    Path(os.fsdecode(bad)).write_bytes(b"")
    check(CheckConfig(images=root, image_size=64))
    text = capsys.readouterr().out
    assert not set(text) & {"\x1b", "\x07"}
    assert "a\\x1b[2Jb\\x0ac/" in text and "[red]x" in text and "\\xff\\x1b.mp4" in text
    check(CheckConfig(images=root, image_size=64, json=True))
    raw = capsys.readouterr().out
    raw.encode("utf-8")
    assert json.loads(raw)["refused"][0]["path"] == "\udcff\x1b.mp4"


@pytest.mark.parametrize(
    "text, expected", [("plain ünï 猫", "plain ünï 猫"), ("a\nb", "a\\x0ab"), ("\u202e", "\\u202e")]
)
def test_what_is_not_printable_is_made_visible(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_words_beyond_the_window_are_named(
    pictures: Callable[..., Path], tiny_sd_folder: Path, report: Run
) -> None:
    root = pictures({"a/x.png": (8, 8), "a/y.png": (8, 8), "b/z.png": (8, 8)}, name="long")
    fits = "abcde " * 15  # the tests' tokenizer has a token for every letter
    (root / "a/x.cap").write_text(fits)
    (root / "a/y.cap").write_text(f"{fits}lost words")
    (root / "b/z.cap").write_text("!" * 80)
    found = report(root, load_model=str(tiny_sd_folder))
    assert found["too_long"] == [
        {"prompt": "!" * 80, "pictures": 1, "tokens": 82, "window": 77, "lost": "!" * 5},
        {"prompt": f"{fits}lost words", "pictures": 1, "tokens": 86, "window": 77, "lost": "lost words"},
    ]


class FakeWindow:
    """50 tokens, 10 of them the model's own; every letter is one. Remembers what was counted."""

    window = 50

    def __init__(self) -> None:
        self.counted: list[str] = []

    def lost(self, prompt: str) -> tuple[int, str]:
        self.counted.append(prompt)
        return 10 + len(prompt), prompt[40:]


def test_the_window_is_the_models_that_uses_the_references(
    pictures: Callable[..., Path], report: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, asked = FakeWindow(), []
    monkeypatch.setattr("sdlab.commands.check._has_cuda_driver", lambda: False)
    monkeypatch.setattr("sdlab.models.resolve.resolve", lambda name, **_: asked.append(name))
    monkeypatch.setattr("sdlab.models.opening.prompt_window", lambda model: window)
    root = pictures({f"{n}.png": (8, 8) for n in ("a", "a.ref", "b", "b.ref", "c")}, name="windows")
    for name, length in (("a", 32), ("b", 40), ("c", 41)):
        (root / f"{name}.cap").write_text("x" * length)
    found = report(root)["too_long"]
    assert found == [{"prompt": "x" * 41, "pictures": 1, "tokens": 51, "window": 50, "lost": "x"}]
    assert asked == ["mini-flux2"]
    assert window.counted == ["", "x" * 41]  # the others fit whatever their tokens are


def test_without_a_model_long_prompts_are_told_of_and_not_counted(
    pictures: Callable[..., Path], report: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **_: Any) -> None:
        raise SdlabError("the hub cannot be reached")

    said: list[str] = []
    monkeypatch.setattr("sdlab.commands.check.show.warn", said.append)
    monkeypatch.setattr("sdlab.models.resolve.resolve", unreachable)
    root = pictures({"a.png": (8, 8)}, name="unknown")
    (root / "a.cap").write_text("x" * 99)
    assert report(root)["too_long"] is None
    assert "1 prompts may be too long" in said[0] and "hub" in said[0]


@pytest.mark.parametrize(
    "prompt, doubtful", [("x" * 75, False), ("x" * 76, True), ("猫" * 25, False), ("猫" * 26, True)]
)
def test_only_prompts_that_could_overflow_are_counted(prompt: str, doubtful: bool) -> None:
    assert may_be_too_long(prompt) == doubtful


@pytest.fixture
def edits(pictures: Callable[..., Path]) -> Path:
    """Pictures with 0 to 3 references; those of c and d are broken."""
    files = ("a", "b", "b.ref", "c", "c.ref", "c.ref2", "d", "d.ref", "e", "e.ref", "e.ref2", "e.ref7")
    root = pictures({f"make_it_red/{name}.png": (64, 64) for name in files}, name="edits")
    (root / "make_it_red/c.ref2.png").write_text("not a picture")
    cut = root / "make_it_red/d.ref.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    return root


@pytest.mark.parametrize("deep", [False, True])
def test_references_are_counted_and_a_bad_one_refuses_its_picture(
    report: Run, edits: Path, deep: bool
) -> None:
    found = report(edits, deep=deep)
    assert found["references"] == {"pictures": 2, "files": 4}  # of what is used: b and e
    reasons = {r["path"]: r["reason"] for r in found["refused"]}
    assert sorted(reasons) == ["make_it_red/c.png", "make_it_red/d.png"]
    assert reasons["make_it_red/c.png"] == "its reference c.ref2.png: not a picture but text"
    assert reasons["make_it_red/d.png"].startswith("its reference d.ref.png: a damaged PNG")
    assert found["found"] == found["used"] + 2 == 5
    assert len(found["companions"]) == 7


def test_people_read_how_many_pictures_have_references(
    edits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(CheckConfig(images=edits, image_size=64))
    assert "2 pictures have 4: training of edits" in capsys.readouterr().out


def test_a_model_that_learns_no_edits_does_not_mind_references(
    report: Run, edits: Path, tiny_sd_folder: Path
) -> None:
    found = report(edits, load_model=str(tiny_sd_folder), deep=True)
    assert (found["used"], found["refused"]) == (5, [])
    assert found["references"] == {"pictures": 4, "files": 7}


def test_datasets_of_edits_are_measured_for_the_model_that_learns_them(
    report: Run, pictures: Callable[..., Path]
) -> None:
    plain = pictures({"a.png": (48, 96), "b.png": (64, 64)}, name="plain")
    assert [b["width"] for b in report(plain)["buckets"]] == [88, 64]
    pictures({"b.ref.png": (8, 8)}, name="plain")
    assert [b["width"] for b in report(plain)["buckets"]] == [96, 64]


def test_the_grid_is_the_models(
    report: Run, tiny_sd_folder: Path, pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pictures({"a.png": (62, 66)}, name="odd")
    with pytest.raises(SdlabError, match="56 or 64"):
        report(root, image_size=62, load_model=str(tiny_sd_folder))
    monkeypatch.setattr("sdlab.models.opening.open_family", lambda model, vae: SimpleNamespace(grid=2))
    found = report(root, image_size=62, load_model=str(tiny_sd_folder))
    assert [(b["height"], b["width"]) for b in found["buckets"]] == [(62, 62)]


def test_the_size_of_buckets_is_the_models(tiny_sd_folder: Path, report: Run) -> None:
    buckets = report(image_size=None, load_model=str(tiny_sd_folder))["buckets"]
    assert {b["height"] for b in buckets if b["height"] == b["width"]} == {64}


def test_beyond_20000_pictures_headers_are_read_when_asked(
    report: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlab.commands.check.MAX_UNASKED", 3)
    plain = report()
    assert [plain[key] for key in ("sizes", "buckets", "duplicates", "upscaled")] == [None] * 4
    assert plain["used"] == 9  # the pictures whose headers nobody looked at count
    assert report(sizes=True)["used"] == 7
    assert report(deep=True)["sizes"] is not None


def test_references_are_files_to_open_too(
    report: Run, monkeypatch: pytest.MonkeyPatch, pictures: Callable[..., Path]
) -> None:
    root = pictures({"a.png": (8, 8), "a.ref.png": (8, 8), "a.ref2.png": (8, 8)}, name="few")
    monkeypatch.setattr("sdlab.commands.check.MAX_UNASKED", 3)
    assert report(root)["sizes"] is not None
    monkeypatch.setattr("sdlab.commands.check.MAX_UNASKED", 2)
    assert report(root)["sizes"] is None


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, "the folder is empty"),
        (lambda root: (root / "a.mp4").write_bytes(b""), r"1 x not a picture \(.mp4\)"),
        (lambda root: (root / "a.jpg").write_bytes(b"text"), "1 x not a picture but text"),
        (
            lambda root: ((root / "__x").mkdir(), (root / "__x/a.jpg").write_bytes(b"")),
            "left out by their name",
        ),
    ],
)
def test_only_where_nothing_is_usable_the_exit_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], words: str
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(SdlabError, match=words) as error:
        check(CheckConfig(images=root, image_size=64, json=True))
    assert error.value.exit_code == 2
    assert json.loads(capsys.readouterr().out)["used"] == 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 500}, "496 or 504"),
    ({"background": "blurple"}, "blurple"),
    ({"images": Path("nowhere")}, "no such folder"),
    ({"load_model": "./nowhere"}, "nowhere"),
    ({"sheet": Path("a.jpg")}, r"a\.png"),
]


@pytest.mark.parametrize("settings, words", WRONG)
def test_wrong_settings_are_refused(images: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SdlabError, match=words):
        check(CheckConfig(**{"images": images, **settings}))


def test_the_sheet_shows_pictures_and_leaves_out_what_is_broken(report: Run, tmp_path: Path) -> None:
    path = tmp_path / "check.png"
    found = report(sheet=path)
    with Image.open(path) as image:
        assert image.width < 1000 and image.height < 1000
    report(sheet=path)  # a sheet of ours is replaced
    assert found["used"] == 7
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_a_sheet_is_never_put_into_the_dataset_or_over_another_file(images: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.png"
    Image.new("RGB", (4, 4)).save(precious)
    (tmp_path / "link").symlink_to(images)
    before = tree_hash(tmp_path)
    for path, words in (
        (images / "check.png", "inside the dataset"),
        (images / "house/check.png", "inside the dataset"),
        (tmp_path / "link/check.png", "inside the dataset"),
        (precious, "is there already"),
        (tmp_path / "no/such/check.png", "no such folder"),
    ):
        with pytest.raises(SdlabError, match=words):
            check(CheckConfig(images=images, image_size=64, sheet=path))
    assert tree_hash(tmp_path) == before


def test_a_sheet_of_many_pictures_is_bounded_and_picks_evenly() -> None:
    picked = sheet.evenly(list(range(1000)), 400)  # type: ignore[arg-type]
    assert len(picked) == 400 and picked[0] == 0 and picked[-1] >= 990
    assert sheet.evenly([1, 2, 3], 400) == [1, 2, 3]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "text", ["", "short", "many words that need more than one line " * 9, "x" * 900, "猫" * 99, "\n\x00\x1b"]
)
def test_prompts_fit_under_their_picture(text: str) -> None:
    font, _ = sheet.font_for([text])
    lines = sheet.fitted(text, font, 176, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 176 for line in lines)
    assert ("…" in "".join(lines)) == (len(text) > 90)


def test_check_as_a_user_runs_it(images: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sdlab.cli import main\n"
        "try: main(['check', *sys.argv[1:]])\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    run = [sys.executable, "-c", code, str(images), "--image_size", "64", "--deep", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"  # light
    assert json.loads(done.stdout)["used"] == 7
    assert list(tmp_path.iterdir()) == [images]
