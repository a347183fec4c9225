"""What came of `sdlab crop`, as JSON and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab.curate.crop.run import Outcome, Settings
from sdlab.curate.crop.sizes import Cut, Size, is_strip
from sdlab.dataset.report import num_of, shown
from sdlab.dataset.tree import Scan
from sdlab.dataset.walk import Refused, sort_key
from sdlab.errors import SdlabError

SCHEMA = 1  # goes up when a key of the JSON changes its meaning or goes
MAX_LISTED = 20  # lines of a list but the refused; the JSON has all


@dataclass(frozen=True)
class Report:
    """Everything that is told of a run."""

    scan: Scan
    settings: Settings
    output: Path
    outcomes: tuple[Outcome, ...]
    seconds: float
    dry_run: bool = False
    preview: Path | None = None

    @property
    def cuts(self) -> list[Cut]:
        """Of the pictures that are good, made now or before."""
        return [one.cut for one in self.outcomes if one.cut]

    @property
    def num_done(self) -> int:
        """Good pictures whose results were there already."""
        return sum(one.was_done for one in self.outcomes)

    @property
    def num_made(self) -> int:
        """Pictures cut in this run."""
        return len(self.cuts) - self.num_done

    @property
    def refused(self) -> list[Refused]:
        """Every file and picture that is not used, and why."""
        bad = [Refused(one.task.sample.id, one.reason) for one in self.outcomes if not one.cut]
        return sorted([*self.scan.refused, *bad], key=lambda refused: sort_key(refused.id))

    @property
    def edited(self) -> list[str]:
        """Results that were changed since they were made, and are left."""
        return [id for one in self.outcomes for id in one.edited]

    @property
    def sizes(self) -> list[tuple[Size, int]]:
        """The sizes that come out and how many pictures have each, the most frequent first."""
        return sorted(
            Counter(cut.plan.size_px for cut in self.cuts).items(), key=lambda pair: (-pair[1], pair[0])
        )

    @property
    def num_own_scale(self) -> int:
        """Pictures too small for the size."""
        return sum(cut.plan.own_scale for cut in self.cuts)

    @property
    def num_enlarged(self) -> int:
        """Pictures too small for the size, enlarged as was asked for."""
        return sum(cut.plan.enlarged for cut in self.cuts)

    @property
    def strips(self) -> list[str]:
        """Pictures so long that their shorter side, shrunk with the longer one, is below the grid."""
        wanted = self.settings.wanted
        return [one.task.sample.id for one in self.outcomes if one.cut and is_strip(one.cut.from_px, wanted)]

    @property
    def num_without_face(self) -> int:
        """Pictures that were to be cut around faces and show none that was found."""
        return sum(cut.by == "saliency" for cut in self.cuts) if self.settings.focus == "face" else 0


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values. Paths are relative to the folder of the pictures, results to the output."""
    return {
        "schema": SCHEMA,
        "images": report.scan.root,
        "output": str(report.output),
        "dry_run": report.dry_run,
        "settings": report.settings.as_json(),
        "counts": {
            "pictures": len(report.scan.samples),
            "made": 0 if report.dry_run else report.num_made,
            "done_before": report.num_done,
            "refused": len(report.refused),
            "own_scale": report.num_own_scale,
            "enlarged": report.num_enlarged,
            "without_face": report.num_without_face,
            "ends_cut_off": len(report.strips),
            "edited": len(report.edited),
        },
        "sizes": [{"width": w, "height": h, "pictures": count} for (h, w), count in report.sizes],
        "pictures": [_picture(one) for one in report.outcomes if one.cut],
        "refused": [{"path": id, "reason": reason} for id, reason in report.refused],
        "edited": report.edited,
        "preview": str(report.preview) if report.preview else None,
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(report.num_made / report.seconds, 2) if report.seconds else None,
    }


def _picture(one: Outcome) -> dict[str, Any]:
    assert one.cut
    return {
        "path": one.task.sample.id,
        "result": one.result,
        "width": one.cut.plan.size_px[1],
        "height": one.cut.plan.size_px[0],
        "from_width": one.cut.from_px[1],
        "from_height": one.cut.from_px[0],
        "kept": [round(edge, 4) for edge in one.cut.box()],
        "by": one.cut.by,
        "own_scale": one.cut.plan.own_scale,
        "done_before": one.was_done,
    }


def as_lines(report: Report) -> Iterator[str]:
    """The report as a person reads it."""
    if not report.cuts:  # the error says the rest
        yield from _refused(report)
        return
    does = "would be cut" if report.dry_run else "cut"
    rate = (
        f", {report.num_made / report.seconds:.1f} a second" if report.num_made and not report.dry_run else ""
    )
    yield f"{_pictures(report.num_made)} {does}{rate}; in {shown(str(report.output))}"
    if report.num_done:
        yield f"{_pictures(report.num_done)} done before, unchanged"
    for (height, width), count in report.sizes[:MAX_LISTED]:
        yield f"  {width:>5} x {height:<5} {count}"
    if len(report.sizes) > MAX_LISTED:
        yield f"  … and {len(report.sizes) - MAX_LISTED} more sizes (--json has all)"
    if report.num_own_scale:
        yield f"{_pictures(report.num_own_scale)} smaller than asked for: cut to the shape, not enlarged (--upscale)"
    if report.num_enlarged:
        yield f"{_pictures(report.num_enlarged)} smaller than asked for: enlarged"
    if report.num_without_face:
        yield f"{_pictures(report.num_without_face)} without a face that was found: cut around what stands out"
    yield from _listed("changed since they were made, left as they are", report.edited, MAX_LISTED)
    yield from _listed(
        f"too long for --max-side {report.settings.wanted.max_side_px}, so the ends are cut off",
        report.strips,
        MAX_LISTED,
    )
    skipped = [f"{id}/  {num_of(count, 'file')}" for id, count in report.scan.skipped]
    yield from _listed("skipped folders", skipped, MAX_LISTED)
    yield from _refused(report)


def _refused(report: Report) -> Iterator[str]:
    refused = [f"{id}: {reason}" for id, reason in report.refused]
    yield from _listed("refused", refused, len(refused))


def nothing_usable(report: Report) -> SdlabError:
    """The error of a run without one good picture."""
    refused = report.refused
    what = f"no usable picture, {len(refused)} refused" if refused else "no pictures"
    first = (
        f"The first: {refused[0].id}: {refused[0].reason}" if refused else "Give the folder that holds them"
    )
    return SdlabError(what, where=report.scan.root, next_step=first)


def _listed(title: str, lines: Sequence[str], most: int) -> Iterator[str]:
    if not lines:
        return
    yield f"{title}: {len(lines)}"
    yield from (f"  {shown(line)}" for line in lines[:most])
    if len(lines) > most:
        yield f"  … and {len(lines) - most} more (--json has all)"


def _pictures(count: int) -> str:
    return num_of(count, "picture")
