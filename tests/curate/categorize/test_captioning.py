"""The model is asked once for each content, whatever happens in between; nothing it says depends on its company."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdlab.curate.categorize import captioning
from sdlab.curate.categorize.captioning import Captioned, Said, Store, caption_pictures, faults_of
from sdlab.dataset.cache import content_hashes
from sdlab.models import blip
from sdlab.models.blip import Speaker
from sdlab.models.captioner import Captioner, resolve_captioner
from tests import factories
from tests.models.helpers import copied

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def captioner(tiny_blip_folder: Path) -> Captioner:
    return resolve_captioner(str(tiny_blip_folder))


class Watch:
    """Counts what the model is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.num_opened = 0
        self.fail_at = -1  # the batch at which the run is killed

    @property
    def num_asked(self) -> int:
        return sum(self.batches)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    seen = Watch()
    captions, load = Speaker.captions, Speaker.__init__

    def counted(self: Speaker, pixels_B3HW: torch.Tensor) -> Any:
        if len(seen.batches) == seen.fail_at:
            raise KeyboardInterrupt
        seen.batches.append(len(pixels_B3HW))
        return captions(self, pixels_B3HW)

    def loaded(self: Speaker, *args: Any) -> None:
        seen.num_opened += 1
        load(self, *args)

    monkeypatch.setattr(Speaker, "captions", counted)
    monkeypatch.setattr(Speaker, "__init__", loaded)
    yield seen


@pytest.fixture
def images(pictures: Callable[..., Path]) -> list[str]:
    """Ten pictures of ten colours."""
    names = {f"heap/{i}.{'jpg' if i % 2 else 'png'}": (40 + 9 * i, 50 + 5 * i) for i in range(10)}
    root = pictures(names)
    return [str(root / name) for name in names]


@pytest.fixture
def ask(captioner: Captioner, tmp_path: Path) -> Callable[..., Captioned]:
    def call(paths: list[str], **settings: Any) -> Captioned:
        defaults = {
            "captioner": captioner, "folder": tmp_path / "cache", "batch": 4, "num_workers": 2, "device": "cpu",
            "dtype": None, "background": WHITE, "max_pixels": 64_000_000,
        }  # fmt: skip
        return caption_pictures(paths, **{**defaults, **settings})

    return call


def test_the_second_run_asks_nothing_and_opens_no_model(
    ask: Callable[..., Captioned], images: list[str], watch: Watch
) -> None:
    first = ask(images)
    assert sorted(first.captions) == sorted(first.hashes) == sorted(images) and not first.faults
    assert (first.num_asked, watch.batches, watch.num_opened) == (10, [4, 4, 2], 1)
    second = ask(images)
    assert (second.captions, second.num_asked) == (first.captions, 0)
    assert (watch.num_asked, watch.num_opened) == (10, 1)


def test_captions_depend_on_the_picture_alone(
    ask: Callable[..., Captioned], images: list[str], tmp_path: Path
) -> None:
    first = ask(images).captions
    assert len({caption.text for caption in first.values()}) > 4
    others = {"batch": 1, "num_workers": 0}, {"batch": 32, "num_workers": 3}
    for number, settings in enumerate(others):
        assert ask(images[::-1], folder=tmp_path / str(number), **settings).captions == first


def test_copies_are_asked_for_once(
    ask: Callable[..., Captioned], images: list[str], tmp_path: Path, watch: Watch
) -> None:
    twin = str(shutil.copy(images[3], tmp_path / "twin.jpg"))
    done: list[float] = []
    both = ask([twin, *images[:4]], advance=done.append)
    assert (both.num_asked, watch.num_asked) == (4, 4)
    assert both.captions[twin] == both.captions[images[3]]
    assert done == [0, 5]
    renamed = str(Path(images[3]).rename(tmp_path / "other name.jpg"))
    assert ask([renamed, twin]).num_asked == 0


def test_a_changed_picture_is_asked_for_again(
    ask: Callable[..., Captioned], images: list[str], watch: Watch
) -> None:
    ask(images)
    Image.new("RGB", (30, 60), "purple").save(images[2])
    assert ask(images).num_asked == 1 and watch.num_asked == 11


def test_after_a_kill_only_the_missing_are_asked(
    ask: Callable[..., Captioned], images: list[str], watch: Watch, tmp_path: Path
) -> None:
    watch.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        ask(images)
    watch.fail_at = -1
    rest = ask(images)
    assert (rest.num_asked, watch.batches) == (2, [4, 4, 2])
    assert rest.captions == ask(images, folder=tmp_path / "fresh").captions


