"""A model that was chosen, opened and then loaded: its engine, and how it uses the computer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import __version__
from sdlab.errors import SdlabError
from sdlab.inference import identity
from sdlab.inference.choose import BY_NAME, Asked, Chosen, Source, choose, lora_source
from sdlab.inference.spec import Offload

if TYPE_CHECKING:
    import torch

    from sdlab.inference.engines.kinds import Engine, Sampler
    from sdlab.inference.prompts.embeddings import Embedding
    from sdlab.models.base import Cond, Family
    from sdlab.models.parts import Part

__all__ = [
    "Asked",
    "Chosen",
    "Loaded",
    "Opened",
    "Running",
    "Source",
    "check_running",
    "check_tagged",
    "choose",
    "embeddings_of",
    "hardware",
    "load",
    "lora_source",
    "open_chosen",
    "versions",
]


@dataclass(frozen=True)
class Opened:
    """The model's family, its headers checked, and what it can be asked for; no weights yet."""

    chosen: Chosen
    family: Family
    engine: Engine


@dataclass(frozen=True)
class Running:
    """How the computer is used."""

    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    vae_tiling: bool = False
    offload: Offload = "none"
    threads: int | None = None  # of a recipe: exactly so many, and one batch at a time


@dataclass
class Loaded:
    """The engine, what a recipe says about it, and which LoRAs it wears."""

    sampler: Sampler
    chosen: Chosen
    device: torch.device
    dtype: torch.dtype
    running: Running
    num_threads: int  # of the CPU that work on one batch
    num_workers: int  # batches that are worth making at the same time
    _worn: tuple[tuple[Path, float], ...] | None = field(default=None, repr=False)  # None: not ready to work

    def wear(self, tagged: Sequence[tuple[Source, float]]) -> None:
        """Have the pipeline count the chosen LoRAs and the tagged ones, and no others. No batch may be at work.

        The same LoRAs and weights give the same bits, whatever was worn before and in whichever order the tags
        stand. Raises SdlabError, as check_tagged, where one does not fit; then none is worn.
        """
        wanted = (*_loras(self.chosen), *((source.path, weight) for source, weight in _in_order(tagged)))
        if wanted == self._worn:
            return
        from sdlab.inference.engines.placement import Placement
        from sdlab.models.lora import apply_loras, take_off

        placement, pipeline = Placement(self.device, self.running.offload), self.sampler.pipeline
        denoiser = _denoiser(pipeline)
        if self._worn is not None:
            placement.unsettle(denoiser)
            take_off(pipeline)
        self._worn = None
        if wanted:
            apply_loras(pipeline, wanted)
        placement.settle(denoiser)
        if self.running.compile:
            _compile(denoiser)
        self.sampler.forget_prompts()
        self._worn = wanted


def open_chosen(chosen: Chosen) -> Opened:
    """Read the headers. Raises SdlabError, naming file and tensor, where something does not fit."""
    from sdlab.models.opening import open_family
    from sdlab.models.quiet import hush

    hush()
    from sdlab.inference.engines.kinds import engine_of

    family: Any = open_family(
        chosen.model,
        unet=_text(chosen.unet),
        vae=_text(chosen.vae),
        allow_pickle=chosen.allow_pickle,
    )
    if loras := _loras(chosen):
        from sdlab.models.lora import check_loras

        check_loras(_parts(family), loras)
    return Opened(chosen, family, engine_of(chosen.model.family, family))


def check_tagged(opened: Opened, tagged: Sequence[tuple[Source, float]]) -> None:
    """Raises SdlabError, naming file and layer, for a LoRA that is none or not of this model.

    Headers and kohya's alphas are read, no weights.
    """
    from sdlab.models.lora import check_loras

    check_loras(_parts(opened.family), [(source.path, weight) for source, weight in tagged])


def _parts(family: Any) -> list[Part]:
    """The model's networks, as their files say."""
    from sdlab.models.parts import Part

    return [part for part in vars(family.parts).values() if isinstance(part, Part)]


def embeddings_of(opened: Opened, texts: Iterable[str]) -> list[Embedding]:
    """The textual inversions that these texts name. Raises SdlabError for one that is none or of another width."""
    chosen = opened.chosen
    if not chosen.embeddings:
        return []
    from sdlab.inference.prompts.embeddings import named_in, read_embedding

    paths = {source.name: source.path for source in chosen.embeddings}
    names = named_in(list(dict.fromkeys(texts)), paths)
    width = next(part for part in _parts(opened.family) if part.name == "text_encoder").config["hidden_size"]
    return [read_embedding(paths[name], width=width, allow_pickle=chosen.allow_pickle) for name in names]


