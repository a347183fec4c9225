"""`sdlab train-captioner`: teach a captioner to describe pictures as a folder's captions do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.commands.training import refuse_contradictions, refuse_own_source
from sdlab.errors import SdlabError
from sdlab.options import opt
from sdlab.training.config import RunConfig

if TYPE_CHECKING:
    from sdlab.models.bases import Recommended
    from sdlab.models.blip_training import TrainableCaptioner
    from sdlab.models.captioner import Captioner


@dataclass(frozen=True)
class TrainCaptionerConfig(RunConfig):
    """Options of ``sdlab train-captioner``."""

    load_model: Annotated[
        str, opt("Captioner to start from (default: blip-base with a CUDA card, else mini-blip).")
    ] = ""
    save_model: Annotated[Path | None, opt("Folder of the run (default: tuned/<captioner>).")] = None
    image_size: Annotated[
        int | None,
        opt("Side of the squares a new captioner sees, in pixels.", min=16, max=1024, group="Data"),
    ] = None
    init: Annotated[
        str,
        opt("Start from nothing: small, or a config.json of BLIP. Its words are those of the captions, or "
            "--load-model's.", after="load_model"),
    ] = ""  # fmt: skip
    txt: Annotated[bool, opt("Also read captions from .txt files.", group="Data", after="seed")] = True
    label_smoothing: Annotated[
        float,
        opt("Share of each word that is spread over all others; 0: none.", min=0.0, max=0.9, group="Training",
            after="weight_decay"),
    ] = 0.1  # fmt: skip
    held_out: Annotated[
        float,
        opt("Share of the pictures that are measured on and never trained on, at most 256; 0: none.",
            min=0.0, max=0.9, group="Data", after="txt"),
    ] = 0.05  # fmt: skip
    half: Annotated[
        bool, opt("Save the weights in 16-bit numbers (fp16).", flag="--half", group="Saving", after="keep")
    ] = False


def train_captioner(config: TrainCaptionerConfig, given: frozenset[str]) -> None:
    """Teach a captioner to describe pictures as their captions do: .cap or .txt files, else the folders' names.

    sdlab train-captioner --images images/            (then: sdlab categorize PICTURES --caption --load-model tuned/...)
    """
    from sdlab.dataset.tree import scan
    from sdlab.training import captioner
    from sdlab.training.record import settle, with_recorded

    refuse_contradictions(config)
    folder = config.save_model or Path("tuned") / _start(config).name
    if config.resume:
        config = with_recorded(config, given, folder, command=captioner.COMMAND)
    start = _start(config)
    show.note(start.why)
    refuse_own_source(folder, start.sources)
    if config.image_size not in (None, start.side_px):
        raise SdlabError(
            f"the captioner sees squares of {start.side_px} px, whatever the pictures' size",
            where="--image-size",
            next_step="Leave it out",
        )
    settled = settle(config, start.advice)
    found = scan(config.images, use_txt=config.txt)
    plan = captioner.CaptionerPlan(
        open=start.open,
        is_new=bool(config.init and not start.captioner),
        facts=_facts(start),
        held_out=config.held_out,
        half=config.half,
    )
    captioner.train_captioner(settled, found, folder=folder, plan=plan)


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    name: str
    why: str
    captioner: Captioner | None  # None: nothing but a configuration
    sources: tuple[Path, ...]  # files and folders
    side_px: int
    advice: Recommended
    open: Callable[[Sequence[str]], TrainableCaptioner]


def _start(config: TrainCaptionerConfig) -> Start:
    """Find what to start from. Raises SdlabError where there is no such captioner or configuration."""
    from sdlab.models.blip_fresh import fresh_captioner, fresh_side_px
    from sdlab.models.blip_training import trainable
    from sdlab.models.captioner import resolve_captioner
    from sdlab.models.fresh import fresh_config, fresh_name
    from sdlab.training.captioner import FRESH, recommended_for

    found = None
    if config.load_model or not config.init:
        found = resolve_captioner(config.load_model, allow_pickle=config.allow_pickle)
    if config.init:
        side_px = config.image_size or fresh_side_px(config.init)
        words = f"the words of {found.name}" if found else "the words of the captions"
        return Start(
            f"captioner-{fresh_name(config.init)}",
            f"{config.init}: an untrained captioner, with {words}",
            found,
            (fresh_config("captioner", config.init)[1], *((found.folder,) if found else ())),
            side_px,
            replace(FRESH, image_size=side_px),
            partial(
                fresh_captioner, config.init, seed=config.seed, side_px=side_px, like=found,
                smoothing=config.label_smoothing,
            ),
        )  # fmt: skip
    assert found
    known = trainable(found, smoothing=config.label_smoothing)
    side_px = known.preparation.side_px
    return Start(
        found.name, found.why, found, (found.folder,), side_px, recommended_for(known), lambda captions: known
    )


def _facts(start: Start) -> dict[str, Any]:
    """What run.json says of what a run starts from."""
    from sdlab.models.captioner import FAMILY

    path = str(start.captioner.folder.resolve()) if start.captioner else ""
    return {
        "base": start.name,
        "family": FAMILY,
        "model": {"name": start.name, "kind": "captioner", "source": "", "path": path},
    }
