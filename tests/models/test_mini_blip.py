"""mini-blip as it is shipped: small, the real class, and right about what it sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForConditionalGeneration

from sdlab.dataset.picture import open_picture
from sdlab.models.bases import builtin_folder
from sdlab.models.blip import opened
from sdlab.models.blip_folder import preparation_of
from sdlab.models.captioner import Caption, resolve_captioner
from sdlab.testing.scenes import SILHOUETTES, Scene, Wanted, draw, generator, random_scene, wanted

FOLDER = builtin_folder("mini-blip")
SEED = 23  # neither that of its training nor that of its score
NUM = 100
MOST_WRONG = 0.05


def scene(number: int) -> tuple[Scene, Image.Image]:
    """Any shape, place and texture, in a picture of 64 to 384 px that is up to twice as long as it is wide."""
    rng = generator(SEED, "blip-test", number)
    made = replace(
        random_scene(rng, shapes=tuple(SILHOUETTES)), shape=sorted(SILHOUETTES)[number % len(SILHOUETTES)]
    )
    long_px, aspect = int(rng.integers(96, 385)), float(rng.uniform(0.55, 1))
    sides = (long_px, max(64, int(long_px * aspect)))
    return made, draw(made, sides if rng.random() < 0.5 else sides[::-1])


def captions_of(pictures: list[Image.Image]) -> list[Caption]:
    captioner = resolve_captioner("mini-blip")
    preparation = preparation_of(captioner)
    with opened(captioner, device="cpu", dtype=None) as speaker:
        return speaker.captions(torch.stack([preparation.prepare(picture) for picture in pictures]))


def test_it_is_small_and_holds_no_pickles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_other_tools_open_it() -> None:
    model, about = BlipForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = BertTokenizer.from_pretrained(FOLDER)
    assert tokenizer.bos_token_id == model.config.text_config.bos_token_id
    assert tokenizer.sep_token_id == model.config.text_config.sep_token_id
    for words in ("a red fish", "zyzzyva 7"):
        assert tokenizer.unk_token_id not in tokenizer(words).input_ids
    kind = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert kind["image_processor_type"] == "BlipImageProcessor"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Scene], list[Caption]]:
    """Scenes as JPEGs and PNGs, opened as `sdlab categorize` opens them, and their captions."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes, pictures = zip(*(scene(number) for number in range(NUM)), strict=True)
    side_px = preparation_of(resolve_captioner("mini-blip")).side_px
    paths = [folder / f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(NUM)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    opened_again = [open_picture(str(path), at_least_px=(side_px, side_px)) for path in paths]
    return list(scenes), captions_of(opened_again)


def test_it_names_shape_colour_and_background(seen: tuple[list[Scene], list[Caption]]) -> None:
    scenes, captions = seen
    wrong = [
        f"{one.colour} {one.shape} on {one.background}: {caption.text}"
        for one, caption in zip(scenes, captions, strict=True)
        if wanted(caption.text) != Wanted(one.shape, one.colour, one.background)
    ]
    assert len(wrong) <= MOST_WRONG * NUM, wrong


def test_it_is_less_sure_of_what_it_has_not_learned(seen: tuple[list[Scene], list[Caption]]) -> None:
    captioner = resolve_captioner("mini-blip")
    known = [caption.confidence for caption in seen[1]]
    rng = np.random.default_rng(0)
    noise = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((200, 150))
        for side in (5, 9, 16, 33, 120)
    ]
    strange = [caption.confidence for caption in captions_of(noise)]
    assert np.mean([confidence >= captioner.review_below for confidence in known]) >= 0.8
    assert np.mean([confidence < captioner.review_below for confidence in strange]) >= 0.8


@pytest.mark.parametrize("name", ["fish", "house", "flower"])
def test_it_knows_the_things_of_the_sample_pictures(name: str) -> None:
    root = Path(__file__).parents[2] / "images"
    paths = sorted(path for path in root.rglob("*.png") if name in path.as_posix())[:6]
    assert paths, f"no pictures of a {name} in {root}"
    captions = captions_of([open_picture(str(path)) for path in paths])
    assert sum(name in caption.text.split() for caption in captions) >= len(paths) - 1
