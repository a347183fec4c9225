"""Names of schedulers as people know them, and the diffusers classes behind them.

A scheduler is stateful, so every batch gets a fresh one, made from the model's own configuration: noise
schedule, prediction type and spacing stay the model's, only the way of stepping is chosen here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.options import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KARRAS = {"use_karras_sigmas": True}
PLAIN = {"use_karras_sigmas": False}


@dataclass(frozen=True)
class Named:
    """A diffusers class with its settings, and what other programs call it."""

    class_name: str
    sampler: str  # as A1111, Civitai and ComfyUI read it
    settings: dict[str, Any] = field(default_factory=dict)


def _dpm(sampler: str, algorithm: str, *, order: int = 2, steps: str = "Multistep") -> Named:
    settings = {"algorithm_type": algorithm, "solver_order": order}
    return Named(f"DPMSolver{steps}Scheduler", sampler, settings)


FLOW = "FlowMatchEulerDiscreteScheduler"  # FLUX.2's only one; other programs know it by these two words
_ALONE: dict[str, Named] = {
    "ddim": Named("DDIMScheduler", "DDIM"),
    "ddpm": Named("DDPMScheduler", "DDPM"),
    "pndm": Named("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "euler a": Named("EulerAncestralDiscreteScheduler", "Euler a"),
    "lcm": Named("LCMScheduler", "LCM"),
    "tcd": Named("TCDScheduler", "TCD"),
}
_WITH_KARRAS: dict[str, Named] = {
    "euler": Named("EulerDiscreteScheduler", "Euler"),
    "heun": Named("HeunDiscreteScheduler", "Heun"),
    "dpm2": Named("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2 a": Named("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpm++ 2m": _dpm("DPM++ 2M", "dpmsolver++"),
    "dpm++ 2m sde": _dpm("DPM++ 2M SDE", "sde-dpmsolver++"),
    "dpm++ 3m sde": _dpm("DPM++ 3M SDE", "sde-dpmsolver++", order=3),
    "dpm++ sde": _dpm("DPM++ SDE", "sde-dpmsolver++", steps="Singlestep"),
    "deis": Named("DEISMultistepScheduler", "DEIS", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": Named("UniPCMultistepScheduler", "UniPC", {"solver_type": "bh2"}),
}


def _both(name: str, named: Named) -> dict[str, Named]:
    """With the model's own spacing of noise levels, and with that of Karras et al. 2022."""
    return {
        name: replace(named, settings={**named.settings, **PLAIN}),
        f"{name} karras": Named(named.class_name, f"{named.sampler} Karras", {**named.settings, **KARRAS}),
    }


SCHEDULERS: dict[str, Named] = _ALONE | {
    key: named for name, plain in _WITH_KARRAS.items() for key, named in _both(name, plain).items()
}
OTHER_SPELLINGS = {
    "plms": "pndm",
    "dpm++ 2m sde gpu": "dpm++ 2m sde",
    **{named.class_name.lower(): name for name, named in reversed(SCHEDULERS.items())},
}
NAMES = ", ".join(SCHEDULERS)


def canonical(text: str) -> str:
    """The table's name for what a user typed: ``DPM++ 2M Karras``, ``dpmpp_2m_karras``; "" stays "".

    Raises SdlabError, with the nearest name and all names, for a scheduler that is not in the table.
    """
    words = _words(text)
    name = OTHER_SPELLINGS.get(words, words)
    if name and name not in SCHEDULERS:
        near = did_you_mean(name, [*SCHEDULERS, *OTHER_SPELLINGS])
        raise SdlabError(
            f"unknown scheduler '{text}'{near}", where="--scheduler", next_step=f"Known: {NAMES}"
        )
    return name


def _words(text: str) -> str:
    """A1111's, k-diffusion's and ComfyUI's ways of writing the same words, made one."""
    words = " ".join(re.sub("[_-]", " ", text.lower()).split())
    words = re.sub(r"dpm(pp|\+\+) ?", "dpm++ ", words).removeprefix("k ").removeprefix("sample ")
    words = words.removesuffix(" gpu").replace("dpm 2", "dpm2").replace("uni pc", "unipc")
    return re.sub(" ka$", " karras", words.replace(" ancestral", " a").removesuffix(" bh2"))


def fresh(name: str, own: Any) -> Any:
    """A new scheduler with the model's configuration: the named one, or for "" the model's own kind."""
    import diffusers

    if not name:
        return type(own).from_config(own.config)
    named = SCHEDULERS[name]
    return getattr(diffusers, named.class_name).from_config(own.config, **named.settings)


def set_steps(scheduler: Any, steps: int, *, name: str, device: torch.device | None = None) -> None:
    """Let the scheduler plan `steps` steps, once, before anything costly.

    Raises SdlabError where it cannot (LCM knows 50 at most, some need two or more).
    """
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError) as reason:
        said = " ".join(str(reason).split())
        raise _refused(steps, name or type(scheduler).__name__, said) from reason
    if said := _unusable(scheduler):
        raise _refused(steps, name or type(scheduler).__name__, said)


def _unusable(scheduler: Any) -> str:
    """Why the planned steps would fail on the way, "" if they would not."""
    last = scheduler.config.num_train_timesteps - 1
    if float(scheduler.timesteps.max()) > last:
        return f"they begin after step {last} of the model's own, its last"
    levels = getattr(scheduler, "sigmas", None)
    if levels is None or scheduler.order > 1:
        return ""
    levels = levels[: len(scheduler.timesteps)]
    return "two of them are at one noise level" if bool((levels[1:] == levels[:-1]).any()) else ""


def _refused(steps: int, name: str, said: str) -> SdlabError:
    return SdlabError(
        f"the scheduler '{name}' cannot take {steps} steps ({said})",
        where="--steps",
        next_step="Use other --steps or another --scheduler",
    )


def planned(name: str, own: Any, steps: int, device: torch.device) -> Any:
    """A fresh scheduler that has planned its steps on the device. Raises SdlabError where it cannot."""
    scheduler = fresh(name, own)
    set_steps(scheduler, steps, name=name, device=device)
    return scheduler


def started(
    scheduler: Any, clean_BChw: Tensor, noise_BChw: Tensor, steps: int, made: int
) -> tuple[Tensor, Tensor]:
    """Latents noised to where the last `made` of the planned `steps` begin, (B, C, h, w), and those timesteps."""
    if made == 0:
        return clean_BChw, scheduler.timesteps[:0]
    begin = (steps - made) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.add_noise(clean_BChw, noise_BChw, timesteps[:1].repeat(len(clean_BChw))), timesteps


def sampler_name(scheduler: Any, name: str) -> tuple[str, str]:
    """What A1111 calls it, (Sampler, Schedule type): ``("DPM++ 2M Karras", "Karras")``; type may be ""."""
    if type(scheduler).__name__ == FLOW:
        return "Euler", "Simple"
    if not name:
        config = scheduler.config
        for known in SCHEDULERS.values():
            same = known.class_name == type(scheduler).__name__
            if same and all(config.get(key, value) == value for key, value in known.settings.items()):
                return known.sampler, _schedule_type(known)
        return type(scheduler).__name__.removesuffix("Scheduler"), ""
    return SCHEDULERS[name].sampler, _schedule_type(SCHEDULERS[name])


def _schedule_type(named: Named) -> str:
    return "Karras" if named.settings.get("use_karras_sigmas") else ""