def _loras(chosen: Chosen) -> list[tuple[Path, float]]:
    """Files with their weights, that of a run first."""
    own = [(chosen.own_lora.path, 1.0)] if chosen.own_lora else []
    return own + [(source.path, weight) for source, weight in chosen.loras]


def _in_order(tagged: Sequence[tuple[Source, float]]) -> list[tuple[Source, float]]:
    """By their content: LoRAs are summed, and another order gives other last digits."""
    return sorted(tagged, key=lambda one: (identity.combined(one[0].files), one[1]))


def _text(source: Source | None) -> str:
    """What the models' side takes for a swapped part."""
    if source is None:
        return ""
    return source.asked if source.kind in BY_NAME else str(source.path)


def check_running(running: Running) -> tuple[torch.device, torch.dtype]:
    """The device and number type that are meant. Raises SdlabError for what this computer cannot do."""
    from sdlab.inference.engines.placement import check_offload
    from sdlab.models.memory import check_compiler, pick_device, pick_dtype

    device = pick_device(running.device)
    dtype = pick_dtype(running.dtype, device)
    check_offload(running.offload, device)
    if running.compile:
        check_compiler(device)
        if running.offload == "layers":
            raise SdlabError(
                "--compile and --offload layers exclude each other", next_step="Use --offload model"
            )
    return device, dtype


def load(opened: Opened, running: Running, *, prompts: Iterable[str]) -> Loaded:
    """Load the weights. Raises SdlabError as check_running and embeddings_of, before a weight is read.

    `prompts` are all that will be sent, negative ones too: where the text encoder is large, it reads them and is
    gone before the denoiser is loaded, so that a card has to hold one of the two; and of the textual inversions
    those are read that a prompt names. From now on torch computes with `num_threads` in this thread.
    """
    import torch

    from sdlab.inference.engines.placement import Placement
    from sdlab.models.memory import pick_threads

    device, dtype = check_running(running)
    family, engine, texts = opened.family, opened.engine, list(dict.fromkeys(prompts))
    embeddings = embeddings_of(opened, texts)
    threads = pick_threads(device, dtype, num_parameters=_num_parameters(family), asked=running.threads)
    torch.set_num_threads(threads.num_threads)
    placement = Placement(device, running.offload)
    conds = _encoded(family, device, dtype, texts) if engine.encodes_first else None
    pipeline = family.pipeline(family.load_denoiser(placement.home, dtype), conds)
    if running.vae_tiling:
        pipeline.vae.enable_tiling()
    sampler = engine.sampler(pipeline, embeddings, placement)
    loaded = Loaded(sampler, opened.chosen, device, dtype, running, threads.num_threads, threads.num_workers)
    loaded.wear(())
    return loaded


def _denoiser(pipeline: Any) -> Any:
    parts = [getattr(pipeline, name, None) for name in identity.DENOISERS]
    return next(part for part in parts if part is not None)


def _num_parameters(family: Family) -> int:
    """Of the denoiser, by its files' headers."""
    part = next(part for part in _parts(family) if part.name in identity.DENOISERS)
    return sum(math.prod(stored.shape) for stored in part.weights.values())


def _compile(denoiser: Any) -> None:
    """What was compiled before, around other LoRAs, is forgotten. The work is done at the first step."""
    import torch

    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = (
        64  # every (size, batch) is a graph of its own; then torch goes on without
    )
    denoiser.compile(dynamic=False)


def _encoded(
    family: Family, device: torch.device, dtype: torch.dtype, prompts: Sequence[str]
) -> Mapping[str, Cond]:
    """What the denoiser is told for each prompt, kept on the CPU. One at a time: who is beside it changes no bit."""
    import torch

    from sdlab.inference.spool import Spool

    spool = Spool()
    with torch.no_grad(), family.load_encoders(device, dtype) as encoders:
        for prompt in prompts:
            [cond] = encoders.encode_prompts([prompt])
            spool.add(prompt, {key: tensor.cpu() for key, tensor in cond.items()})
    return spool


def versions() -> dict[str, str]:
    """Of everything that can change a digit or a pixel."""
    from importlib.metadata import version

    import diffusers
    import PIL
    import torch
    import transformers

    return {
        "sdlab": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        **{name: version(name) for name in ("numpy", "peft", "tokenizers")},  # not imported for that
    }


def hardware(device: torch.device) -> str:
    """What does the arithmetic: the card's name, or the vector instructions that torch uses on this CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
