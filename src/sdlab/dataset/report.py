"""A dataset's report as JSON and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unicodedata import combining, east_asian_width

from sdlab.dataset.inspect import Report, Size
from sdlab.dataset.tree import SUFFIXES, folder_prompt
from sdlab.dataset.walk import sort_key
from sdlab.errors import SdlabError

SCHEMA = 1  # goes up when a key of the JSON changes its meaning or goes
MAX_FOLDERS = 200  # lines of the tree; the JSON has all of them
MAX_LISTED = 50  # lines of the lists of things that are used all the same


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values. Paths are relative to the root; sizes are height and width in pixels."""
    counts = report.prompts
    return {
        "schema": SCHEMA,
        "root": report.scan.root,
        "found": report.found,
        "used": len(report.used),
        "refused": [{"path": id, "reason": reason} for id, reason in report.refused],
        "companions": list(report.scan.companions),
        "skipped": [{"path": id, "files": count} for id, count in report.scan.skipped],
        "folders": [
            {"path": id, "pictures": count, "prompt": folder_prompt(id)}
            for id, count in sorted(_own_counts(report).items(), key=lambda pair: sort_key(pair[0]))
        ],
        "prompts": [{"prompt": prompt, "pictures": counts[prompt]} for prompt in sorted(counts)],
        "captions": report.captions,
        "references": dict(zip(("pictures", "files"), report.num_references, strict=True)),
        "empty_prompts": list(report.empty_prompts),
        "too_long": None if report.too_long is None else [
            {
                "prompt": long.prompt,
                "pictures": counts[long.prompt],
                "tokens": long.num_tokens,
                "window": long.window,
                "lost": long.lost,
            }
            for long in report.too_long
        ],
        "sizes": _sizes_json(report.sizes),
        "buckets": None if report.sizes is None else [
            {"height": size[0], "width": size[1], "pictures": count} for size, count in report.buckets
        ],
        "upscaled": None if report.sizes is None else report.num_upscaled,
        "duplicates": None if report.duplicates is None else [list(group) for group in report.duplicates],
        "notes": [{"path": id, "text": text} for id, text in report.scan.notes],
    }  # fmt: skip


def as_lines(report: Report) -> Iterator[str]:
    """The report for people: what is used first, what needs a look after it, what is refused at the end."""
    scan = report.scan
    yield (
        f"{shown(scan.root)}: {_files(report.found)} found, {_pictures(len(report.used))} used, "
        f"{len(report.refused)} refused; {num_with(len(scan.companions))}"
    )
    yield from _headed("Prompts", _tree(report))
    captions = report.captions
    yield from _headed(
        "Captions",
        [f"from folders {captions['folder']}, from .cap {captions['cap']}, from .txt {captions['txt']}"],
    )
    own = Counter(sample.prompt for sample in report.used if sample.source != "folder")
    told = (f'{count}  "{shown(cut_to(prompt, 200))}"' for prompt, count in sorted(own.items()))
    yield from _headed("Prompts from captions", _some(told, len(own)))
    yield from _headed("Reference pictures", _references(report))
    yield from _headed("Sizes", _sizes(report))
    yield from _headed("Left out by their name (__)", _skipped(report))
    yield from _headed("Without a prompt", _some(map(shown, report.empty_prompts), len(report.empty_prompts)))
    yield from _headed("Longer than the text encoder reads", _too_long(report))
    groups = report.duplicates or ()
    same = (_same(group) for group in groups)
    yield from _headed("The same picture more than once", _some(same, len(groups)))
    notes = (f"{shown(id)}: {shown(text)}" for id, text in scan.notes)
    yield from _headed("Notes", _some(notes, len(scan.notes)))
    yield from _headed("Refused", [f"{shown(id) or '.'}: {shown(reason)}" for id, reason in report.refused])


def nothing_usable(report: Report) -> SdlabError:
    """The error for a dataset without a picture to train on: what was seen, and why it did not count."""
    seen = Counter(reason for _, reason in report.refused)
    seen.update({"in folders left out by their name (__)": sum(count for _, count in report.scan.skipped)})
    reasons = [f"{count} x {reason}" for reason, count in seen.most_common(4) if count]
    more = len(seen) - 4
    text = "; ".join([*reasons, *([f"{more} more reasons"] if more > 0 else [])]) or "the folder is empty"
    return SdlabError(
        f"no picture here can be used ({text})",
        where=report.scan.root,
        next_step=f"Pictures are {' '.join(sorted(SUFFIXES))}, in folders named by their prompts",
    )


