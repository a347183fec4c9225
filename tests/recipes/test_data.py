"""The drawn datasets: the same on every computer, whole after a kill, and folders that every command takes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from recipes.mini import blip_language, flux2_score, prompts, score
from recipes.mini.data import edits, scenes
from recipes.mini.data.captions import CAPTIONS
from recipes.mini.data.edits import EDITS, SLOW_SHAPES
from recipes.mini.data.folders import PART, Dataset, draw_into, draw_part, part_folders
from recipes.mini.data.scenes import SCENES
from recipes.mini.data.vae import VAE
from recipes.mini.flux2_language import sentence_words
from recipes.mini.pictures import words

from sdlab.dataset.tree import scan
from sdlab.errors import SdlabError
from sdlab.testing.scenes import BASE_SHAPES, COLOURS, NEW_SHAPES, read, wanted
from tests.recipes.plain import PLAIN

ROOT = Path(__file__).parents[2]
KINDS = (VAE, SCENES, EDITS, SLOW_SHAPES, CAPTIONS)
NUM = 24


def small(dataset: Dataset) -> Dataset:
    return replace(dataset, num=NUM)


def test_numbers() -> None:
    assert [(d.name, d.num) for d in KINDS[:3]] == [("vae", 6000), ("scenes", 20000), ("edits", 20000)]


@pytest.mark.parametrize("dataset", KINDS, ids=lambda d: d.name)
def test_a_picture_is_a_function_of_its_number(dataset: Dataset) -> None:
    for number in (0, 7, dataset.num - 1):
        one, again = dataset.make(number), dataset.make(number)
        assert one.picture.tobytes() == again.picture.tobytes() and one.caption == again.caption
    assert dataset.make(0).picture.tobytes() != dataset.make(1).picture.tobytes()


def test_pictures_are_what_they_were() -> None:
    """Changing what a number draws makes other datasets: raise Dataset.edition, then these."""
    assert [SCENES.make(n).caption for n in (0, 3)] == [
        "arrow, black, purple background",
        "(masterpiece), best quality, best composition, red moon, white background, small, plain, bottom",
    ]
    assert (
        EDITS.make(0).caption
        == "turn the poster into a nurse and make it yellow and change the background to blue"
    )
    assert CAPTIONS.make(0).caption == "a black star on an orange background"
    drawn = SCENES.make(0).picture
    assert drawn.getpixel((0, 0)) == COLOURS["purple"]
    seen = read(drawn)
    assert (seen.shape, seen.colour, seen.background) == ("arrow", "black", "purple")


@pytest.mark.parametrize("dataset", KINDS, ids=lambda d: d.name)
def test_every_file_is_used_and_none_refused(dataset: Dataset, tmp_path: Path) -> None:
    draw_part_of(tmp_path, small(dataset))
    found = scan(tmp_path)
    assert len(found.samples) == NUM and not found.refused and not found.notes
    assert found.num_files == len(found.samples) + len(found.companions)
    captioned = {sample.source for sample in found.samples}
    assert captioned == ({"folder"} if dataset is VAE else {"cap"})
    for sample in found.samples:
        with Image.open(sample.path) as picture:
            assert (picture.mode, picture.format) == ("RGB", "PNG")
            size = picture.size
        for path in sample.references:
            with Image.open(path) as reference:
                assert reference.size == size
    with_references = sum(bool(sample.references) for sample in found.samples)
    assert 0 < with_references < NUM if dataset in (EDITS, SLOW_SHAPES) else with_references == 0


def draw_part_of(folder: Path, dataset: Dataset) -> None:
    folder.mkdir(exist_ok=True)
    draw_part(folder, dataset, 0)


def in_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_captions_are_in_their_languages() -> None:
    sd, flux2 = {*prompts.language(), *words()}, {*sentence_words(), *words()}
    for number in range(300):
        assert in_words(scenes.make(number).caption or "") <= sd
        assert in_words(edits.caption_of(number)) <= flux2
    for number in range(40):
        assert in_words(CAPTIONS.make(number).caption or "") <= {*blip_language.WORDS}


def test_pictures_show_what_captions_say() -> None:
    right = []
    for number in range(60):
        made = scenes.make(number)
        asked, seen = wanted(made.caption or ""), read(made.picture)
        if asked.shape in BASE_SHAPES:
            right.append((asked.shape, asked.background) == (seen.shape, seen.background))
    assert len(right) > 40 and sum(right) >= 0.95 * len(right)


def test_the_new_things_are_never_shown_nor_named() -> None:
    for number in range(2000):
        assert scenes.scene_of(number).shape not in NEW_SHAPES
        before, after = edits.pair_of(number)
        assert not {after.shape, before and before.shape} & {*NEW_SHAPES}
    for number in range(300):
        assert not in_words(scenes.make(number).caption or "") & {*NEW_SHAPES}
        assert not in_words(edits.caption_of(number)) & {*NEW_SHAPES}


def test_shares() -> None:
    """A tenth of scenes/ are named outlines; half of edits/ are edits, and the slow shapes come twice as often."""
    named = sum(scenes.scene_of(n).shape not in BASE_SHAPES for n in range(2000)) / 2000
    assert 0.08 < named < 0.12
    pairs = [edits.pair_of(n) for n in range(3000)]
    assert 0.47 < sum(before is not None for before, _ in pairs) / 3000 < 0.53
    often = Counter(after.shape for before, after in pairs if before is None)
    assert 1.6 < slow_to_quick(often) < 2.4


def test_shares_of_the_second_part() -> None:
    """Few edits, the slow shapes four times as often, and the same named outlines."""
    pairs = [edits.pair_of(n, edits.FINISHING) for n in range(3000)]
    assert 0.13 < sum(before is not None for before, _ in pairs) / 3000 < 0.17
    assert 3.3 < slow_to_quick(Counter(after.shape for before, after in pairs if before is None)) < 4.7
    assert {after.shape for _, after in pairs} <= {*BASE_SHAPES, *edits.named()}


def slow_to_quick(often: Counter[str]) -> float:
    """How much oftener the slow shapes come than the other known ones."""
    quick = [s for s in BASE_SHAPES if s not in edits.SLOW]
    slow = sum(often[s] for s in edits.SLOW) / len(edits.SLOW)
    return slow / (sum(often[s] for s in quick) / len(quick))


def test_prompts_of_the_score_have_seeds_of_their_own() -> None:
    """Scenes and phrasings are drawn from them; a plain prompt such as "red star, blue background" may come twice."""
    assert not {score.SEED, flux2_score.SEED} & {dataset.seed for dataset in KINDS}


def test_drawing_goes_on_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    code = (
        "from pathlib import Path; from dataclasses import replace; from recipes.mini.data.folders import *; "
        "from tests.recipes.plain import PLAIN, slow_picture\n"
        "if __name__ == '__main__':\n"
        f"    for num in draw_into(Path({str(folder)!r}), replace(PLAIN, make=slow_picture)): print(num, flush=True)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": ""},
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline() != f"{PART}\n":
        assert process.poll() is None
    time.sleep(0.2)
    process.kill()
    process.stdout.read()  # to its end: until the last worker has let go of it
    process.wait()
    process.stdout.close()
    whole = part_folders(folder)
    assert 1 <= len(whole) < 3 and all(len(list(part.iterdir())) == 2 * PART for part in whole)
    before = {path: path.stat().st_mtime_ns for part in whole for path in part.iterdir()}
    counts = list(draw_into(folder, PLAIN))
    assert (counts[0], counts[-1]) == (PART * len(whole), PLAIN.num)
    assert len(part_folders(folder)) == PLAIN.num_parts and len(scan(folder).samples) == PLAIN.num
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not list(folder.glob(".drawing-*"))
    assert list(draw_into(folder, PLAIN)) == [PLAIN.num]


def test_a_folder_of_other_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.png").touch()
    with pytest.raises(SdlabError, match="holds other files"):
        next(draw_into(tmp_path / "a", PLAIN))
    next(draw_into(tmp_path / "b", PLAIN))
    with pytest.raises(SdlabError, match="was drawn as"):
        next(draw_into(tmp_path / "b", replace(PLAIN, seed=2)))
