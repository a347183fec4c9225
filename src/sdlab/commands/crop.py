"""`sdlab crop`: a folder of pictures becomes one of pictures cut to size; the folder itself is only read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sdlab import progress, show
from sdlab.errors import SdlabError, Stopped, gathered
from sdlab.options import opt

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdlab.curate.crop.focus import Look
    from sdlab.curate.crop.run import Outcome, Settings
    from sdlab.curate.crop.sizes import Wanted
    from sdlab.dataset.tree import Scan

SIZE, LOOK, FILES = "Size", "What is kept", "Files"
MODES = ("aspect", "buckets", "max_side")


@dataclass(frozen=True)
class CropConfig:
    """Options of `sdlab crop`."""

    images: Annotated[Path, opt("Folder of pictures; it is only read.", argument=True)] = Path("images")
    size: Annotated[int, opt("Side of the square, in pixels.", min=8, max=8192, group=SIZE)] = 512
    aspect: Annotated[
        str,
        opt("Width:height in place of the square, as 2:3, with about as many pixels as it has.", group=SIZE),
    ] = ""
    buckets: Annotated[
        bool | None,
        opt(
            "Training's own sizes for --size: each picture keeps nearly its shape.",
            flag="--buckets",
            group=SIZE,
        ),
    ] = None
    max_side: Annotated[
        int | None,
        opt(
            "Only shrink, to this longer side; nothing is cut but to the grid.", min=8, max=16384, group=SIZE
        ),
    ] = None
    grid: Annotated[
        int, opt("Sides are multiples of this: 8, or 16 for FLUX.2.", min=1, max=256, group=SIZE)
    ] = 8
    upscale: Annotated[
        bool | None, opt("Enlarge pictures that are smaller than the size.", flag="--upscale", group=SIZE)
    ] = None
    focus: Annotated[
        str,
        opt(
            "What the kept part is chosen by: what stands out, faces, or just the centre.",
            choices=("saliency", "face", "center"),
            group=LOOK,
        ),
    ] = "saliency"
    preview: Annotated[
        Path | None,
        opt("Write a contact sheet with the kept box drawn on each picture (.png).", group=LOOK),
    ] = None
    dry_run: Annotated[
        bool | None,
        opt("Say what would come out, and write nothing but --preview.", flag="--dry-run", group=LOOK),
    ] = None
    output: Annotated[
        Path | None, opt("Folder of the results. Default: __NAME_cropped beside IMAGES.", group=FILES)
    ] = None
    format: Annotated[
        str,
        opt(
            "Of the results; auto: JPEG for JPEG, PNG for all else.",
            choices=("auto", "jpeg", "png", "webp"),
            group=FILES,
        ),
    ] = "auto"
    quality: Annotated[int, opt("Of JPEG and WebP results.", min=1, max=100, group=FILES)] = 95
    overwrite: Annotated[
        bool | None,
        opt(
            "Make results of other settings anew; files that you changed are left.",
            flag="--overwrite",
            group=FILES,
        ),
    ] = None
    background: Annotated[str, opt("Colour put behind transparent pictures.", group=FILES)] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures unread.", min=1, group=FILES)] = 64_000_000
    num_workers: Annotated[
        int | None, opt("Threads (default: one for each core).", min=1, max=256, group=FILES)
    ] = None
    json: Annotated[
        bool | None, opt("The summary as one JSON document on stdout.", flag="--json", group=FILES)
    ] = None


def crop(config: CropConfig, given: frozenset[str] = frozenset()) -> None:
    """Cut a folder of pictures to size, into another folder with the same subfolders, captions and references.

    IMAGES is only read. Each picture keeps its proportions; what does not fit the shape is cut off, and the part
    that stands out is kept (--focus). Pictures smaller than the size are cut to its shape and not enlarged.

    The same command goes on where it was stopped: results that are there are left, changed pictures are cut anew,
    and what you have changed in the output is never overwritten. --preview shows what is lost.
    """
    from sdlab.curate import places
    from sdlab.curate.crop import focus
    from sdlab.curate.crop import summary as cropped
    from sdlab.curate.crop.preview import write_preview
    from sdlab.curate.crop.run import Settings
    from sdlab.dataset import sheet, tree
    from sdlab.dataset.colour import colour_of
    from sdlab.signals import stop_on_signals

    settings = Settings(
        _wanted(config, given), config.focus, config.format, config.quality, colour_of(config.background)
    )
    look = focus.looker(settings.focus)
    found = tree.scan(config.images)
    output = places.output_for(config.images, config.output, flag="--output", ending="_cropped")
    if config.preview:
        for folder in (str(output), found.root):  # in the output it would be taken for one of the pictures
            sheet.check_target(config.preview, folder)
    started = time.monotonic()
    num_workers = config.num_workers or _num_cores()
    with stop_on_signals() as request:
        outcomes = _cut(config, found, output, settings, look, num_workers, lambda: bool(request))
        report = cropped.Report(
            found,
            settings,
            output,
            tuple(outcomes),
            time.monotonic() - started,
            dry_run=bool(config.dry_run),
            preview=config.preview,
        )
        if request:
            raise Stopped(
                request.signum,
                f"stopped, {len(outcomes)} of {len(found.samples)} pictures are done",
                next_step="The same command goes on",
            )
    if config.preview and report.cuts:
        num = write_preview(
            outcomes,
            config.preview,
            background=settings.background,
            max_pixels=config.max_pixels,
            num_workers=num_workers,
        )
        show.note(f"{config.preview}: {num} of {len(report.cuts)} pictures with what is kept of them")
    show.report(report, as_json=cropped.as_json, as_lines=cropped.as_lines, in_json=bool(config.json))
    if not report.cuts:
        raise cropped.nothing_usable(report)


def _cut(
    config: CropConfig,
    found: Scan,
    output: Path,
    settings: Settings,
    look: Look,
    num_workers: int,
    stop: Callable[[], bool],
) -> list[Outcome]:
    from sdlab.curate.crop.results import Results, digest_of
    from sdlab.curate.crop.run import crop_pictures

    if not found.samples:
        return []
    with Results(output) as results:
        other = results.settings is not None and digest_of(results.settings) != settings.digest
        if results.entries and other and not config.overwrite:
            raise SdlabError(
                "holds results of other settings",
                where=str(output),
                next_step="Give another --output, or --overwrite to make them anew (files you changed are left)",
            )
        images = os.path.realpath(config.images)
        if results.entries and results.images not in ("", images) and not config.overwrite:
            raise SdlabError(
                f"holds results of other pictures, those in {results.images}",
                where=str(output),
                next_step="Give another --output, or --overwrite if the pictures were moved",
            )
        if not config.dry_run:
            results.begin(settings.as_json(), images=images)
        with progress.pictures(len(found.samples), doing="cutting:") as advance:
            return crop_pictures(
                found,
                results,
                settings,
                max_pixels=config.max_pixels,
                num_workers=num_workers,
                look=look,
                write=not config.dry_run,
                advance=advance,
                stop=stop,
            )


def _wanted(config: CropConfig, given: frozenset[str]) -> Wanted:
    """The sizes asked for. Raises SdlabError that names everything that contradicts itself."""
    from sdlab.curate.crop.sizes import Wanted, read_aspect

    modes = [name for name in MODES if getattr(config, name)]
    faults = []
    if len(modes) > 1:
        faults.append(f"{' and '.join(map(_flag, modes))} are different ways: give one")
    if config.max_side:
        others = [name for name in ("size", "upscale", "focus") if name in given and getattr(config, name)]
        faults += [f"--max-side only shrinks, so {_flag(name)} means nothing beside it" for name in others]
    if config.format == "png" and "quality" in given:
        faults.append("PNG has no --quality")
    name, side_px = ("max_side", config.max_side) if config.max_side else ("size", config.size)
    if side_px % config.grid or side_px < config.grid:
        below = side_px // config.grid * config.grid
        near = " or ".join(str(side) for side in (below, below + config.grid) if side)
        faults.append(f"{_flag(name)} {side_px} is no multiple of --grid {config.grid}: try {near}")
    if faults:
        raise gathered(faults, where="")
    return Wanted(
        side_px=config.size,
        grid=config.grid,
        aspect=read_aspect(config.aspect) if config.aspect else None,
        buckets=bool(config.buckets),
        max_side_px=config.max_side,
        upscale=bool(config.upscale),
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _num_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
