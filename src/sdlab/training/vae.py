"""One training run of an autoencoder, from a folder of pictures to RUN/vae: the calls, in order.

scan -> buckets -> every picture opened once -> a few held out -> autoencoder -> fit -> statistics -> vae/

Shapes: B batch (1 here), H W height and width in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdlab import show
from sdlab.dataset.batches import Batches, Entry, PixelSource, reopened, visit_name
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Picture, ahead
from sdlab.dataset.report import num_of
from sdlab.dataset.tree import Refused, Scan, scan
from sdlab.errors import SdlabError, Stopped
from sdlab.keyed import key
from sdlab.models.bases import Recommended
from sdlab.models.parts import Part
from sdlab.models.vae import Autoencoder, Statistics, TrainedVae
from sdlab.models.vae_loss import psnr, ssim
from sdlab.training.adapt import DTYPES
from sdlab.training.config import RunConfig
from sdlab.training.data import nothing_usable, tell_refused, visits
from sdlab.training.pixels import held_out, look_through, pixels_of, seen_as
from sdlab.training.preview import write_sheet
from sdlab.training.record import Dataset, as_refused, dataset_of
from sdlab.training.session import Job, Session, carry_out, in_session, num_steps, refuse_overlap

COMMAND = "train-vae"
MAX_HELD_OUT = 64
MAX_MEASURED = 512  # pictures that the statistics are of; each gives thousands of latents
NUM_SHOWN = 4
GAP_PX = 4
SMALL = 10_000_000  # weights; the VAE of SD 1.5 has 84 million, those of the mini models less than one

_SCRATCH = Recommended(image_size=256, batch=8, epoch=20, lr=1e-4, warmup=500, lr_schedule="cosine", ema=True)
_FINE_TUNE = Recommended(
    image_size=512, batch=4, epoch=10, lr=2e-5, warmup=100, lr_schedule="cosine", ema=True
)
_SMALL_SCRATCH = Recommended(
    image_size=128, batch=8, epoch=20, lr=1.5e-3, warmup=100, lr_schedule="cosine", ema=True
)
_SMALL_FINE_TUNE = Recommended(
    image_size=128, batch=8, epoch=10, lr=2e-4, warmup=20, lr_schedule="cosine", ema=True
)


def recommended_for_vae(part: Part, *, is_fresh: bool) -> Recommended:
    """Settings for an autoencoder of this size, where the user gave none."""
    num_weights = sum(_count(stored.shape) for stored in part.weights.values())
    if num_weights < SMALL:
        return _SMALL_SCRATCH if is_fresh else _SMALL_FINE_TUNE
    return _SCRATCH if is_fresh else _FINE_TUNE


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


@dataclass(frozen=True)
class VaePlan:
    """What the command knows and a run is told."""

    facts: Mapping[str, Any]  # for run.json, "objective" among them
    crop_px: int | None  # side of the square that is cut from each picture
    held_out: float  # share of the pictures
    keeps_latents: bool  # the encoder stays: no statistics are measured
    next_step: str


def train_vae(config: RunConfig, autoencoder: Autoencoder, *, folder: Path, plan: VaePlan) -> None:
    """Train as the settled `config` says, and leave the autoencoder in `folder`/vae.

    Raises SdlabError before the first costly second where it can.
    """
    refuse_overlap(folder, config)
    found = scan(config.images, use_txt=False)
    work = partial(_train, autoencoder=autoencoder, found=found, plan=plan)
    in_session(
        config,
        folder,
        command=COMMAND,
        work=work,
        idle_weights=autoencoder.objective.disc_start is not None,
    )


def _train(
    session: Session[RunConfig],
    *,
    autoencoder: Autoencoder,
    found: Scan,
    plan: VaePlan,
) -> None:
    config = session.config
    items, contents, refused = _pictures(session, autoencoder.grid, found)
    out = held_out(contents, plan.held_out, most=MAX_HELD_OUT, seed=config.seed)
    split = _Split(items, contents, out, refused, config.seed)
    if not out and session.is_main:
        show.note("no picture is held out: PSNR and SSIM are of pictures that are trained on")
    if not plan.keeps_latents:
        _check_measurable(split.measured, autoencoder, config)
    assert config.weights
    module = autoencoder.load(session.accelerator.device, DTYPES[config.weights])
    job = _job(session, autoencoder, module, split, plan)
    starts, steps = autoencoder.objective.disc_start, num_steps(config, job.batches)
    if starts is not None and starts >= steps and session.is_main:
        show.warn(f"--disc-start {starts} is not reached in {steps} steps: no discriminator takes part")
    carry_out(session, job)


@dataclass(frozen=True)
class _Split:
    """The visits of all usable pictures, and which are not trained on."""

    items: Sequence[Item]
    contents: Mapping[str, str]  # sha256 of the picture by the sample's id
    out: frozenset[str]  # ids
    refused: Sequence[Refused]
    seed: int

    @property
    def trained(self) -> list[Item]:
        return [item for item in self.items if item.sample.id not in self.out]

    @property
    def views(self) -> list[Item]:
        """What is looked at during the training: each held-out picture once, at most 64."""
        seen = [item for item in self.items if item.sample.id in self.out] if self.out else self.items
        return self._chosen(seen, MAX_HELD_OUT, "held-out")

    @property
    def measured(self) -> list[Item]:
        """What the latents' statistics are of: at most 512 of the pictures that are trained on."""
        return self._chosen(self.trained, MAX_MEASURED, "statistics")

    def _chosen(self, items: Sequence[Item], num: int, purpose: str) -> list[Item]:
        """At most `num` different pictures, by a key of their contents and the seed."""
        firsts = {self.contents[item.sample.id]: item for item in reversed(items)}
        return [firsts[content] for content in sorted(firsts, key=lambda c: key(self.seed, purpose, c))[:num]]

    def dataset(self) -> Dataset:
        """For the record of the run."""
        facts = {
            "pictures": len(self.contents) - len(self.out),
            "held_out": sorted(self.out),
            "refused": as_refused(self.refused),
        }
        return dataset_of(self.items, self._seen_as, facts)

    def _seen_as(self, item: Item) -> str:
        role = "held out" if item.sample.id in self.out else ""
        return seen_as(item, self.contents[item.sample.id], role)


