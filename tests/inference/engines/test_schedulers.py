"""Schedulers by the names people type, and by those that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.inference.engines import schedulers
from sdlab.inference.engines.denoise import Conditions, denoise
from sdlab.inference.engines.sd import Sampler
from sdlab.inference.spec import Spec
from tests.inference.engines.making import SHOTS, sampler_of


def test_the_page_lists_every_scheduler_and_what_others_call_it() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pictures.md").read_text(encoding="utf-8")
    table = page.split("## Schedulers\n\n")[1].split("\n\n")[0]
    rows = [[cell.split(", ") for cell in row.strip("| ").split(" | ")] for row in table.splitlines()[2:]]
    listed = {name.strip("`"): word for names, words in rows for name, word in zip(names, words, strict=True)}
    assert listed == {name: named.sampler for name, named in schedulers.SCHEDULERS.items()}


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("", ""),
        ("DDIM", "ddim"),
        ("Euler a", "euler a"),
        ("euler_a", "euler a"),
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde", "dpm++ 2m sde"),
        ("PLMS", "pndm"),
        ("EulerAncestralDiscreteScheduler", "euler a"),
        ("UniPCMultistepScheduler", "unipc"),
        ("dpmpp_2m", "dpm++ 2m"),
        ("dpmpp_2m_karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde_gpu", "dpm++ 2m sde"),
        ("dpmpp_3m_sde", "dpm++ 3m sde"),
        ("dpmpp_sde", "dpm++ sde"),
        ("DPM++ SDE Karras", "dpm++ sde karras"),
        ("k_dpmpp_2m_ka", "dpm++ 2m karras"),
        ("k_euler_a", "euler a"),
        ("k_euler", "euler"),
        ("euler_ancestral", "euler a"),
        ("uni_pc", "unipc"),
        ("uni_pc_bh2", "unipc"),
        ("dpm_2", "dpm2"),
        ("dpm_2_ancestral", "dpm2 a"),
        ("DPM2 a Karras", "dpm2 a karras"),
        ("DPM++2M", "dpm++ 2m"),
        ("deis", "deis"),
        ("ddpm", "ddpm"),
        ("TCD", "tcd"),
        ("Heun", "heun"),
        ("LCM", "lcm"),
    ],
)
def test_scheduler_names_people_use(typed: str, name: str) -> None:
    assert schedulers.canonical(typed) == name


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(SdlabError, match="did you mean 'dpm\\+\\+ 2m'") as caught:
        schedulers.canonical("dpm++ 2n")
    assert "unipc" in str(caught.value)


@pytest.mark.parametrize("name", ["", *schedulers.SCHEDULERS])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_work_or_are_refused_beforehand(sampler: Sampler, name: str, steps: int) -> None:
    try:
        schedulers.set_steps(schedulers.fresh(name, sampler.pipeline.scheduler), steps, name=name)
    except SdlabError as reason:
        assert name in str(reason)
        return
    assert sampler.sample(SHOTS[:1], Spec(steps, 5.0, 64, 48, scheduler=name))[0].image is not None


def test_too_many_steps_for_a_scheduler_are_refused_beforehand(sampler: Sampler) -> None:
    with pytest.raises(SdlabError, match="'lcm' cannot take 200 steps"):
        schedulers.set_steps(schedulers.fresh("lcm", sampler.pipeline.scheduler), 200, name="lcm")


def test_schedulers_keep_the_models_noise_schedule_and_prediction(tiny_sd: Any) -> None:
    velocity = sampler_of(tiny_sd("velocity", prediction_type="v_prediction")).pipeline.scheduler
    for name in ["", *schedulers.SCHEDULERS]:
        config = schedulers.fresh(name, velocity).config
        assert config.prediction_type == "v_prediction" and config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpm++ 2m karras", ("DPM++ 2M Karras", "Karras")),
        ("euler a", ("Euler a", "")),
        ("", ("DDIM", "")),
        ("pndm", ("PLMS", "")),
    ],
)
def test_sampler_names_of_other_programs(sampler: Sampler, name: str, expected: tuple[str, str]) -> None:
    made = schedulers.fresh(name, sampler.pipeline.scheduler)
    assert schedulers.sampler_name(made, name) == expected
    assert schedulers.sampler_name(made, "") == expected  # also told from the scheduler itself


COMFYUI = {
    "euler",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "deis",
    "ddim",
    "ddpm",
    "lcm",
}
A1111_ALONE = {
    "Euler a",
    "DPM2",
    "DPM2 a",
    "UniPC",
    "PLMS",
    "TCD",
}  # ComfyUI calls them otherwise or has none


@pytest.mark.parametrize("name", list(schedulers.SCHEDULERS))
def test_sampler_names_are_those_that_a1111_and_comfyui_read(sampler: Sampler, name: str) -> None:
    made = schedulers.fresh(name, sampler.pipeline.scheduler)
    called, kind = schedulers.sampler_name(made, name)
    plain = called.removesuffix(" Karras")
    assert (kind == "Karras") == (called != plain) == (name.endswith(" karras"))
    assert plain in A1111_ALONE or plain.lower().replace("++", "pp").replace(" ", "_") in COMFYUI
    assert schedulers.canonical(called) == name  # and we read them ourselves


@pytest.mark.parametrize("name", list(schedulers.SCHEDULERS))
def test_names_that_were_typed_stay_what_they_are(name: str) -> None:
    for written in (name, name.upper(), name.replace(" ", "_"), name.replace("++", "pp").replace(" ", "-")):
        assert schedulers.canonical(written) == name


def test_planning_again_starts_anew(sampler: Sampler) -> None:
    first = schedulers.planned("dpm++ 2m", sampler.pipeline.scheduler, 4, torch.device("cpu"))
    other = schedulers.planned("dpm++ 2m", sampler.pipeline.scheduler, 7, torch.device("cpu"))
    assert len(first.timesteps) == 4 and len(other.timesteps) == 7
    assert sampler.pipeline.scheduler.num_inference_steps is None


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999, 1000])
@pytest.mark.parametrize("name", list(schedulers.SCHEDULERS))
def test_steps_that_are_planned_can_be_made_from_anywhere(sampler: Sampler, name: str, steps: int) -> None:
    own = sampler.pipeline.scheduler
    latents, nothing = torch.randn(1, 4, 2, 2), Conditions(torch.zeros(1, 1, 1), None, 1.0)
    for made in {1, (steps + 1) // 2, steps} if steps < 100 else {steps}:
        try:
            scheduler = schedulers.planned(name, own, steps, torch.device("cpu"))
        except SdlabError as reason:
            assert f"cannot take {steps} steps" in str(reason) and steps in (1, 999, 1000)
            return
        start, timesteps = schedulers.started(scheduler, latents, latents.flip(-1), steps, made)
        drawn = [torch.Generator().manual_seed(1)]
        done = denoise(lambda x, t, **_: (x * 0.1,), scheduler, timesteps, start, nothing, generators=drawn)
        assert done.isfinite().all()
