"""Names that all three systems take and that mean nothing else to the dataset."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path

import pytest

from sdlab.curate.names import MAX_BYTES, Names, folder_name, safe_stem
from sdlab.dataset.tree import scan, segment_prompt
from tests import factories

DEVICES = ["con", "CON", "nul", "Aux", "prn", "com1", "COM9", "lpt1", "com¹", "CONIN$"]
PIECES = [
    *"abcÄéßŞıǆ猫🦊_.-~%& \t\n:/\\<>|?*\"'",
    *(
        "e\u0301",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\udc83",
        "\ud83d",
        "con",
        "NUL",
        ".ref",
        ".ref2",
        ".REF",
        "..",
        "__",
    ),
    *("Thumbs.db", "__MACOSX", "@eaDir", "x" * 150, "猫" * 90, "\x7f", "\u2028", ".cap", ".cap.bak", ".txt"),
]


def random_names(num: int = 3000) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) for _ in range(num)]


def is_safe_everywhere(name: str) -> bool:
    """By the documented rules of Windows, and those of macOS and Linux."""
    return (
        bool(name)
        and not set(name) & set('<>:"/\\|?*')
        and all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in name)
        and name[-1] not in ". "
        and name.partition(".")[0].rstrip().lower() not in {device.lower() for device in DEVICES}
        and unicodedata.is_normalized("NFC", name)
        and len(name.encode()) <= 255
        and len(name.encode("utf-16-le")) // 2 <= 255
    )


def test_a_folder_reads_back_as_its_keyword():
    for keyword in (
        "cat",
        "fire truck",
        "t-shirt",
        "snow-covered",
        "café",
        "ボール",
        "golden retriever puppy",
    ):
        assert segment_prompt(folder_name(keyword)) == keyword
    assert folder_name("fire truck") == "fire_truck"


def test_a_folder_is_safe_and_always_a_prompt():
    for name in [*DEVICES, *random_names()]:
        made = folder_name(name)
        if made:
            assert is_safe_everywhere(made) and made[0] not in "_." and len(made.encode()) <= MAX_BYTES, name
            assert segment_prompt(made) and folder_name(made) in (made, made.rstrip("_")), name
            assert made not in ("thumbs.db", "desktop.ini", "@eadir", "__macosx")


def test_a_stem_that_is_safe_stays_as_it_is():
    for stem in (
        "a",
        "IMG_0001",
        "my cat  (2)",
        "été",
        "猫",
        "a.b.c",
        "_x",
        "con1",
        "reference",
        "a.reference",
    ):
        assert safe_stem(stem) == stem


@pytest.mark.parametrize(
    "wanted,made",
    [
        ("a:b", "a_b"),
        ("CON", "CON_"),
        ("nul.x", "nul_.x"),
        ("aux .x", "aux_.x"),
        (".hidden", "hidden"),
        ("a. .", "a"),
        ("...", "picture"),
        ("a.ref.", "a.ref_"),
        ("a.REF12", "a.REF12_"),
        ("e\u0301", "é"),
    ],
)
def test_a_stem_is_made_safe(wanted, made):
    assert safe_stem(wanted) == made


def test_bytes_that_are_not_utf_8_become_readable():
    raw = "猫".encode("cp932").decode("utf-8", "surrogateescape")
    assert safe_stem(raw) == "猫"
    assert safe_stem("caf\udce9") == "café"


def test_every_stem_is_safe_alone_and_with_what_is_added():
    for wanted in random_names():
        stem = safe_stem(wanted)
        assert is_safe_everywhere(stem) and stem[0] != ".", wanted
        assert len(stem.encode()) <= MAX_BYTES
        assert safe_stem(stem) == stem, wanted
        assert is_safe_everywhere(f"{stem}.ref10.webp") and is_safe_everywhere(f"{stem}.cap.bak")


def test_long_names_stay_different():
    one, other = safe_stem("x" * 300 + "1"), safe_stem("x" * 300 + "2")
    assert one != other and len(one) == len(other) == MAX_BYTES


def test_stems_differ_in_any_case_and_form():
    names = Names()
    assert [names.stem("dog", "A") for _ in range(3)] == ["A", "A_2", "A_3"]
    assert names.stem("DOG", "a") == "a_4"
    assert names.stem("dog", "a_2") == "a_2_2"
    assert names.stem("dog", "e\u0301") == "é" and names.stem("dog", "É") == "É_2"
    assert names.stem("cat", "A") == "A"


def test_numbered_stems_keep_within_the_length():
    names = Names()
    made = {names.stem("", "y" * 500) for _ in range(120)}
    assert len(made) == 120 and max(len(stem) for stem in made) <= MAX_BYTES


def test_a_thousand_equal_names_take_no_time():
    names = Names()
    made = [
        names.stem("dog", "IMG_0001") for _ in range(20_000)
    ]  # looking from 2 each time would take minutes
    assert made[-1] == "IMG_0001_20000" and len(set(made)) == len(made)


@pytest.mark.parametrize(
    "there", ["a.jpg", "A.PNG", "a.cap", "a.txt", "a.ref.png", "a.ref3.png", "a.cap.bak", "a"]
)
def test_no_new_picture_gets_what_belongs_to_another(there):
    names = Names()
    names.take("Dog", there)
    assert names.stem("dog", "a") == "a_2"


def test_a_file_takes_no_more_than_its_own_stem():
    names = Names()
    names.take("dog", "a.b.jpg")
    names.take("dog", ".hidden")
    assert names.stem("dog", "a") == "a" and names.stem("dog", "a.b") == "a.b_2"
    assert names.stem("dog", "hidden") == "hidden"


def test_the_dataset_sees_each_stem_as_one_picture_with_its_own_caption(tmp_path):
    names, stems = Names(), {}
    for number, wanted in enumerate(random_names(250)):
        stems[names.stem("", wanted)] = number
    factories.pictures(tmp_path / "images", {f"{stem}.png": (8, 8) for stem in stems})
    for stem, number in stems.items():
        Path(tmp_path, "images", f"{stem}.cap").write_text(f"caption {number}", encoding="utf-8")
    found = scan(os.fspath(tmp_path / "images"))
    assert {sample.id.removesuffix(".png"): sample.prompt for sample in found.samples} == {
        stem: f"caption {number}" for stem, number in stems.items()
    }
    assert not found.refused and not any(sample.references for sample in found.samples)
