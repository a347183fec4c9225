"""The second pass: the picture, enlarged, noised and made anew, by the same shot's seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.inference.engines.checks import Made
from sdlab.inference.engines.hires import Pass, in_passes
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.spec import Hires, Spec
from tests.inference.engines.making import SHOTS, any_sampler_of, pixels

SPEC = Spec(3, 5.0, 64, 48)
TWICE = replace(SPEC, hires=Hires(128, 96, 4, 0.5))


@pytest.fixture(scope="module")
def klein(tiny_klein_folder: Path) -> Any:
    return any_sampler_of(tiny_klein_folder, prompts=["best, red", "best, blue", "best, green", "ugly"])


@pytest.fixture(params=["sd", "klein"])
def either(request: pytest.FixtureRequest, sampler: Sampler, klein: Any) -> Any:
    return sampler if request.param == "sd" else klein


def test_second_pass_is_a_picture_made_from_the_first_one_enlarged(either: Any) -> None:
    first = pixels(either, SHOTS[:1], SPEC)[0]
    grown = Image.fromarray(first.astype(np.uint8)).resize((128, 96), Image.Resampling.LANCZOS)
    by_hand = pixels(either, SHOTS[:1], Spec(4, 5.0, 128, 96, strength=0.5), init=grown)[0]
    made = pixels(either, SHOTS[:1], TWICE)[0]
    assert made.shape == (96, 128, 3) and (made == by_hand).all()


@pytest.mark.parametrize("name", ["", "euler a", "heun"])
def test_who_shares_a_batch_changes_nothing(sampler: Sampler, name: str) -> None:
    spec = replace(TWICE, scheduler=name)
    alone = [pixels(sampler, [shot], spec)[0] for shot in SHOTS[:3]]
    again = [pixels(sampler, [shot], spec)[0] for shot in SHOTS[2::-1]][::-1]
    together = pixels(sampler, SHOTS[:3], spec)
    for a, b, c in zip(alone, again, together, strict=True):
        assert (a == b).all() and np.abs(a - c).max() <= 1


def test_strength_says_how_much_the_second_pass_changes(sampler: Sampler) -> None:
    kept = pixels(sampler, SHOTS[:1], replace(SPEC, hires=Hires(128, 96, 8, 0.0)))[0]
    away = [
        np.abs(pixels(sampler, SHOTS[:1], replace(SPEC, hires=Hires(128, 96, 8, strength)))[0] - kept).mean()
        for strength in (0.01, 0.4, 1.0)
    ]
    assert 0 < away[0] < away[1] < away[2]


def test_progress_runs_once_over_both_passes(either: Any) -> None:
    seen: list[float] = []
    either.sample(SHOTS[:1], TWICE, on_step=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and len(seen) == 3 + 2 and seen[2] == 0.5 and seen[-1] == 1


def test_unfinite_numbers_of_the_first_pass_are_a_fault(fresh_sampler: Sampler) -> None:
    fresh_sampler.pipeline.unet.conv_out.weight.data.fill_(float("nan"))
    made = fresh_sampler.sample(SHOTS[:2], TWICE)
    assert [one.image for one in made] == [None, None] and "denoiser" in made[0].fault


def test_safety_checker_looks_at_the_finished_picture_alone(
    fresh_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def passes(image: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, list[bool]]:
        seen.append(tuple(image.shape))
        return image, [False]

    monkeypatch.setattr(fresh_sampler.pipeline, "run_safety_checker", passes)
    assert fresh_sampler.sample(SHOTS[:1], TWICE)[0].safety == "passed"
    assert seen == [(1, 3, 96, 128)]


def test_what_came_to_nothing_leaves_the_others_in_their_places() -> None:
    images = {shot.seed: Image.new("RGB", (64, 48), (shot.seed, 0, 0)) for shot in SHOTS}
    calls: list[Pass] = []

    def make(one: Pass) -> list[Made]:
        calls.append(one)
        if len(calls) == 1:
            return [Made(None, fault="bad") if s.seed == 12 else Made(images[s.seed]) for s in one.shots]
        return [
            Made(start, vae_float32=shot.seed == 13)
            for shot, start in zip(one.shots, one.starts, strict=True)
        ]

    made = in_passes(make, Pass(SHOTS, TWICE))
    assert [one.fault for one in made] == ["", "bad", "", ""]
    assert [one.image.getpixel((0, 0))[0] for one in made if one.image] == [11, 13, 14]  # type: ignore[index]
    assert [one.vae_float32 for one in made] == [False, False, True, False]
    assert [shot.seed for shot in calls[1].shots] == [11, 13, 14] and calls[1].spec.hires is None
    assert not calls[0].last and calls[1].last and calls[1].spec.strength == 0.5
