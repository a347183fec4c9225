"""Names of schedulers as people know them, and the diffusers classes behind them.

A scheduler is stateful, so every batch gets a fresh one, made from the model's own configuration: noise
schedule, prediction type and spacing stay the model's, only the way of stepping is chosen here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sdlab.errors import SdlabError
from sdlab.options import did_you_mean

KARRAS = {"use_karras_sigmas": True}
PLAIN = {"use_karras_sigmas": False}


@dataclass(frozen=True)
class Named:
    """A diffusers class with its settings, and what other programs call it."""

    class_name: str
    sampler: str  # as A1111, Civitai and ComfyUI read it
    settings: dict[str, Any] = field(default_factory=dict)


def _dpm(sampler: str, algorithm: str, sigmas: dict[str, Any], *, steps: str = "Multistep") -> Named:
    settings = {"algorithm_type": algorithm, "solver_order": 2, **sigmas}
    return Named(f"DPMSolver{steps}Scheduler", sampler, settings)


FLOW = "FlowMatchEulerDiscreteScheduler"  # FLUX.2's only one; other programs know it by these two words
SCHEDULERS: dict[str, Named] = {
    "ddim": Named("DDIMScheduler", "DDIM"),
    "ddpm": Named("DDPMScheduler", "DDPM"),
    "pndm": Named("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "euler": Named("EulerDiscreteScheduler", "Euler", PLAIN),
    "euler karras": Named("EulerDiscreteScheduler", "Euler Karras", KARRAS),
    "euler a": Named("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Named("HeunDiscreteScheduler", "Heun", PLAIN),
    "dpm++ 2m": _dpm("DPM++ 2M", "dpmsolver++", PLAIN),
    "dpm++ 2m karras": _dpm("DPM++ 2M Karras", "dpmsolver++", KARRAS),
    "dpm++ 2m sde": _dpm("DPM++ 2M SDE", "sde-dpmsolver++", PLAIN),
    "dpm++ 2m sde karras": _dpm("DPM++ 2M SDE Karras", "sde-dpmsolver++", KARRAS),
    "dpm++ sde": _dpm("DPM++ SDE", "sde-dpmsolver++", PLAIN, steps="Singlestep"),
    "dpm++ sde karras": _dpm("DPM++ SDE Karras", "sde-dpmsolver++", KARRAS, steps="Singlestep"),
    "unipc": Named("UniPCMultistepScheduler", "UniPC", PLAIN),
    "lcm": Named("LCMScheduler", "LCM"),
}
OTHER_SPELLINGS = {
    "plms": "pndm",
    "euler ancestral": "euler a",
    "uni pc": "unipc",
    **{named.class_name.lower(): name for name, named in reversed(SCHEDULERS.items())},
}
NAMES = ", ".join(SCHEDULERS)


def canonical(text: str) -> str:
    """The table's name for what a user typed: ``DPM++ 2M Karras``, ``dpmpp_2m_karras``; "" stays "".

    Raises SdlabError, with the nearest name and all names, for a scheduler that is not in the table.
    """
    words = " ".join(text.lower().replace("_", " ").replace("-", " ").split()).replace("dpmpp", "dpm++")
    name = OTHER_SPELLINGS.get(words, words)
    if name and name not in SCHEDULERS:
        near = did_you_mean(name, [*SCHEDULERS, *OTHER_SPELLINGS])
        raise SdlabError(
            f"unknown scheduler '{text}'{near}", where="--scheduler", next_step=f"Known: {NAMES}"
        )
    return name


def fresh(name: str, own: Any) -> Any:
    """A new scheduler with the model's configuration: the named one, or for "" the model's own kind."""
    import diffusers

    with quiet():
        if not name:
            return type(own).from_config(own.config)
        named = SCHEDULERS[name]
        return getattr(diffusers, named.class_name).from_config(own.config, **named.settings)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that diffusers' schedulers cause in numpy 2 by handing it tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning
        )
        yield


def set_steps(scheduler: Any, steps: int, *, name: str) -> None:
    """Let the scheduler plan `steps` steps, once, before anything costly.

    Raises SdlabError where it cannot (LCM knows 50 at most, some need two or more).
    """
    try:
        with quiet():
            scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as reason:
        said = " ".join(str(reason).split())
        raise SdlabError(
            f"the scheduler '{name or type(scheduler).__name__}' cannot take {steps} steps ({said})",
            where="--steps",
            next_step="Use other --steps or another --scheduler",
        ) from reason


def sampler_name(scheduler: Any, name: str) -> tuple[str, str]:
    """What A1111 calls it, (Sampler, Schedule type): ``("DPM++ 2M Karras", "Karras")``; type may be ""."""
    if type(scheduler).__name__ == FLOW:
        return "Euler", "Simple"
    if not name:
        karras = bool(scheduler.config.get("use_karras_sigmas", False))
        algorithm = scheduler.config.get("algorithm_type")
        for known in SCHEDULERS.values():
            same = known.class_name == type(scheduler).__name__
            same = same and known.settings.get("algorithm_type", algorithm) == algorithm
            if same and bool(known.settings.get("use_karras_sigmas", karras)) == karras:
                return known.sampler, "Karras" if karras else ""
        return type(scheduler).__name__.removesuffix("Scheduler"), ""
    sampler = SCHEDULERS[name].sampler
    return sampler, "Karras" if sampler.endswith("Karras") else ""
