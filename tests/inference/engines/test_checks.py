"""What is not a picture is called a fault."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sdlab.errors import OutOfResources
from sdlab.inference.engines import checks
from sdlab.inference.spec import Spec


@pytest.mark.parametrize("colour", ["black", "white", "grey", "#804020"])
def test_picture_of_one_colour_is_blank(colour: str) -> None:
    made = checks.of_image(Image.new("RGB", (32, 32), colour))
    assert made.image is None and "blank" in made.fault


def test_nearly_one_colour_is_blank_and_a_faint_picture_is_not() -> None:
    image = Image.new("RGB", (32, 32), (100, 100, 100))
    image.putpixel((3, 3), (100, 103, 100))
    assert not checks.is_blank(image)
    image.putpixel((3, 3), (102, 98, 101))
    assert checks.is_blank(image)


def test_what_the_safety_checker_blacked_out_is_not_called_blank() -> None:
    made = checks.of_image(Image.new("RGB", (32, 32)), safety="flagged")
    assert made.image is not None and made.safety == "flagged" and not made.fault


@pytest.mark.parametrize(
    ("dtype", "overflows", "ran", "retried"),
    [
        (torch.float32, True, [torch.float32], False),
        (torch.bfloat16, False, [torch.bfloat16], False),
        (torch.bfloat16, True, [torch.bfloat16, torch.float32], True),
        (torch.float16, True, [torch.float16, torch.float32], True),
    ],
)
def test_vae_gets_a_second_go_in_float32(
    dtype: torch.dtype, overflows: bool, ran: list[torch.dtype], retried: bool
) -> None:
    vae, seen = torch.nn.Linear(2, 2).to(dtype), []

    def work(number: torch.dtype) -> torch.Tensor:
        assert vae.weight.dtype == number
        seen.append(number)
        return torch.tensor([float("inf") if overflows and number != torch.float32 else 1.0])

    made, again = checks.with_range(vae, work)
    assert seen == ran and again == retried and vae.weight.dtype == dtype and bool(made.isfinite().all())


@pytest.mark.parametrize(
    "said",
    ["DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory (MPS allocated: 17.9 GB)"],
)
def test_too_little_memory_is_told_in_words(said: str) -> None:
    with (
        pytest.raises(OutOfResources, match="not enough memory for 4 of 64x48"),
        checks.memory_in_words(4, Spec(1, 1, 64, 48)),
    ):
        raise RuntimeError(said)
