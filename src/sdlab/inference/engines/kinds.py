"""What each kind of model can be asked for, and the engine that makes its pictures. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.engines.checks import Made
    from sdlab.inference.engines.hires import OnStep
    from sdlab.inference.engines.placement import Placement
    from sdlab.inference.prompts.embeddings import Embedding
    from sdlab.inference.spec import Shot, Spec


class Sampler(Protocol):
    """An engine around a diffusers pipeline. Several threads may sample at once."""

    pipeline: Any

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""

    def sample(
        self,
        batch: Sequence[Shot],
        spec: Spec,
        *,
        init: Image.Image | None = None,
        mask: tuple[Image.Image, int] | None = None,
        references: Sequence[Image.Image] = (),
        on_step: OnStep | None = None,
    ) -> list[Made]:
        """One Made for each shot, in order.

        `init` is an RGB picture of the spec's size to start from, `mask` a grey one, white where `init` is made
        anew, with the pixels by which its edge is softened. `references` are pictures to look at.
        """

    def forget_prompts(self) -> None:
        """To be called when the model wears other LoRAs: what was encoded no longer holds."""


@dataclass(frozen=True)
class Engine:
    """A kind of model as seen from the commands. What it does not take stands there as the reason, "" if it does."""

    sampler: Callable[[Any, Sequence[Embedding], Placement], Sampler]  # from a pipeline
    encodes_first: bool = False  # the text encoder is large: it is freed before the denoiser is loaded
    no_scheduler: str = ""
    no_negative: str = ""
    no_guidance: str = ""
    no_references: str = ""
    no_clip_skip: str = ""
    no_emphasis: str = ""
    no_embeddings: str = ""
    no_mask: str = ""
    num_clip_layers: int = 0  # of the text encoder, for clip skip
    edit_strength: float | None = None  # where none is given; None: edits look at the picture
    edit_guidance: float | None = None  # where none is given; None: what suits the model


def engine_of(name: str, family: Any) -> Engine:
    """The engine for an opened family, by the name under which models/resolve.py knows it."""
    return ENGINES[name](family)


def texts(engine: Engine, shots: Iterable[Shot]) -> list[str]:
    """Every text that will be sent for the shots."""
    wanted = list(shots)
    negative = [] if engine.no_negative else [shot.negative for shot in wanted]
    return list(dict.fromkeys([*(shot.prompt for shot in wanted), *negative]))


def _sd(family: Any) -> Engine:
    from sdlab.inference.engines.sd import Sampler as StableDiffusionSampler

    references = (
        "Stable Diffusion does not look at reference pictures. Use a FLUX.2 model, as flux2-klein-base-4b"
    )
    return Engine(
        StableDiffusionSampler,
        no_references=references,
        num_clip_layers=int(family.parts.text_encoder.config.get("num_hidden_layers", 12)),
        edit_strength=0.8,
        edit_guidance=5.0,
    )


def _flux2(family: Any) -> Engine:
    from sdlab.inference.engines.flux2 import Flux2Sampler

    dev, distilled = family.parts.kind == "dev", family.parts.is_distilled
    which = "FLUX.2 dev" if dev else "this distilled model"
    return Engine(
        Flux2Sampler,
        encodes_first=True,
        no_scheduler="FLUX.2 models bring their own (flow-matching Euler), so leave it out",
        no_negative=f"{which} has no negative prompt" if dev or distilled else "",
        no_guidance=f"{which} ignores it" if distilled and not dev else "",
        no_clip_skip="FLUX.2 does not read prompts with CLIP, so leave it out",
        no_emphasis="FLUX.2's text encoder has no weights: brackets are plain text",
        no_embeddings="FLUX.2 takes no textual inversions: they are made for CLIP, as in Stable Diffusion 1.5",
    )


ENGINES: dict[str, Callable[[Any], Engine]] = {"sd": _sd, "flux2": _flux2}
