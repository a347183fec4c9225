"""A look into the pictures of a Scan before any costly second: sizes, buckets, copies, prompts too long."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from sdlab.dataset.buckets import bucket_sizes, is_upscaled, nearest
from sdlab.dataset.cache import ahead
from sdlab.dataset.files import sha256_of
from sdlab.dataset.picture import Unusable, looks_whole, open_picture, read_size
from sdlab.dataset.tree import Refused, Sample, Scan, refusal
from sdlab.dataset.walk import sort_key

Size = tuple[int, int]  # height and width in pixels
Track = Callable[[str, Iterator[tuple[str, str]]], Iterable[tuple[str, str]]]


class Window(Protocol):
    """How much of a prompt a model's text encoder reads."""

    @property
    def window(self) -> int:
        """Tokens that are read, with those that the model itself adds."""

    def lost(self, prompt: str) -> tuple[int, str]:
        """The tokens of a prompt, with those that the model itself adds, and its words that are cut off."""


class TooLong(NamedTuple):
    """A prompt of which the text encoder sees only the beginning."""

    prompt: str
    num_tokens: int  # with those that the model itself adds
    window: int  # how many of them are read
    lost: str  # the words that are not seen


@dataclass(frozen=True)
class Report:
    """A Scan and what looking into its pictures told. None: was not looked at."""

    scan: Scan
    used: tuple[Sample, ...]
    refused: tuple[Refused, ...]
    sizes: tuple[Size, ...] | None = None  # of the used pictures, in their order
    bucket_of: tuple[Size, ...] | None = None  # the size each used picture is trained in
    duplicates: tuple[tuple[str, ...], ...] | None = None  # ids of pictures with the same bytes
    too_long: tuple[TooLong, ...] | None = None

    @property
    def found(self) -> int:
        """Files that stand for themselves."""
        return len(self.used) + len(self.refused)

    @property
    def prompts(self) -> Counter[str]:
        """How many pictures have each prompt."""
        return Counter(sample.prompt for sample in self.used)

    @property
    def captions(self) -> dict[str, int]:
        """How many pictures have their prompt from where."""
        sources = Counter(sample.source for sample in self.used)
        return {source: sources[source] for source in ("folder", "cap", "txt")}

    @property
    def num_references(self) -> tuple[int, int]:
        """How many pictures have references, and how many references those are."""
        counts = [len(sample.references) for sample in self.used if sample.references]
        return len(counts), sum(counts)

    @property
    def buckets(self) -> tuple[tuple[Size, int], ...]:
        """The sizes that are trained in, and how many pictures each has."""
        return tuple(sorted(Counter(self.bucket_of or ()).items()))

    @property
    def num_upscaled(self) -> int:
        """How many pictures are smaller than their bucket."""
        return sum(map(is_upscaled, self.sizes or (), self.bucket_of or ()))

    @property
    def empty_prompts(self) -> tuple[str, ...]:
        """Ids of the pictures that are trained without any words."""
        return tuple(sample.id for sample in self.used if not sample.prompt.strip(" ,"))

    def without(self, bad: Iterable[Refused]) -> Report:
        """The same, some more pictures refused."""
        bad = tuple(bad)
        gone = {refused.id for refused in bad}
        kept = [index for index, sample in enumerate(self.used) if sample.id not in gone]
        groups = None if self.duplicates is None else _without(self.duplicates, gone)
        return replace(
            self,
            used=tuple(self.used[index] for index in kept),
            refused=tuple(sorted((*self.refused, *bad), key=lambda refused: sort_key(refused.id))),
            sizes=None if self.sizes is None else tuple(self.sizes[index] for index in kept),
            bucket_of=None if self.bucket_of is None else tuple(self.bucket_of[index] for index in kept),
            duplicates=groups,
        )