def shown(text: str) -> str:
    """The text on one line, with everything that is not printable made visible."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # a byte of a name that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _headed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from (f"  {line}" for line in lines)


def _some(lines: Iterator[str], count: int) -> list[str]:
    """The first lines and how many more there are."""
    first = [line for line, _ in zip(lines, range(MAX_LISTED), strict=False)]
    return [*first, f"… and {count - MAX_LISTED} more (--json has all)"] if count > MAX_LISTED else first


def _same(group: Sequence[str]) -> str:
    more = f" and {len(group) - 4} more" if len(group) > 4 else ""
    return " = ".join(map(shown, group[:4])) + more


def _own_counts(report: Report) -> Counter[str]:
    return Counter(sample.id.rpartition("/")[0] for sample in report.used)


def _tree(report: Report) -> list[str]:
    """A line for each folder: its name, the pictures in and below it, the prompt it gives."""
    own = _own_counts(report)
    below: Counter[str] = Counter()
    for folder, count in own.items():
        segments = folder.split("/") if folder else []
        below.update({"/".join(segments[:depth]): count for depth in range(len(segments) + 1)})
    prompts = {s.id.rpartition("/")[0]: s.prompt for s in report.used if s.source == "folder"}
    folders = sorted(below, key=sort_key)
    rows = []
    for folder in folders[:MAX_FOLDERS]:
        depth = folder.count("/") + 1 if folder else 0
        name = "  " * depth + (shown(folder.rpartition("/")[2]) if folder else ".") + "/"
        prompt = f'"{shown(prompts[folder])}"' if folder in prompts else "captions" if own[folder] else ""
        rows.append((name, str(below[folder]), prompt))
    wide = max((_columns(name) for name, _, _ in rows), default=0)
    digits = max((len(count) for _, count, _ in rows), default=0)
    lines = [
        f"{name}{' ' * (wide - _columns(name))}  {count:>{digits}}  {prompt}".rstrip()
        for name, count, prompt in rows
    ]
    more = len(folders) - MAX_FOLDERS
    return [*lines, f"… and {more} more folders (--json has all)"] if more > 0 else lines


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _references(report: Report) -> list[str]:
    num_pictures, num_references = report.num_references
    if not num_pictures:
        return []
    have = "has" if num_pictures == 1 else "have"
    return [
        f"{_pictures(num_pictures)} {have} {num_references}: training of edits makes the picture from them, "
        "as its prompt says"
    ]


def _sizes(report: Report) -> list[str]:
    if report.sizes is None:
        return ["not read: more pictures than are opened unasked; --sizes reads them"]
    if not report.sizes:
        return []
    low, middle, high = _ranked(report.sizes)
    lines = [f"smallest {_size(low)}, median {_size(middle)}, largest {_size(high)} (width x height)"]
    digits = max(len(str(count)) for _, count in report.buckets)
    lines += [f"{_size(size):>9} bucket  {count:>{digits}}" for size, count in report.buckets]
    if report.num_upscaled:
        lines.append(f"{_pictures(report.num_upscaled)} smaller than their bucket: will be enlarged")
    return lines


def _skipped(report: Report) -> list[str]:
    folders = report.scan.skipped
    return _some((f"{shown(id)}/  {_files(count)}" for id, count in folders), len(folders))


def _too_long(report: Report) -> list[str]:
    counts, long = report.prompts, report.too_long or ()
    lines = (
        f'"{shown(cut_to(one.prompt, 60))}" ({_pictures(counts[one.prompt])}): {one.num_tokens} tokens, '
        f'{one.window} are read; lost: "{shown(cut_to(one.lost, 200))}"'
        for one in long
    )
    return _some(lines, len(long))


def _sizes_json(sizes: Sequence[Size] | None) -> dict[str, list[int]] | None:
    if not sizes:
        return None
    return {name: list(size) for name, size in zip(("min", "median", "max"), _ranked(sizes), strict=True)}


def _ranked(sizes: Sequence[Size]) -> tuple[Size, Size, Size]:
    """The smallest, the middle and the largest by area."""
    ranked = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ranked[0], ranked[len(ranked) // 2], ranked[-1]


def cut_to(text: str, length: int) -> str:
    """The text, or its start and …, in at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _size(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def num_of(count: int, thing: str) -> str:
    """ "1 file", "2 files"; the plural is made with an s."""
    return f"{count} {thing}{'s' * (count != 1)}"


def num_with(count: int) -> str:
    """How many files go along with the pictures, in words."""
    return f"{num_of(count, 'caption or reference file')} {'goes' if count == 1 else 'go'} with them"


def _files(count: int) -> str:
    return num_of(count, "file")


def _pictures(count: int) -> str:
    return num_of(count, "picture")
