"""Training a captioner: pictures and their captions in, a captioner's folder in tuned/ out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sdlab import show
from sdlab.dataset.batches import Batch, Batches, Entry, visit_name
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Pixels
from sdlab.dataset.report import num_of
from sdlab.dataset.sheet import THUMBNAIL_PX, evenly, thumbnail
from sdlab.dataset.tree import Refused, Scan
from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models.bases import Recommended
from sdlab.models.blip_training import CaptionedPictures, Tokens, TrainableCaptioner, tokens_of
from sdlab.training.adapt import DTYPES
from sdlab.training.config import RunConfig
from sdlab.training.data import nothing_usable, tell_refused, visits
from sdlab.training.loop import on_device
from sdlab.training.pixels import held_out, look_through, pixels_of, seen_as
from sdlab.training.preview import write_sheet
from sdlab.training.record import Dataset, as_refused, dataset_of
from sdlab.training.session import Job, Session, carry_out, in_session, refuse_overlap

COMMAND = "train-captioner"
MAX_HELD_OUT = 256
NUM_SHOWN = 16
NUM_TOLD = 5  # unknown words that are named
SMALL = 20_000_000  # weights; mini-blip has 2 million, BLIP 250

FRESH = Recommended(image_size=96, batch=64, epoch=30, lr=1e-3, lr_schedule="cosine", warmup=100)
_SMALL = Recommended(image_size=96, batch=16, epoch=20, lr=1e-3, lr_schedule="cosine", warmup=20)
_LARGE = Recommended(image_size=384, batch=8, epoch=5, lr=1e-5, lr_schedule="cosine", warmup=100)


def recommended_for(captioner: TrainableCaptioner) -> Recommended:
    """Settings for one that can describe pictures already, where the user gave none."""
    num_weights = sum(math.prod(stored.shape) for stored in captioner.part.weights.values())
    return replace(_SMALL if num_weights < SMALL else _LARGE, image_size=captioner.preparation.side_px)


@dataclass(frozen=True)
class CaptionerPlan:
    """What the command knows and a run is told."""

    open: Callable[
        [Sequence[str]], TrainableCaptioner
    ]  # by the captions that are trained on: a new one's words
    is_new: bool  # are its words those of these captions?
    facts: Mapping[str, Any]  # for run.json: base, family and model
    held_out: float  # share of the pictures that are never trained on
    half: bool  # save the weights in fp16


def train_captioner(config: RunConfig, found: Scan, *, folder: Path, plan: CaptionerPlan) -> None:
    """Train as the settled `config` says, and leave a captioner in `folder` that `categorize` takes.

    `config.image_size` is the side of the squares that it sees. Raises SdlabError before the first costly second
    where it can.
    """
    refuse_overlap(folder, config)
    in_session(config, folder, command=COMMAND, work=lambda session: _train(session, found, plan))


def _train(session: Session[RunConfig], found: Scan, plan: CaptionerPlan) -> None:
    config = session.config
    items, contents, refused = _captioned(session, found)
    out = held_out(contents, plan.held_out, most=MAX_HELD_OUT, seed=config.seed)
    split = _Split(items, contents, out, refused)
    captioner = plan.open([item.sample.prompt for item in split.trained])
    tokens = tokens_of(captioner, (item.sample.prompt for item in items))
    if session.is_main:
        _tell(found, split, tokens, is_new=plan.is_new)
    assert config.weights
    module = captioner.load(session.accelerator.device, DTYPES[config.weights])
    carry_out(session, _job(session, captioner, module, split, tokens, plan))


@dataclass(frozen=True)
class _Split:
    """The visits of all usable pictures, and which samples are not trained on."""

    items: Sequence[Item]
    contents: Mapping[str, str]  # sha256 of the picture by the sample's id
    out: frozenset[str]  # ids
    refused: Sequence[Refused]

    @property
    def trained(self) -> list[Item]:
        return [item for item in self.items if item.sample.id not in self.out]

    @property
    def held_out(self) -> list[Item]:
        """The first visit of each."""
        return [item for item in self.items if item.sample.id in self.out and item.repeat == 0]

    def dataset(self, tokens: Tokens) -> Dataset:
        """For the record of the run."""
        facts = {
            "pictures": len(self.contents),
            "held_out": len(self.out),
            "captions": len(tokens.ids),
            "refused": as_refused(self.refused),
        }
        return dataset_of(
            self.items,
            lambda item: seen_as(item, self.contents[item.sample.id], item.sample.prompt),
            facts,
        )


def _job(
    session: Session[RunConfig],
    captioner: TrainableCaptioner,
    module: nn.Module,
    split: _Split,
    tokens: Tokens,
    plan: CaptionerPlan,
) -> Job:
    config, run = session.config, session.run
    assert config.batch
    source = CaptionedPictures(captioner.preparation, tokens, pixels_of(config))
    look = _Look(captioner, module, source, split.held_out or split.trained, config.batch)
    objective = {"loss": "next token", "label_smoothing": captioner.smoothing, "held_out": plan.held_out}

    def save(whole: nn.Module, into: Path) -> Mapping[str, Any]:
        captioner.save(whole, into, half=plan.half)
        return {}

    return Job(
        module=module,
        loss=captioner.loss,
        batches=Batches(
            [_entry(item) for item in split.trained],
            replace(source, flip=config.flip),
            batch=config.batch,
            accumulate=config.grad_accum,
            seed=config.seed,
            process=(session.accelerator.process_index, session.accelerator.num_processes),
        ),
        dataset=split.dataset(tokens),
        facts={**plan.facts, "command": COMMAND, "objective": objective, "encoders": captioner.fingerprint},
        preview=look.preview(run.path / "samples"),
        save=save,
        result_bytes=sum(parameter.nbytes for parameter in module.parameters()),
        result=f"the captioner is {run.path}",
        next_step=f"describe pictures with it: sdlab categorize PICTURES --caption --load-model {run.path}",
        validate=look.validate if split.out else None,
        validate_every=config.preview_every,
    )


def _captioned(session: Session[RunConfig], found: Scan) -> tuple[list[Item], dict[str, str], list[Refused]]:
    """The visits of pictures that can be used and have a caption, sha256 of each by id, and what is refused.

    Raises SdlabError where no picture is left.
    """
    config = session.config
    assert config.image_size
    if not any(sample.prompt for sample in found.samples) and found.samples:
        raise SdlabError(
            "no picture has a caption: a .cap or .txt file beside it, or the names of its folders",
            where=found.root,
            next_step=f"Let a captioner write them: sdlab categorize {found.root} --caption",
        )
    # a grid of the whole square leaves one bucket: pictures are squashed, not cut
    items, refused = visits(found, config, config.image_size, session.stop, tell=session.is_main)
    num_empty = len({item.sample.id for item in items if not item.sample.prompt})
    if num_empty and session.is_main:
        show.note(f"left out, as they have no caption: {num_of(num_empty, 'picture')}")
    items = [item for item in items if item.sample.prompt]
    contents, bad = look_through(items, session)
    refused = [*refused, *bad]
    items = [item for item in items if item.sample.id in contents]
    if session.is_main:
        tell_refused(refused, found.root)
    if not items:
        raise nothing_usable(config.images, refused)
    return items, contents, refused


def _entry(item: Item) -> Entry:
    sample = item.sample
    return Entry(visit_name(item), item.size_px, prompt_key=sample.prompt, path=sample.path)


def _tell(found: Scan, split: _Split, tokens: Tokens, *, is_new: bool) -> None:
    """One line of what is trained on, and what of the captions cannot be learned."""
    num, cut, unknown = len(split.contents), tokens.cut, list(tokens.unknown)
    sources = Counter(item.sample.source for item in split.items if item.repeat == 0)
    named = {"folder": "from folders", "cap": "from .cap files", "txt": "from .txt files"}
    told = ", ".join(f"{count} {named[source]}" for source, count in sorted(sources.items()))
    captions = f"{num_of(len(tokens.ids), 'caption')} ({told})"
    show.note(f"{found.root}: {num_of(num, 'picture')}, {len(split.out)} held out; {captions}")
    if cut:
        such = f"{num_of(len(cut), 'caption')}, such as '{cut[0][:80]}'"
        show.note(f"cut, as the captioner can say no more: {such}")
    if unknown:
        such = f"{num_of(len(unknown), 'word')}, such as {', '.join(unknown[:NUM_TOLD])}"
        why = (
            "they stand in held-out captions alone"
            if is_new
            else "a new captioner would learn them (--init small)"
        )
        show.warn(f"not in the captioner's vocabulary, so not learned: {such}; {why}")


@dataclass(frozen=True)
class _Look:
    """How well the module describes pictures: numbers for the log, and its words to read."""

    captioner: TrainableCaptioner
    module: nn.Module
    source: CaptionedPictures
    items: Sequence[Item]
    batch: int

    def validate(self, step: int) -> dict[str, float]:
        """The mean loss, and the share of pictures of whose captions every next token is guessed."""
        losses, exact = list[float](), list[bool]()
        device = next(self.module.parameters()).device
        for at in range(0, len(self.items), self.batch):
            entries = [_entry(item) for item in self.items[at : at + self.batch]]
            ids = tuple(entry.id for entry in entries)
            batch = Batch(*self.source(entries, Draws(0, 0)), torch.ones(len(ids)), ids)
            loss_B, exact_B = self.captioner.measure(self.module, on_device(batch, device))
            losses += loss_B.tolist()
            exact += exact_B.tolist()
        means = sum(losses) / len(losses), sum(exact) / len(exact)
        show.note(
            f"step {step}: held-out loss {means[0]:.4f}, {means[1]:.0%} of {len(exact)} captions word for word"
        )
        return {"val_loss": means[0], "val_exact": means[1]}

    def preview(self, folder: Path) -> Callable[[int], None]:
        """A function that draws ``step-NNNNNN.png``: pictures, what the module says of them, and the truth."""
        shown = evenly(self.items, NUM_SHOWN)
        thumbnails = [_thumbnail(item, self.source.pixels) for item in shown]

        def draw(step: int) -> None:
            pixels_B3HW = torch.stack([self.source.picture(item.sample.path) for item in shown])
            said = self.captioner.speaker(self.module).captions(pixels_B3HW)
            tiles = [
                (image, f"{made.text} ({made.confidence:.2f}) | {item.sample.prompt}")
                for image, made, item in zip(thumbnails, said, shown, strict=True)
            ]
            write_sheet(tiles, folder / f"step-{step:06d}.png", side_px=THUMBNAIL_PX)

        return draw


def _thumbnail(item: Item, pixels: Pixels) -> Image.Image:
    made = thumbnail(item.sample.path, background=pixels.background, max_pixels=pixels.max_pixels)
    assert not isinstance(made, str), made  # it was opened a moment ago
    return made