def inspect(
    found: Scan,
    *,
    headers: bool,
    deep: bool,
    image_size: int,
    grid: int,
    max_pixels: int,
    num_workers: int,
    references: bool = True,
    track: Track = lambda what, items: items,
) -> Report:
    """Look at the pictures of a scan: their headers for sizes, buckets and copies, `deep` at every pixel.

    Without `deep` those are decoded that look cut off, and the few in formats where that cannot be seen.
    With `references` those are looked at alike, and a picture with a bad one is refused.
    `track(what, results)` is handed what is done as it comes, to show how far it is, and passes it on.

    Raises SdlabError where image_size is no multiple of `grid`.
    """
    sizes = bucket_sizes(image_size, grid=grid)
    report = Report(found, found.samples, found.refused)
    if deep:
        decoded = _reasons(report.used, lambda path: _decode(path, max_pixels), num_workers, references)
        report = report.without(Refused(*pair) for pair in track("decoding", decoded) if pair[1])
    if not (headers or deep):
        return report
    sizes_of: dict[str, Size] = {}

    def look(path: str) -> None:
        sizes_of[path] = read_size(path, max_pixels=max_pixels)
        if not deep and not looks_whole(path):
            _decode(path, max_pixels)

    measured_now = _reasons(report.used, look, num_workers, references)
    report = report.without(Refused(*pair) for pair in track("reading headers", measured_now) if pair[1])
    measured = tuple(sizes_of[sample.path] for sample in report.used)
    return replace(
        report,
        sizes=measured,
        bucket_of=tuple(nearest(size, sizes) for size in measured),
        duplicates=duplicates(report.used, num_workers=num_workers),
    )


def duplicates(samples: Sequence[Sample], *, num_workers: int) -> tuple[tuple[str, ...], ...]:
    """Ids of pictures with the same bytes, in groups; only files of equal length are read."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        try:
            by_length.setdefault(os.stat(sample.path).st_size, []).append(sample)
        except OSError:
            continue  # gone since the scan; whoever opens it reports it
    doubtful = [sample for group in by_length.values() if len(group) > 1 for sample in group]
    by_content: dict[str, list[str]] = {}
    for sample, content in ahead(_content, doubtful, num_workers):
        by_content.setdefault(content or sample.id, []).append(sample.id)
    return tuple(sorted(tuple(sorted(group)) for group in by_content.values() if len(group) > 1))


def may_be_too_long(prompt: str, room: int = 75) -> bool:
    """Whether the prompt could have more than `room` tokens: each stands for at least one byte."""
    return len(prompt.lower().encode("utf-8", "surrogatepass")) > room


def too_long(prompts: Iterable[str], window: Window) -> tuple[TooLong, ...]:
    """The prompts that do not fit into the window, with what is cut off, in their order."""
    counted = ((prompt, *window.lost(prompt)) for prompt in prompts)
    return tuple(
        TooLong(prompt, num_tokens, window.window, lost)
        for prompt, num_tokens, lost in counted
        if num_tokens > window.window
    )


def _without(groups: Iterable[tuple[str, ...]], gone: set[str]) -> tuple[tuple[str, ...], ...]:
    left = (tuple(id for id in group if id not in gone) for group in groups)
    return tuple(group for group in left if len(group) > 1)


def _reasons(
    samples: Sequence[Sample], look: Callable[[str], None], num_workers: int, references: bool
) -> Iterator[tuple[str, str]]:
    """(id, why it is refused, if so) of each sample, in order; for its references too where these count."""

    def reason_against(sample: Sample) -> str:
        faults = {}
        for path in (sample.path, *(sample.references if references else ())):
            try:
                look(path)
            except Unusable as reason:
                faults[path] = str(reason)
        return refusal(sample, faults)

    return ((sample.id, why) for sample, why in ahead(reason_against, samples, num_workers))


def _decode(path: str, max_pixels: int) -> None:
    # Reading a JPEG small still goes through all of its data, in half the time and little memory.
    open_picture(path, max_pixels=max_pixels, at_least_px=(32, 32))


def _content(sample: Sample) -> str:
    try:
        return sha256_of(sample.path)
    except OSError:
        return ""
