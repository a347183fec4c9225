"""What `sdlab categorize` saw and did, as JSON and as lines of text."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from sdlab.curate.categorize import sheets
from sdlab.curate.categorize.arrange import counts
from sdlab.curate.categorize.plan import Told
from sdlab.curate.categorize.run import Report
from sdlab.curate.categorize.units import Unit
from sdlab.dataset.report import cut_to, num_of, num_with, shown
from sdlab.dataset.tree import SUFFIXES
from sdlab.dataset.walk import Refused, sort_key
from sdlab.errors import SdlabError

SCHEMA = 1  # goes up when a key of the JSON changes its meaning or goes
MAX_WORDS = 20  # of the table of keywords; the JSON has all
MAX_FOLDERS = 200  # lines of the tree
MAX_LISTED = 50  # lines of other lists, but for what is refused
MAX_LETTERS = 60  # of a keyword or folder; the JSON has all

_VERBS = {"copy": "copied", "hardlink": "linked", "move": "moved"}


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values. Paths are relative to the folder of the pictures, destinations to the output."""
    job, looked = report.job, report.looked
    config = job.config
    num = _num_pictures(report)
    return {
        "schema": SCHEMA,
        "images": looked.source.scan.root,
        "output": str(job.output) if config.organize else None,
        "dry_run": config.dry_run,
        "stopped": report.stopped,
        "settings": {
            "organize": config.organize, "caption": config.caption, "captions": config.captions,
            "min_count": config.min_count, "depth": config.depth, "mode": config.mode, "review": config.review,
            "review_below": job.review_below, "sheet": config.sheet,
        },
        "captioner": job.captioner.name,
        "pipeline": report.pipeline or None,
        "counts": {
            "pictures": num + _num_refused_pictures(report),
            "good": num,
            "refused": len(looked.refused),
            "asked": looked.num_asked,
            "doubtful": sum(len(one.unit.samples) for one in looked.told if one.doubtful),
            "placed": _num_placed(report) if report.acted and not report.stopped else 0,
            "placed_before": report.earlier.num_pictures,
            "captions_written": report.plan.num_captions if report.acted else 0,
            "sheets": report.plan.num_sheets if report.acted else 0,
            "operations": len(report.plan.operations),
            "failed": len(faults(report)),
        },
        "keywords": [{"keyword": word, "pictures": count} for word, count in _counts(report)],
        "folders": [
            {"path": folder, "pictures": count}
            for folder, count in sorted(_folders(report).items(), key=lambda pair: sort_key(pair[0]))
        ],
        "pictures": [
            {
                "path": sample.id,
                "caption": one.text,
                "from": _source(one),
                "confidence": one.confidence,
                "doubtful": one.doubtful,
                "keywords": list(one.keywords),
                "destination": report.places.get(sample.id, report.before.get(sample.id)),
            }
            for one in looked.told
            for sample in one.unit.samples
        ],
        "refused": [{"path": id, "reason": reason} for id, reason in looked.refused],
        "failed": [{"path": id, "reason": reason} for id, reason in faults(report)],
        "notes": [{"path": id, "text": text} for id, text in _notes(report)],
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(num / report.seconds, 2) if report.seconds else None,
    }  # fmt: skip


def as_lines(report: Report) -> Iterator[str]:
    """The report for people: what was seen, where it goes, what is refused, and at the end what was done."""
    looked, config = report.looked, report.job.config
    if is_useless(report):  # the error says the rest
        yield from _headed("Refused", [_line(one) for one in looked.refused])
        return
    yield (
        f"{shown(looked.source.scan.root)}: {_pictures(_num_pictures(report))}, {len(looked.refused)} refused; "
        f"{num_with(len(looked.source.scan.companions))}"
    )
    yield _captions(report)
    if report.job.sorts:
        words = _counts(report)
        lines = [f"{count:>6}  {shown(cut_to(word, MAX_LETTERS))}" for word, count in words]
        yield from _headed("Keywords", _some(lines, MAX_WORDS))
        yield from _headed(_where(report), _tree(report))
    yield from _headed("Doubtful captions", _doubtful(report))
    yield from _headed("Notes", _some([_line(note) for note in _notes(report)], MAX_LISTED))
    yield from _headed("Refused", [_line(one) for one in looked.refused])
    yield from _headed("Failed", [_line(one) for one in faults(report)])
    yield ""
    yield from _done(report)
    if config.organize and (report.acted or report.resumed) and not report.stopped:
        yield from _next(report)


