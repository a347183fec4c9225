"""The reader of scenes against pictures that it was not tuned on."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdlab.testing.scenes import (
    BASE_SHAPES,
    COLOURS,
    NEW_SHAPES,
    PREFIX,
    SILHOUETTES,
    STYLES,
    Scene,
    Wanted,
    draw,
    generator,
    prompt_of,
    random_scene,
    read,
    score,
    wanted,
)

SEED = 4242


def drawn(index: int) -> tuple[Scene, Image.Image]:
    """A scene of any shape, 96 to 256 pixels on a side, 2:3 to 3:2."""
    rng = generator(SEED, index)
    scene = random_scene(rng, shapes=tuple(SILHOUETTES))
    short = int(rng.integers(96, 257))
    size_px = (short, min(256, round(short * rng.uniform(1, 1.5))))
    return scene, draw(scene, size_px if rng.random() < 0.5 else size_px[::-1])


def worn(picture: Image.Image, index: int) -> Image.Image:
    """The picture with Gaussian noise and JPEG artefacts."""
    rng = generator(SEED, "worn", index)
    pixels = np.asarray(picture, np.float64)
    noisy = pixels + rng.normal(0, rng.uniform(0, 12), pixels.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
        out, "JPEG", quality=int(rng.integers(60, 91))
    )
    return Image.open(out)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[Scene, Image.Image]]:
    return [drawn(i) for i in range(400)]


def test_drawn_pictures_are_read_right_99_times_in_100(pictures: list[tuple[Scene, Image.Image]]) -> None:
    prompts = [prompt_of(scene) for scene, _ in pictures]
    assert score([picture for _, picture in pictures], prompts).all_three >= 0.99


def test_noise_and_jpeg_do_not_mislead_the_reader(pictures: list[tuple[Scene, Image.Image]]) -> None:
    prompts = [prompt_of(scene) for scene, _ in pictures]
    assert score([worn(picture, i) for i, (_, picture) in enumerate(pictures)], prompts).all_three >= 0.99


def test_noise_shows_nothing(pictures: list[tuple[Scene, Image.Image]]) -> None:
    prompts = [prompt_of(scene) for scene, _ in pictures]
    for cells in (8, 32, 128):
        noise = [generator(SEED, "noise", cells, i).integers(0, 256, (cells, cells, 3)) for i in range(100)]
        made = [Image.fromarray(n.astype(np.uint8)).resize((128, 128)) for n in noise]
        assert score(made, prompts[:100]).all_three <= 0.05
        assert sum(read(picture).shape is not None for picture in made) <= 5


def test_a_flat_picture_has_a_background_and_nothing_on_it() -> None:
    for name, rgb in COLOURS.items():
        seen = read(Image.new("RGB", (128, 128), rgb))
        assert (seen.shape, seen.colour, seen.background) == (None, None, name)


def test_a_wrong_shape_colour_or_background_does_not_score(pictures: list[tuple[Scene, Image.Image]]) -> None:
    names, colours = tuple(SILHOUETTES), tuple(COLOURS)
    some = pictures[:60]
    right = score([p for _, p in some], [prompt_of(s) for s, _ in some])
    assert right.all_three == 1.0
    shapes = [prompt_of(replace(s, shape=names[names.index(s.shape) - 1])) for s, _ in some]
    assert score([p for _, p in some], shapes).shape == 0
    swapped = [prompt_of(replace(s, colour=s.background, background=s.colour)) for s, _ in some]
    result = score([p for _, p in some], swapped)
    assert (result.colour, result.background) == (0, 0)
    others = [prompt_of(replace(s, background=colours[colours.index(s.background) - 1])) for s, _ in some]
    assert score([p for _, p in some], others).background == 0


def test_a_picture_is_read_in_ten_milliseconds(pictures: list[tuple[Scene, Image.Image]]) -> None:
    read(pictures[0][1])  # the silhouettes are prepared once
    start = time.process_time()
    for _, picture in pictures[:100]:
        read(picture)
    assert (time.process_time() - start) / 100 < 0.01


def test_the_same_seed_draws_the_same_picture_and_another_a_different_one() -> None:
    assert drawn(3)[0] == drawn(3)[0]
    assert drawn(3)[1].tobytes() == drawn(3)[1].tobytes()
    assert drawn(3)[0] != drawn(4)[0]


def test_pictures_have_the_size_asked_for_as_height_and_width() -> None:
    assert draw(Scene("star", "red", "blue"), (96, 144)).size == (144, 96)


def test_colour_and_background_always_differ() -> None:
    scenes = [random_scene(generator(SEED, "differ", i)) for i in range(300)]
    assert all(scene.colour != scene.background for scene in scenes)
    assert {scene.shape for scene in scenes} == set(BASE_SHAPES)
    assert not set(BASE_SHAPES) & set(NEW_SHAPES)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_what_a_prompt_asks_for_is_read_from_every_style(style: str, extras: bool, prefix: str) -> None:
    for i in range(40):
        scene = random_scene(generator(SEED, "prompt", i), shapes=tuple(SILHOUETTES))
        asked = wanted(prompt_of(scene, style, extras=extras, prefix=prefix))
        assert asked == Wanted(scene.shape, scene.colour, scene.background)


def test_prompts_read_as_the_folders_and_sentences_they_stand_for() -> None:
    scene = Scene("star", "orange", "blue", size=0.75, texture="striped")
    assert prompt_of(scene) == "orange star, blue background"
    assert prompt_of(scene, "split") == "star, orange, blue background"
    assert prompt_of(scene, "photo") == "a photo of an orange star on a blue background"
    assert (
        prompt_of(scene, "drawing", extras=True)
        == "a drawing of a large striped orange star on a blue background"
    )
    assert prompt_of(scene, "short", prefix=PREFIX) == PREFIX + "an orange star on blue"
    assert wanted("a photo of a dog") == Wanted(None, None, None)
