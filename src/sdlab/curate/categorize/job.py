"""What `sdlab categorize` is asked for, with everything checked that costs nothing to check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab import show
from sdlab.curate import places
from sdlab.curate.categorize import sheets
from sdlab.curate.categorize.options import CategorizeConfig
from sdlab.curate.keywords.filler import Filler, read_filler
from sdlab.dataset import tree
from sdlab.dataset.colour import colour_of
from sdlab.errors import SdlabError
from sdlab.models.captioner import Captioner, resolve_captioner


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what."""

    config: CategorizeConfig
    found: tree.Scan
    output: Path  # where --organize sorts into, or would
    acts_in: Path | None  # the folder that is written to, and holds the journal
    cache: Path
    captioner: Captioner
    look: sheets.Look
    review_below: float
    filler: Filler

    @property
    def sorts(self) -> bool:
        """False for captions alone: they need no keywords."""
        return self.config.organize or not self.config.caption


def prepare(config: CategorizeConfig) -> Job:
    """Check the options, list the pictures and find the captioner. Raises SdlabError for what cannot work."""
    if config.sheet and not (config.organize or config.caption):
        raise SdlabError("goes with --organize or --caption", where="--sheet")
    if config.review_below is not None and not config.review:
        show.note("--review-below: doubtful captions are only listed; with --review they are kept apart")
    found = scan(config)
    output = places.output_for(config.images, config.output_dir)
    cache = places.cache_for(config.images, output if config.organize else None, config.cache_dir)
    look = sheets.Look(colour_of(config.background), config.max_pixels, config.num_workers)
    filler = read_filler(config.filler)
    captioner = resolve_captioner(config.load_model, allow_pickle=config.allow_pickle)
    below = captioner.review_below if config.review_below is None else config.review_below
    acts_in = output if config.organize else config.images if config.caption else None
    return Job(
        config, found, output, None if config.dry_run else acts_in, cache, captioner, look, below, filler
    )


def scan(config: CategorizeConfig) -> tree.Scan:
    """The pictures as they lie there now."""
    return tree.scan(config.images, use_txt=config.txt)


def settings_of(job: Job) -> dict[str, Any]:
    """What must be the same in a later run into the same folder, by the options' names.

    That is all that decides where a picture goes or what is written with it; contact sheets can be had afterwards.
    """
    config = job.config
    return {
        "mode": config.mode,
        "min_count": config.min_count,
        "depth": config.depth,
        "captions": config.captions,
        "caption": config.caption,
        "review": config.review,
        "review_below": job.review_below if config.review else None,
        "txt": config.txt,
        "load_model": job.captioner.name,
        "spacy_model": config.spacy_model,
        "filler": job.filler.fingerprint,
    }