def is_useless(report: Report) -> bool:
    """Whether there is no good picture, here or from earlier runs."""
    return not (report.looked.told or report.earlier.placed or report.stopped)


def nothing_usable(report: Report) -> SdlabError:
    """The error for a folder without a good picture."""
    scan = report.looked.source.scan
    seen = Counter(reason for _, reason in report.looked.refused)
    seen.update({"in folders left out by their name (__)": sum(count for _, count in scan.skipped)})
    reasons = [f"{count} x {reason}" for reason, count in seen.most_common(4) if count]
    more = len(seen) - 4
    text = "; ".join([*reasons, *([f"{more} more reasons"] if more > 0 else [])]) or "the folder is empty"
    return SdlabError(
        f"no picture here can be used ({text})",
        where=scan.root,
        next_step=f"Pictures are {' '.join(sorted(SUFFIXES))}",
    )


def _captions(report: Report) -> str:
    told = report.looked.told
    by_model = [one.confidence for one in told for _ in one.unit.samples if one.confidence is not None]
    num_own = sum(len(one.unit.samples) for one in told if one.confidence is None)
    parts = []
    if by_model:
        doubtful = sum(len(one.unit.samples) for one in told if one.doubtful)
        parts.append(
            f"{len(by_model)} by {report.job.captioner.name} ({report.looked.num_asked} looked at now), "
            f"median confidence {median(by_model):.2f}, {doubtful} doubtful (below {report.job.review_below:g})"
        )
    if num_own:
        parts.append(f"{num_own} the pictures' own")
    return f"captions: {'; '.join(parts) or 'none'}"


def _where(report: Report) -> str:
    job = report.job
    if job.acts_in is None:
        return f"{shown(str(job.output))} as it would be"
    return shown(str(job.output))


def _tree(report: Report) -> list[str]:
    """A line for each folder with the pictures in and below it."""
    below: Counter[str] = Counter()
    for folder, count in _folders(report).items():
        segments = folder.split("/")
        below.update({"/".join(segments[:depth]): count for depth in range(1, len(segments) + 1)})
    rows = [
        (
            "  " * folder.count("/") + shown(cut_to(folder.rpartition("/")[2], MAX_LETTERS)) + "/",
            below[folder],
        )
        for folder in sorted(below, key=sort_key)
    ]
    wide = max((len(name) for name, _ in rows), default=0)
    return _some([f"{name:<{wide}}  {count:>5}" for name, count in rows], MAX_FOLDERS)


def _doubtful(report: Report) -> list[str]:
    lines = [
        f'{shown(sample.id)}: {one.confidence:.2f} "{shown(one.made)}"'
        for one in report.looked.told
        if one.doubtful
        for sample in one.unit.samples
    ]
    return _some(lines, MAX_LISTED)


