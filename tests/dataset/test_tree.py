"""The rules of a dataset folder, one row each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlab.dataset import tree
from sdlab.errors import SdlabError


def make(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files; the scan opens no picture, so their content does not matter."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    root.mkdir(exist_ok=True)
    return root


def files_below(root: Path) -> set[str]:
    """Ids of everything that is not a folder and not below a ``__`` or hidden one."""
    found = set()
    for top, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(("__", "."))]
        found |= {Path(top, n).relative_to(root).as_posix() for n in names if not n.startswith(".")}
    return found


PROMPTS = [
    ("girl/long_hair/a.jpg", "girl, long hair"),
    ("a.jpg", ""),
    ("_v2/girl/a.jpg", "girl"),
    ("girl/_v2/a.jpg", "girl"),
    ("_/a.jpg", ""),
    ("girl_/a.jpg", "girl"),
    ("two  spaces/a__b/a.jpg", "two spaces, a b"),
    ("red, blue/a.jpg", "red, blue"),
    ("10_girl/a.jpg", "10 girl"),
    ("girl/A.JPG", "girl"),
    ("girl/a.b.c.PnG", "girl"),
    ("girl/_a.jpg", "girl"),
    ("girl/__a.jpg", "girl"),  # the rule is for folders
    ("日本/猫/a.png", "日本, 猫"),
    (unicodedata.normalize("NFD", "café/é.png"), unicodedata.normalize("NFC", "café")),
    ("a\x1b[31mred\n/a.png", "a [31mred"),
    ("[bold]/$(touch x);`id`/a.png", "[bold], $(touch x);`id`"),
    ("ta‮fel/a.png", "tafel"),
    ("x" * 255 + "/a.png", "x" * 255),
    ("girl/" + "y" * 251 + ".png", "girl"),
]


@pytest.mark.parametrize("name, prompt", PROMPTS)
def test_folders_make_the_prompt(tmp_path: Path, name: str, prompt: str) -> None:
    found = tree.scan(make(tmp_path / "images", {name: b""}))
    assert [(s.id, s.prompt, s.source) for s in found.samples] == [(name, prompt, "folder")]
    assert Path(found.samples[0].path).is_file()
    assert found.num_files == 1


@pytest.mark.parametrize("suffix", sorted(tree.SUFFIXES - tree.HEIF_SUFFIXES))
def test_every_suffix_counts_in_either_case(tmp_path: Path, suffix: str) -> None:
    found = tree.scan(make(tmp_path / "images", {f"a{suffix}": b"", f"b{suffix.upper()}": b""}))
    assert [s.id for s in found.samples] == [f"a{suffix}", f"b{suffix.upper()}"]


def test_heic_without_its_extra_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "images", {"a.heic": b""})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tree.scan(root).refused == (("a.heic", 'needs: pip install "sdlab[heic]"'),)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert [s.id for s in tree.scan(root).samples] == ["a.heic"]


JUNK = [
    ".a.jpg",
    ".git/a.jpg",
    "Thumbs.db",
    "thumbs.DB",
    "@eaDir/a.jpg",
    "__MACOSX/a.jpg",
    "desktop.ini",
    "._a.jpg",
    "a.cap.bak",
    "b.CAP.bak12",
]


@pytest.mark.parametrize("name", JUNK)
def test_hidden_and_left_behind_files_are_not_looked_at(tmp_path: Path, name: str) -> None:
    found = tree.scan(make(tmp_path / "images", {name: b"", "girl/a.jpg": b"", f"girl/{name}": b""}))
    assert [s.id for s in found.samples] == ["girl/a.jpg"]
    assert (found.refused, found.skipped, found.num_files) == ((), (), 1)


def test_folders_with_two_underscores_are_skipped_and_counted(tmp_path: Path) -> None:
    files = [
        "girl/__review/a.jpg",
        "girl/__review/deep/b.jpg",
        "girl/__review/b.txt",
        "__/c.jpg",
        "girl/d.jpg",
    ]
    found = tree.scan(make(tmp_path / "images", dict.fromkeys(files, b"")))
    assert [s.id for s in found.samples] == ["girl/d.jpg"]
    assert found.skipped == (("__", 1), ("girl/__review", 3))
    assert found.found == found.num_files == 1


@pytest.mark.parametrize("name", ["_images", "__images", ".images", "girl_photos"])
def test_the_name_of_the_root_does_not_matter(tmp_path: Path, name: str) -> None:
    found = tree.scan(make(tmp_path / name, {"girl/a.jpg": b""}))
    assert [(s.id, s.prompt) for s in found.samples] == [("girl/a.jpg", "girl")]


@pytest.mark.parametrize("spelling", ["images", "images/", "./images", "images/.", "other/../images"])
def test_the_root_may_be_spelled_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    make(tmp_path / "images", {"girl/a.jpg": b""})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [(s.id, s.prompt) for s in tree.scan(spelling).samples] == [("girl/a.jpg", "girl")]


CAPTIONS = [  # files beside girl/a.jpg, prompt, source, is there a note
    ({"a.cap": "a tall girl\nmore"}, "a tall girl", "cap", False),
    ({"a.txt": "a tall girl"}, "a tall girl", "txt", False),
    ({"a.cap": "from cap", "a.txt": "from txt"}, "from cap", "cap", False),
    ({"a.CAP": "upper"}, "upper", "cap", False),
    ({"a.cap": "# why\n\n   \n#x\n  the line  \n"}, "the line", "cap", False),
    ({"a.cap": "# only\n"}, "girl", "folder", True),
    ({"a.cap": ""}, "girl", "folder", True),
    ({"a.cap": "# only", "a.txt": "not this one"}, "girl", "folder", True),
    ({"a.cap": "\ufeffwith BOM"}, "with BOM", "cap", False),
    ({"a.cap": "赤い魚".encode("utf-16")}, "赤い魚", "cap", False),
    ({"a.cap": "赤い魚".encode("cp932")}, "赤い魚", "cap", False),
    ({"a.cap": b"\xff\xff\x80\xa0"}, "girl", "folder", True),
    ({"a.cap": b"x" * 10_000_000}, "girl", "folder", True),
    ({"a.cap": "esc \x1b[2J seq"}, "esc [2J seq", "cap", False),
    ({"a.cap": unicodedata.normalize("NFD", "café")}, unicodedata.normalize("NFC", "café"), "cap", False),
]


@pytest.mark.parametrize("files, prompt, source, noted", CAPTIONS)
def test_captions_replace_the_folder_prompt(
    tmp_path: Path, files: dict[str, bytes | str], prompt: str, source: str, noted: bool
) -> None:
    beside = {f"girl/{name}": content for name, content in files.items()}
    found = tree.scan(make(tmp_path / "images", {"girl/a.jpg": b"", "girl/b.jpg": b"", **beside}))
    assert [s[2:4] for s in found.samples] == [(prompt, source), ("girl", "folder")]
    assert found.companions == tuple(sorted(beside))
    assert found.refused == ()
    assert [id for id, _ in found.notes] == (["girl/a.cap"] if noted else [])


def test_without_txt_only_cap_counts(tmp_path: Path) -> None:
    files = {"girl/a.jpg": b"", "girl/a.txt": "no", "girl/b.jpg": b"", "girl/b.cap": "yes"}
    found = tree.scan(make(tmp_path / "images", files), use_txt=False)
    assert [s.prompt for s in found.samples] == ["girl", "yes"]
    assert found.companions == ("girl/a.txt", "girl/b.cap")


@pytest.mark.parametrize("order", [("a.cap", "a.CAP", "a.Cap"), ("a.Cap", "a.CAP", "a.cap")])
def test_of_captions_that_differ_in_case_the_small_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    root = make(tmp_path / "images", {"a.jpg": b"", **{name: f"from {name}" for name in order}})
    if len(os.listdir(root)) < 4:
        pytest.skip("this file system does not tell them apart")
    listed = {entry.name: entry for entry in os.scandir(root)}

    class Listing:
        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return (listed[name] for name in (*order, "a.jpg"))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Listing())
    found = tree.scan(root)
    assert [s.prompt for s in found.samples] == ["from a.cap"]
    assert [id for id, _ in found.refused] == ["a.CAP", "a.Cap"]


def test_a_caption_counts_for_every_picture_of_its_name_and_in_any_normal_form(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    files = {f"g/{nfd}.jpg": b"", f"g/{nfc}.cap": "text", "g/x.jpg": b"", "g/x.png": b"", "g/x.cap": "both"}
    found = tree.scan(make(tmp_path / "images", files))
    assert [s.prompt for s in found.samples] == ["text", "both", "both"]


@pytest.mark.parametrize(
    "name", ["a.cap", "readme.txt", "girl/b.cap", "girl/a.jpg.txt", "girl/a.ref.cap", "x/a.ref.png",
             "notes.md", "movie.mp4", "noextension", "a.jpg.part", "a.", "weights.safetensors"]
)  # fmt: skip
def test_files_without_a_use_are_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    found = tree.scan(make(tmp_path / "images", {"girl/a.jpg": b"", name: b"x"}))
    assert [s.id for s in found.samples] == ["girl/a.jpg"]
    assert [r.id for r in found.refused] == [name]
    assert found.refused[0].reason


def test_references_belong_to_their_picture_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["a.jpg", "a.ref10.png", "a.ref2.webp", "a.REF.png", "b.jpg", "a.reference.png", "b.ref.jpg"]
    root = make(tmp_path / "images", {f"edit/{name}": b"" for name in names})
    found = tree.scan(root)
    of = {s.id: [os.path.relpath(path, root) for path in s.references] for s in found.samples}
    assert of == {
        "edit/a.jpg": ["edit/a.REF.png", "edit/a.ref2.webp", "edit/a.ref10.png"],
        "edit/a.reference.png": [],
        "edit/b.jpg": ["edit/b.ref.jpg"],
    }
    assert len(found.companions) == 4


PREFIXES = [
    ("sks, ", "girl", "sks, girl"),
    ("a photo of ", "girl", "a photo of girl"),
    ("sks, ", "", "sks"),
    ("", "girl", "girl"),
    ("  ", "girl", "girl"),
    ("a\x07b ", "girl", "a b girl"),
]


@pytest.mark.parametrize("prefix, folder, prompt", PREFIXES)
def test_the_prefix_goes_before_every_prompt(tmp_path: Path, prefix: str, folder: str, prompt: str) -> None:
    root = make(tmp_path / "images", {f"{folder}/a.jpg".lstrip("/"): b"", "b.jpg": b"", "b.cap": "own"})
    prompts = {s.id: s.prompt for s in tree.scan(root, prompt_prefix=prefix).samples}
    assert prompts[f"{folder}/a.jpg".lstrip("/")] == prompt
    assert prompts["b.jpg"].endswith("own") and prompts["b.jpg"].startswith(
        prompt.removesuffix("girl").strip()
    )


def test_order_is_by_path_segments_whatever_the_system_lists_first(tmp_path: Path) -> None:
    names = [
        "b/a.jpg",
        "a/z.jpg",
        "a.jpg",
        "a b/a.jpg",
        "a-b/a.jpg",
        "a/b/c.jpg",
        "Z.jpg",
        "é.jpg",
        "a0/a.jpg",
    ]
    expected = sorted(names, key=lambda name: name.split("/"))
    for number, order in enumerate((names, names[::-1])):
        root = make(tmp_path / str(number), dict.fromkeys(order, b""))
        assert [s.id for s in tree.scan(root).samples] == expected


def test_every_file_is_used_or_goes_along_or_is_refused(tmp_path: Path) -> None:
    files = {name: b"x" for name, _ in PROMPTS if "\x1b" not in name}
    files |= {
        "girl/o.cap": b"",
        "girl/a.cap": b"x",
        "girl/a.ref.png": b"",
        "girl/x.md": b"",
        "__r/x.jpg": b"",
    }
    root = make(tmp_path / "images", files)
    found = tree.scan(root)
    groups = [{s.id for s in found.samples}, set(found.companions), {r.id for r in found.refused}]
    assert set.union(*groups) == files_below(root)
    assert sum(map(len, groups)) == len(files_below(root)) == found.num_files
    assert found.found == len(found.samples) + len(found.refused)


def test_only_captions_put_aside_are_left_out_as_such(tmp_path: Path) -> None:
    names = ("a.cap.bak.jpg", "a.cap.bakx", "a.txt.bak", "cap.bak", "b.cap.bak/c.jpg")
    root = make(tmp_path / "images", dict.fromkeys(names, b""))
    (root / "d.cap.bak2").symlink_to(root / "cap.bak")
    found = tree.scan(root)
    assert [s.id for s in found.samples] == ["a.cap.bak.jpg", "b.cap.bak/c.jpg"]
    assert [r.id for r in found.refused] == ["a.cap.bakx", "a.txt.bak", "cap.bak"]
    assert found.num_files == 5


def test_a_reference_is_known_by_its_stem() -> None:
    assert [tree.reference_of(stem) for stem in ("a.ref", "a.b.REF12", "a.ref.x", ".ref", "aref")] == [
        ("a", ""),
        ("a.b", "12"),
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(("name", "text"), [("a\ud83d", "a_"), ("\udc83\udd00é", "ダﾃｩ"), ("é", "é")])
def test_any_name_is_readable_as_text(name: str, text: str) -> None:
    assert tree.readable(name) == text
    assert tree.segment_prompt(f"x{name}").isprintable()


def test_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "images") + "/赤い".encode("cp932")
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    Path(os.fsdecode(folder + b"/\xff\xfe.png")).write_bytes(b"")
    found = tree.scan(tmp_path / "images")
    assert [s.prompt for s in found.samples] == ["赤い"]
    assert os.path.isfile(found.samples[0].path)
    assert len(found.notes) == 1


def test_pipes_sockets_and_devices_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "images", {"girl/a.jpg": b""})
    os.mkfifo(root / "girl/pipe.jpg")
    os.mkfifo(root / "girl/a.cap")
    os.symlink("/dev/zero", root / "girl/zero.png")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
    found = tree.scan(root)
    assert [s[:4] for s in found.samples] == [("girl/a.jpg", str(root / "girl/a.jpg"), "girl", "folder")]
    reasons = {id: reason.split(",")[0] for id, reason in found.refused}
    assert reasons == {
        "girl/a.cap": "a named pipe",
        "girl/pipe.jpg": "a named pipe",
        "girl/zero.png": "a device",
        "s.jpg": "a socket",
    }


def test_links_are_followed_once_and_loops_are_seen(tmp_path: Path) -> None:
    outside = make(
        tmp_path / "outside", {"o.jpg": b"", "sub/p.jpg": b"", "single.jpg": b"", "single.cap": "x"}
    )
    root = make(tmp_path / "images", {"girl/a.jpg": b"", "girl/deep/b.jpg": b""})
    links = {
        "alias": outside,  # counts under its own name
        "again": outside / "sub",  # sorts before alias: p.jpg counts here
        "girl/file.jpg": outside / "single.jpg",
        "girl/loop": root / "girl",
        "girl/deep/root": root,
        "girl/self": "self",
        "girl/parent": tmp_path,
        "girl/top": "/",
        "girl/gone.jpg": "nowhere",
        "to_girl": root / "girl",
        "__skipped": outside,
    }
    for name, target in links.items():
        os.symlink(target, root / name)
    found = tree.scan(root)
    assert {s.id: s.prompt for s in found.samples} == {
        "again/p.jpg": "again",
        "alias/o.jpg": "alias",
        "alias/single.jpg": "x",
        "girl/a.jpg": "girl",
        "girl/deep/b.jpg": "girl, deep",
        "girl/file.jpg": "girl",
    }
    assert {r.id for r in found.refused} == {
        "alias/sub", "girl/loop", "girl/deep/root", "girl/self", "girl/parent", "girl/top",
        "girl/gone.jpg", "to_girl",
    }  # fmt: skip
    loops = {r.id for r in found.refused if "loop" in r.reason}
    assert loops == {"girl/loop", "girl/deep/root", "girl/parent", "girl/top"}
    assert found.num_files == len(found.samples) + len(found.refused) + len(found.companions)


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", {"girl/a.jpg": b""})
    os.symlink("real", tmp_path / "images")
    assert [s.prompt for s in tree.scan(tmp_path / "images").samples] == ["girl"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused_and_the_rest_stands(tmp_path: Path) -> None:
    root = make(tmp_path / "images", {"girl/a.jpg": b"", "shut/b.jpg": b"", "girl/a.cap": "x"})
    (root / "shut").chmod(0)
    (root / "girl/a.cap").chmod(0)
    try:
        found = tree.scan(root)
    finally:
        (root / "shut").chmod(0o700)
    assert [s[2:4] for s in found.samples] == [("girl", "folder")]
    assert [r.id for r in found.refused] == ["shut"]
    assert [id for id, _ in found.notes] == ["girl/a.cap"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "images", {"girl/a.jpg": b"", "shut/b.jpg": b""})
    real = os.scandir

    def scandir(path: str):  # type: ignore[no-untyped-def]
        if "shut" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = tree.scan(root)
    assert [s.id for s in found.samples] == ["girl/a.jpg"]
    assert found.refused == (("shut", "a folder that cannot be read (Permission denied)"),)


def test_very_deep_folders_do_not_crash(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    before = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(30):  # deeper than a path may be long
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(before)
    found = tree.scan(root)
    assert len(found.refused) == found.num_files == 1
    assert "cannot be read" in found.refused[0].reason


@pytest.mark.parametrize(
    "name, words",
    [("missing", "did you mean 'images'"), ("images/a.jpg", "a folder is wanted"), ("null", "not a folder")],
)
def test_a_root_that_is_no_folder_is_an_error(tmp_path: Path, name: str, words: str) -> None:
    make(tmp_path / "images", {"a.jpg": b""})
    os.symlink("/dev/null", tmp_path / "null")
    wrong = tmp_path / ("imags" if name == "missing" else name)
    with pytest.raises(SdlabError, match=words):
        tree.scan(wrong)


def test_an_empty_root_is_no_error(tmp_path: Path) -> None:
    assert tree.scan(tmp_path).num_files == 0


REPEATS = [
    ((), False, [1, 1, 1, 1, 1, 1]),
    (("girl=3",), False, [1, 3, 3, 3, 3, 1]),
    (("girl=3", "girl/long_hair=2"), False, [1, 3, 3, 3, 2, 1]),
    (("girl/long_hair/=5", "./girl=2"), False, [1, 2, 2, 2, 5, 1]),
    ((".=2",), False, [2, 2, 2, 2, 2, 2]),
    ((), True, [3, 1, 1, 1, 3, 3]),
    (("house=2",), True, [3, 1, 1, 1, 3, 6]),
]


@pytest.mark.parametrize("repeats, balance, expected", REPEATS)
def test_repeats_and_balance_weigh_folders(
    tmp_path: Path, repeats: tuple[str, ...], balance: bool, expected: list[int]
) -> None:
    names = ["a.jpg", "girl/a.jpg", "girl/b.jpg", "girl/c.jpg", "girl/long_hair/a.jpg", "house/a.jpg"]
    found = tree.scan(make(tmp_path / "images", dict.fromkeys(names, b"")))
    assert list(tree.weigh(found.samples, repeats=repeats, balance=balance)) == expected


def test_balance_counts_folders_of_one_prompt_together(tmp_path: Path) -> None:
    names = ["_v1/girl/a.jpg", "_v2/girl/b.jpg", "house/a.jpg"]
    found = tree.scan(make(tmp_path / "images", dict.fromkeys(names, b"")))
    assert tree.weigh(found.samples, balance=True) == (1, 1, 2)


@pytest.mark.parametrize(
    "entry, words", [("gril=2", "did you mean 'girl'"), ("girl", "folder=times"), ("girl=0", "folder=times"),
                     ("girl=x", "folder=times"), ("girl=-1", "folder=times"), ("girl=2.5", "folder=times")]
)  # fmt: skip
def test_wrong_repeats_are_all_named(tmp_path: Path, entry: str, words: str) -> None:
    found = tree.scan(make(tmp_path / "images", {"girl/a.jpg": b""}))
    with pytest.raises(SdlabError, match=words) as error:
        tree.weigh(found.samples, repeats=(entry, "alsowrong"))
    assert "alsowrong" in str(error.value)


def test_the_scan_needs_neither_pillow_nor_torch() -> None:
    code = "import sys, sdlab.dataset.tree; print(sorted({'PIL', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
