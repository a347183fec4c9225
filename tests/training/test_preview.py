"""What a run's previews show: the prompts as pictures, or as edits of the dataset's references."""

from __future__ import annotations

import pytest
from PIL import Image

from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Pixels
from sdlab.dataset.tree import scan
from sdlab.training.preview import shots_of


@pytest.fixture
def items(pictures):
    """A plain picture and an edit of a wide one, whose reference is transparent in its left half."""
    root = pictures({"dog/a.png": (64, 64), "dog/b.png": (48, 96)})
    reference = Image.new("RGBA", (80, 40), (0, 0, 255, 255))
    reference.paste((0, 0, 0, 0), (0, 0, 40, 40))
    reference.save(root / "dog" / "b.ref.png")
    (root / "dog" / "b.cap").write_text("make it blue")
    plain, edit = scan(root).samples
    return [Item(plain, (64, 64)), Item(edit, (48, 96), reference_sizes=((48, 96),))]


def test_a_prompt_is_drawn_as_the_dataset_has_it(items):
    shots = shots_of(["dog", "make it blue", "a cat"], items, image_size=64, pixels=Pixels())
    assert [(shot.size_px, len(shot.references)) for shot in shots] == [
        ((64, 64), 0),
        ((48, 96), 1),
        ((64, 64), 0),
    ]


def test_where_all_samples_are_edits_any_prompt_edits_the_first_one(items):
    (shot,) = shots_of(["make it red"], items[1:], image_size=64, pixels=Pixels())
    assert shot.size_px == (48, 96) and len(shot.references) == 1


def test_a_reference_is_opened_as_training_sees_it(items):
    (shot,) = shots_of(["make it blue"], items, image_size=64, pixels=Pixels(background=(255, 0, 0)))
    (reference,) = shot.references
    assert reference.mode == "RGB" and reference.size == (192, 96)  # twice: pipelines refuse sides below 64
    assert reference.getpixel((10, 48)) == (255, 0, 0) and reference.getpixel((180, 48)) == (0, 0, 255)