def _done(report: Report) -> Iterator[str]:
    job, config, planned = report.job, report.job.config, report.plan
    num_new = _num_placed(report)
    rate = round(_num_pictures(report) / max(report.seconds, 1e-9))
    took = f"{report.seconds:.1f} s ({_pictures(rate)} a second)"
    if report.resumed is not None:
        yield f"{num_of(report.resumed.num_done, 'file')} of the stopped run done"
    if report.stopped:
        yield f"stopped after {took}"
    elif not (config.organize or config.caption):
        yield f"Nothing but the cache was written, in {took}"
        yield "--organize makes these folders, --caption writes the captions"
    elif config.dry_run:
        yield f"Nothing but the cache was written, in {took}"
        files, captions = len(planned.operations), planned.num_captions
        yield f"Without --dry-run it would be {num_of(files, 'file')}, {num_of(captions, 'caption')} of them"
    elif report.acted is None:
        if config.organize:
            there = f"{_pictures(report.earlier.num_pictures)} in {shown(str(job.output))}"
            yield f"completed: {there}" if report.resumed else f"nothing to do: {there} already"
        else:
            yield "completed" if report.resumed else "nothing to do: each picture has its caption already"
    elif config.organize:
        written = f", {_written(planned.num_captions)}" if config.caption else ""
        if report.places:
            yield f"{_pictures(num_new)} {_VERBS[config.mode]} to {shown(str(job.output))}{written}, in {took}"
        if report.earlier.num_pictures:
            yield f"{_pictures(report.earlier.num_pictures)} from earlier runs"
        if planned.num_copied_links:
            yield f"{_pictures(planned.num_copied_links)} copied, as they are links: their files may belong elsewhere"
    elif planned.num_captions:
        yield f"{_written(planned.num_captions)} in {took}"
    if report.acted and not report.stopped and planned.num_sheets:
        yield f"{num_of(planned.num_sheets, 'contact sheet')} in {shown(str(job.acts_in))}/{sheets.FOLDER}"


def _next(report: Report) -> Iterator[str]:
    output = report.job.output
    yield (
        f"Look at {shown(str(output))}; when it is right, give it a new name without __ in front and train on it: "
        "sdlab train-sd --images …"
    )
    yield f"To take it back: sdlab categorize --undo {shlex.quote(shown(str(output)))}"


def _num_pictures(report: Report) -> int:
    return sum(len(one.unit.samples) for one in report.looked.told)


def _num_placed(report: Report) -> int:
    """Pictures that were to be placed in this run, less those that could not be."""
    failed = {fault.id for fault in report.acted.faults} if report.acted else set()
    return sum(path not in failed for path in report.places.values())


def _num_refused_pictures(report: Report) -> int:
    return sum(id.lower().endswith(tuple(SUFFIXES)) for id, _ in report.looked.refused)


def _counts(report: Report) -> list[tuple[str, int]]:
    """Keywords by the number of pictures that have them."""
    return counts({s.id: one.keywords for one in report.looked.told for s in one.unit.samples})


def _folders(report: Report) -> Mapping[str, int]:
    """Pictures by the folder they are or come to."""
    where: Sequence[str] = [*report.places.values(), *report.before.values()]
    return Counter(path.rpartition("/")[0] for path in where)


def faults(report: Report) -> Sequence[Refused]:
    """What was planned and could not be done."""
    both = (report.resumed, report.acted)
    return [fault for acted in both if acted is not None for fault in acted.faults]


def _notes(report: Report) -> list[Refused]:
    """What is to be known of files that are used all the same."""
    own = {note.id for note in report.plan.notes}
    of_scan = (
        # its last words say what training would take in its place: here that is the model's caption
        Refused(id, text.rpartition("; ")[0] or text)
        for id, text in report.looked.source.scan.notes
        if id not in own
    )
    return sorted([*of_scan, *report.plan.notes], key=lambda note: sort_key(note.id))


def _source(one: Told) -> str:
    """Where the caption that counts is from."""
    if one.text == one.made and one.made != one.own:
        return "model"
    own = _own_source(one.unit)
    return own if one.text == one.own else f"{own}+model"


def _own_source(unit: Unit) -> str:
    return unit.samples[0].source if unit.own else "model"


def _line(one: Refused) -> str:
    return f"{shown(one.id) or '.'}: {shown(one.reason)}"


def _headed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from (f"  {line}" for line in lines)


def _some(lines: Sequence[str], limit: int) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - limit
    return [*lines[:limit], f"… and {more} more (--json has all)"] if more > 0 else list(lines)


def _pictures(count: int) -> str:
    return num_of(count, "picture")


def _written(count: int) -> str:
    return f"{num_of(count, 'caption')} written"