def test_a_torn_line_is_passed_over_and_asked_for_again(
    ask: Callable[..., Captioned], images: list[str], tmp_path: Path
) -> None:
    first = ask(images)
    (path,) = (tmp_path / "cache" / "captions").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    torn = ask(images)
    assert (torn.num_asked, torn.captions) == (1, first.captions)
    assert ask(images).num_asked == 0
    spoiled = b'{"sha256": 3}\n[[\n\xff\xfe\n{"sha256":"a","caption":"b","confidence":NaN,"pixels":1}\n'
    path.write_bytes(spoiled + whole)
    assert ask(images).num_asked == 0
    assert set(Store(path, Said).rows) == set(first.hashes.values())


def test_stop_keeps_what_was_said(ask: Callable[..., Captioned], images: list[str], watch: Watch) -> None:
    stopped = ask(images, stop=lambda: True)
    assert len(stopped.captions) == stopped.num_asked == 4 and not stopped.faults
    assert ask(images).num_asked == 6


def test_what_still_waits_when_a_run_is_stopped_is_not_looked_at() -> None:
    looked: list[str] = []
    go_on, before = threading.Event(), set(threading.enumerate())

    def work(path: str) -> int:
        if int(path) >= 4:
            assert go_on.wait(20)
        looked.append(path)
        return 0

    batches = captioning._in_batches(work, [("", str(number)) for number in range(40)], 4, 1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert len(looked) <= 5


def test_bad_pictures_have_a_reason_and_open_no_model(
    ask: Callable[..., Captioned], images: list[str], tmp_path: Path, watch: Watch
) -> None:
    bad = {"empty.png": b"", "text.jpg": b"hello there", "cut.jpg": Path(images[1]).read_bytes()[:-200]}
    paths = [str(tmp_path / name) for name in bad]
    for path, data in zip(paths, bad.values(), strict=True):
        Path(path).write_bytes(data)
    gone = str(tmp_path / "gone.png")
    alone = ask([*paths, gone])
    assert sorted(alone.faults) == sorted([*paths, gone]) and not alone.captions
    assert watch.num_opened == 0
    done: list[float] = []
    mixed = ask([*paths, gone, *images], advance=done.append)
    assert mixed.faults == alone.faults and sorted(mixed.captions) == sorted(images)
    assert done[-1] == 14 and done == sorted(done)


def test_other_settings_are_other_questions(
    ask: Callable[..., Captioned],
    images: list[str],
    tiny_blip_folder: Path,
    tmp_path: Path,
) -> None:
    ask(images)
    assert ask(images, background=(0, 0, 0)).num_asked == 10
    assert ask(images, dtype="bf16").num_asked == 10
    other = factories.tiny_blip(tmp_path / "tiny-blip", seed=1)
    assert ask(images, captioner=resolve_captioner(str(other))).num_asked == 10
    moved = copied(tiny_blip_folder, tmp_path / "moved" / "tiny-blip")
    assert ask(images, captioner=resolve_captioner(str(moved))).num_asked == 0
    assert ask(images).num_asked == 0


def test_a_lower_limit_refuses_what_was_captioned_before(
    ask: Callable[..., Captioned], images: list[str], captioner: Captioner, tmp_path: Path
) -> None:
    ask(images)
    limited = ask(images, max_pixels=40 * 50)
    assert list(limited.captions) == [images[0]]
    assert all("over the 0.002 of --max-pixels" in reason for reason in limited.faults.values())


def test_the_model_is_gone_after_the_run(
    ask: Callable[..., Captioned], images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speakers: list[Speaker] = []
    load = blip.Speaker.__init__
    monkeypatch.setattr(
        Speaker, "__init__", lambda self, *args: (speakers.append(self), load(self, *args))[1]
    )
    ask(images, stop=lambda: True)
    assert len(speakers) == 1 and speakers[0]._model is None


def test_pictures_without_a_question_are_checked_once(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(images[0]).read_bytes()[:-30])
    twin = str(shutil.copy(bad, tmp_path / "twin.png"))
    paths = [*images, str(bad), twin]
    hashes, _ = content_hashes(tmp_path / "cache", paths, 0, lambda *_: None)
    looked: list[str] = []
    real = captioning.open_picture
    monkeypatch.setattr(
        captioning, "open_picture", lambda path, **rest: (looked.append(path), real(path, **rest))[1]
    )

    def check(**settings: Any) -> dict[str, str]:
        defaults = {"hashes": hashes, "folder": tmp_path / "cache", "num_workers": 2, "max_pixels": 10**6}
        return faults_of(paths, **{**defaults, **settings})

    done: list[float] = []
    found = check(advance=done.append)
    assert sorted(found) == sorted([str(bad), twin]) and "damaged PNG" in found[twin]
    assert (len(looked), done[-1]) == (11, 12)
    looked.clear()
    assert check() == found and looked == [str(bad)]
    assert str(images[9]) in check(max_pixels=9000)