def _check_measurable(items: Sequence[Item], autoencoder: Autoencoder, config: RunConfig) -> None:
    """Raises SdlabError where each packed channel of FLUX.2 would have a single latent, which has no variance."""
    grid = autoencoder.grid
    num = sum((item.size_px[0] // grid) * (item.size_px[1] // grid) for item in items)
    if autoencoder.is_flux2 and num < 2:
        raise SdlabError(
            "all pictures that are trained on make a single latent, which has no spread to be divided by",
            where=str(config.images),
            next_step="Train on more pictures, or with a larger --image-size",
        )


def _job(
    session: Session[RunConfig], autoencoder: Autoencoder, module: TrainedVae, split: _Split, plan: VaePlan
) -> Job:
    folder = session.run.path
    look = _Look(autoencoder, module, split.views, session)

    def save(plain: nn.Module, into: Path) -> Mapping[str, Any]:
        assert isinstance(plain, TrainedVae)
        measured = None if plan.keeps_latents else look.measure(plain, split.measured)
        into.mkdir()
        autoencoder.save(plain, into / "vae", measured)
        return {"quality": quality_of(folder), "statistics": asdict(measured) if measured else None}

    return Job(
        module=module,
        loss=autoencoder.loss,
        batches=_batches(split.trained, session, plan.crop_px),
        dataset=split.dataset(),
        facts={"command": COMMAND, **plan.facts},
        preview=look.preview,
        save=save,
        result_bytes=4 * sum(_count(stored.shape) for stored in autoencoder.part.weights.values()),
        result=f"the VAE is {folder / 'vae'}",
        next_step=plan.next_step,
        validate=look.validate,
        validate_every=session.config.preview_every,
    )


def _pictures(
    session: Session[RunConfig], grid: int, found: Scan
) -> tuple[list[Item], dict[str, str], list[Refused]]:
    """The visits of pictures that open, their contents by id, and what is refused. Raises SdlabError for none."""
    config = session.config
    items, refused = visits(found, config, grid, session.stop, tell=False)
    if session.is_main:
        pictures = num_of(len({item.sample.id for item in items}), "picture")
        show.note(f"{found.root}: {pictures}, {num_of(len(refused), 'file')} refused")
        tell_refused(refused, found.root)
    contents, broken = look_through(items, session)
    if session.is_main:
        tell_refused(broken, found.root)
    refused = [*refused, *broken]
    items = [item for item in items if item.sample.id in contents]
    if not items:
        raise nothing_usable(config.images, refused)
    return items, contents, refused


def _batches(items: Sequence[Item], session: Session[RunConfig], crop_px: int | None) -> Batches:
    config = session.config

    def entry(item: Item) -> Entry:
        name = visit_name(item)
        if crop_px is None:
            return Entry(name, item.size_px, path=item.sample.path)
        height, width = item.size_px
        whole_px = max(height, crop_px), max(width, crop_px)
        return Entry(name, (crop_px, crop_px), path=item.sample.path, whole_px=whole_px)

    assert config.batch
    return Batches(
        [entry(item) for item in items],
        PixelSource(pixels_of(config), crop_px, config.flip),
        batch=config.batch,
        accumulate=config.grad_accum,
        seed=config.seed,
        process=(session.accelerator.process_index, session.accelerator.num_processes),
    )


class _Look:
    """How well the module makes pictures again: numbers for the log, and pairs to look at."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        module: TrainedVae,
        views: Sequence[Item],
        session: Session[RunConfig],
    ) -> None:
        self.autoencoder, self.module, self.views, self.session = autoencoder, module, views, session

    def pictures(self, items: Sequence[Item]) -> Iterator[Tensor]:
        """Pixels 3HW of each item, whole, on the run's device. Raises SdlabError for a picture gone bad."""
        session, pixels = self.session, pixels_of(self.session.config)
        for _, picture in ahead(
            lambda item: reopened(Picture(item.sample.path, item.size_px), pixels),
            items,
            session.config.num_workers,
        ):
            yield picture.to(session.accelerator.device)

    def measure(self, module: TrainedVae, items: Sequence[Item]) -> Statistics | None:
        """Statistics of the latents of these pictures; None, with a warning, where they do not vary.

        Raises Stopped between two pictures after a signal: the training is over, and its last checkpoint is there.
        """
        all_read, stop = False, self.session.stop

        def read() -> Iterator[Tensor]:
            nonlocal all_read
            for pixels_3HW in self.pictures(items):
                if stop:
                    what = "stopped while the latents were measured"
                    raise Stopped(stop.signum, what, next_step="--resume goes on")
                yield pixels_3HW
            all_read = True

        try:
            return self.autoencoder.measure(module, read())
        except SdlabError as reason:
            if not all_read:
                raise  # of a picture or a signal; once all are read it is of the statistics
            show.warn(f"{reason.what}; the VAE keeps the statistics that it started with")
            return None

    def validate(self, step: int) -> dict[str, float]:
        """Means over the views of PSNR in dB and of SSIM."""
        values = [
            (psnr(made_1CHW, true_1CHW), ssim(made_1CHW, true_1CHW))
            for true_1CHW, made_1CHW in self._again(self.views)
        ]
        means = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        show.note(
            f"step {step}: PSNR {means[0]:.2f} dB, SSIM {means[1]:.4f} of {num_of(len(values), 'picture')}"
        )
        return {"val_psnr": means[0], "val_ssim": means[1]}

    def preview(self, step: int) -> None:
        """Draw ``samples/step-NNNNNN.png``: pairs of a picture and what is made of it."""
        if step == 0:
            self.session.run.record(quality_before=self.validate(0))
        tiles = [
            (_pair(true_1CHW, made_1CHW), f"original, made again: {float(psnr(made_1CHW, true_1CHW)):.2f} dB")
            for true_1CHW, made_1CHW in self._again(self.views[:NUM_SHOWN])
        ]
        write_sheet(tiles, self.session.run.path / "samples" / f"step-{step:06d}.png")

    def _again(self, views: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each picture and its reconstruction, 1CHW on the CPU."""
        for pixels_3HW in self.pictures(views):
            made_1CHW = self.autoencoder.reconstruct(self.module, pixels_3HW[None])
            yield pixels_3HW[None].cpu(), made_1CHW.float().cpu()


def _pair(true_1CHW: Tensor, made_1CHW: Tensor) -> Image.Image:
    """Both side by side."""
    height, width = true_1CHW.shape[2:]
    pair = Image.new("RGB", (2 * width + GAP_PX, height), "white")
    for left, pixels_1CHW in ((0, true_1CHW), (width + GAP_PX, made_1CHW)):
        bytes_HW3 = ((pixels_1CHW[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
        pair.paste(Image.fromarray(bytes_HW3.numpy()), (left, 0))
    return pair


def quality_of(folder: Path) -> dict[str, float] | None:
    """The last PSNR and SSIM of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    measured = [line for line in lines if "val_psnr" in line]
    return {name: measured[-1][name] for name in ("val_psnr", "val_ssim")} if measured else None
