"""A folder of pictures becomes prompts: every file below the root is used, goes with one used, or is refused.

    girl/long_hair/a.jpg      "girl, long hair"
    _v2/girl/a.jpg            "girl"           a folder with one leading underscore adds nothing
    girl/__review/a.jpg       not in the dataset
    girl/a.jpg + girl/a.cap   the caption replaces the folder prompt (a.txt does where there is no a.cap)
    girl/a.ref.png            a reference picture of girl/a.jpg, never a sample of its own

Needs the standard library only, and opens caption files but no picture. Everything is sorted by id: segment
by segment, by code point, the same on every system.
"""

from __future__ import annotations

import importlib.util
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sdlab.dataset.captions import CaptionError, clean, read_caption
from sdlab.dataset.walk import Folder, Walk, sort_key
from sdlab.dataset.walk import Refused as Refused
from sdlab.errors import SdlabError, gathered
from sdlab.options import did_you_mean

HEIF_SUFFIXES = frozenset({".heic", ".heif"})
SUFFIXES = HEIF_SUFFIXES | {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
CAPTION_SUFFIXES = (".cap", ".txt")  # the first one there is counts
MAX_REPEATS = 10_000

_REFERENCE = re.compile(r"(.+)\.ref(\d*)", re.IGNORECASE | re.DOTALL)
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of a pair in UTF-16, alone: no text in any encoding


class Sample(NamedTuple):
    """One picture to train on."""

    id: str  # path relative to the root, with "/"
    path: str  # the same joined to the root: opens the file
    prompt: str
    source: str  # where the prompt is from: "folder", "cap" or "txt"
    references: tuple[str, ...] = ()  # paths of a.ref.png, a.ref2.png ... in the order of their numbers


@dataclass(frozen=True)
class Scan:
    """What a folder holds. Every file met is in exactly one of `samples`, `companions` and `refused`."""

    root: str
    samples: tuple[Sample, ...]
    refused: tuple[Refused, ...]
    companions: tuple[str, ...]  # ids of the caption and reference files that belong to a picture
    skipped: tuple[tuple[str, int], ...]  # folders left out by their ``__``, and how many files they hold
    notes: tuple[tuple[str, str], ...]  # (id, what to know about something that is used all the same)
    num_files: int  # counted on the walk: len(samples) + len(companions) + len(refused)

    @property
    def found(self) -> int:
        """Files that stand for themselves: used + refused."""
        return len(self.samples) + len(self.refused)


def scan(root: str | os.PathLike[str], *, prompt_prefix: str = "", use_txt: bool = True) -> Scan:
    """Find the pictures below `root` and the prompt of each.

    Links are followed once: one to a folder that already counts, or that holds the root, is refused.
    Raises SdlabError where `root` is missing, is not a folder or cannot be listed.
    """
    base = os.fspath(root)
    _check_root(base)
    walk, found = Walk(base), _Found(_clean_prefix(prompt_prefix), use_txt)
    for folder in walk.folders():
        found.add(folder)
    return Scan(
        root=base,
        samples=tuple(sorted(found.samples, key=lambda sample: sort_key(sample.id))),
        refused=tuple(sorted(found.refused + walk.refused, key=lambda refused: sort_key(refused.id))),
        companions=tuple(sorted(found.companions, key=sort_key)),
        skipped=tuple(sorted(walk.skipped, key=lambda skipped: sort_key(skipped[0]))),
        notes=tuple(sorted(found.notes, key=lambda note: sort_key(note[0]))),
        num_files=walk.num_files,
    )


def refusal(sample: Sample, faults: Mapping[str, str]) -> str:
    """Why the sample is refused, by the faults of files: of its picture, else of the first reference that has one.

    Empty where there is no fault. An edit without one of its references would be trained to be made from nothing.
    """
    if sample.path in faults:
        return faults[sample.path]
    bad = next((path for path in sample.references if path in faults), None)
    return "" if bad is None else f"its reference {os.path.basename(bad)}: {faults[bad]}"


def folder_prompt(id: str) -> str:
    """The prompt of a folder's id: ``girl/_v2/long_hair`` is ``girl, long hair``."""
    return ", ".join(filter(None, map(segment_prompt, id.split("/"))))


def segment_prompt(name: str) -> str:
    """What one folder name adds: spaces for underscores; nothing if it starts with an underscore."""
    return "" if name.startswith("_") else clean(readable(name).replace("_", " "))


def readable(name: str) -> str:
    """A file name as text: what is not UTF-8 is taken for cp932 (archives from Japan), else for Latin-1.

    Halves of UTF-16 pairs, which names on Windows may have, become ``_``.
    """
    if name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name):
        return name
    data = _HALVES.sub("_", name).encode("utf-8", "surrogateescape")
    for encoding in ("cp932", "latin-1"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes any bytes")


def reference_of(stem: str) -> tuple[str, str] | None:
    """Of a reference's name without suffix, ``a.ref2``: the picture's, ``a``, and the digits; else None."""
    match = _REFERENCE.fullmatch(stem)
    return None if match is None else (match[1], match[2])


def weigh(
    samples: Sequence[Sample], *, repeats: Sequence[str] = (), balance: bool = False
) -> tuple[int, ...]:
    """How many times each sample is seen in an epoch, at least once.

    `repeats` are ``folder=times``, the folder relative to the root; of several that hold a sample the deepest
    counts. `balance` repeats the samples of smaller prompt folders so that each prompt folder is seen about
    equally often; both multiply. Raises SdlabError naming every entry that is wrong.
    """
    folders = [sample.id.rpartition("/")[0] for sample in samples]
    times_of = _parse_repeats(repeats, folders)
    prompts = {folder: folder_prompt(folder) if balance else "" for folder in set(folders)}
    counts = Counter(prompts[folder] for folder in folders)
    most = max(counts.values(), default=0)
    times = {
        folder: next((times_of[above] for above in _upwards(folder) if above in times_of), 1)
        * max(1, round(most / counts[prompt]))
        for folder, prompt in prompts.items()
    }
    return tuple(times[folder] for folder in folders)


def _parse_repeats(repeats: Sequence[str], folders: Sequence[str]) -> dict[str, int]:
    known = {above for folder in set(folders) for above in _upwards(folder)}
    times_of, faults = {}, []
    for entry in repeats:
        name, equals, count = entry.rpartition("=")
        folder = unicodedata.normalize("NFC", name.replace(os.sep, "/").strip("/")).removeprefix("./")
        folder = "" if folder == "." else folder
        same = [other for other in known if unicodedata.normalize("NFC", other) == folder]
        if not equals or not count.strip().isdecimal() or not 1 <= int(count) <= MAX_REPEATS:
            faults.append(f"'{entry}' is not folder=times with times from 1 to {MAX_REPEATS}")
        elif not same:
            faults.append(f"no pictures in a folder '{name}'{did_you_mean(folder, sorted(known - {''}))}")
        else:
            times_of.update(dict.fromkeys(same, int(count)))
    if faults:
        raise gathered(faults, where="--repeats")
    return times_of


def _upwards(folder: str) -> Iterator[str]:
    """The folder, the one above it, and so on to the root, which is ""."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


@dataclass
class _Found:
    """Gathers samples folder by folder."""

    prefix: str
    use_txt: bool
    samples: list[Sample] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    companions: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    heif: bool = field(default_factory=lambda: importlib.util.find_spec("pillow_heif") is not None)

    def add(self, folder: Folder) -> None:
        """Sort the folder's files into samples, companions and refused."""
        pictures, captions, references = self._sorted_out(folder)
        prompt = self._with_prefix(folder_prompt(folder.id))
        if readable(folder.id) != folder.id and (pictures or captions):
            self.notes.append((folder.id, f"the name is not UTF-8; read as '{folder_prompt(folder.id)}'"))
        head, path = folder.head, folder.path
        if not captions and not references:  # the common case: 100,000 pictures pass here
            self.samples += [Sample(head + name, path + name, prompt, "folder") for name in pictures]
            return
        stems = {_stem(name) for name in pictures}
        captioned = self._read_captions(folder, captions, stems)
        referenced = self._match_references(folder, references, stems)
        for name in pictures:
            text, source = captioned.get(_stem(name), (None, "folder"))
            self.samples.append(
                Sample(
                    head + name,
                    path + name,
                    prompt if text is None else self._with_prefix(text),
                    source,
                    tuple(path + other for other in referenced.get(_stem(name), ())),
                )
            )

    def _sorted_out(self, folder: Folder) -> tuple[list[str], list[str], list[str]]:
        """Names of the pictures, captions and reference pictures; the others are refused."""
        pictures: list[str] = []
        captions: list[str] = []
        references: list[str] = []
        for name in folder.names:
            suffix = _suffix(name)
            if suffix in SUFFIXES and (self.heif or suffix not in HEIF_SUFFIXES):
                (references if _is_reference(name) else pictures).append(name)
            elif suffix in CAPTION_SUFFIXES:
                captions.append(name)
            elif suffix in SUFFIXES:
                self._refuse(folder, name, 'needs: pip install "sdlab[heic]"')
            else:
                self._refuse(folder, name, f"not a picture ({suffix or 'no suffix'})")
        return pictures, captions, references

    def _read_captions(self, folder: Folder, names: list[str], stems: set[str]) -> dict[str, tuple[str, str]]:
        """Text and source of the captions that count, by the stem of their picture."""
        files: dict[str, dict[str, str]] = {}
        for name in reversed(names):  # a.cap before a.CAP
            stem, suffix = _stem(name), _suffix(name)
            of_picture = files.setdefault(stem, {})
            if stem not in stems:
                self._refuse(folder, name, "a caption without its picture: no picture has this name")
            elif suffix in of_picture:
                self._refuse(folder, name, f"a second caption: {of_picture[suffix]} counts")
            else:
                of_picture[suffix] = name
                self.companions.append(folder.head + name)
        suffixes = CAPTION_SUFFIXES if self.use_txt else CAPTION_SUFFIXES[:1]
        found = {}
        for stem, of_picture in files.items():
            suffix = next((suffix for suffix in suffixes if suffix in of_picture), "")
            text = self._read(folder, of_picture[suffix]) if suffix else None
            if text:
                found[stem] = (text, suffix[1:])
        return found

    def _read(self, folder: Folder, name: str) -> str | None:
        try:
            text = read_caption(folder.path + name)
            why = "" if text else "only comments and empty lines"
        except CaptionError as reason:
            text, why = None, str(reason)
        if why:
            self.notes.append((folder.head + name, f"{why}; the folder prompt stands"))
        return text

    def _match_references(self, folder: Folder, names: list[str], stems: set[str]) -> dict[str, list[str]]:
        """Names of the reference pictures in the order of their numbers, by the stem of their picture."""
        numbered: dict[str, list[tuple[int, str]]] = {}
        for name in names:
            owner, number = _reference(name)
            if owner in stems:
                numbered.setdefault(owner, []).append((number, name))
                self.companions.append(folder.head + name)
            else:
                self._refuse(
                    folder, name, "a reference picture without its picture: no picture has this name"
                )
        return {owner: [name for _, name in sorted(pairs)] for owner, pairs in numbered.items()}

    def _refuse(self, folder: Folder, name: str, reason: str) -> None:
        self.refused.append(Refused(folder.head + name, reason))

    def _with_prefix(self, prompt: str) -> str:
        return self.prefix + prompt if prompt else self.prefix.rstrip(", ")


def _suffix(name: str) -> str:
    """The suffix in lower case with its dot, or nothing."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _stem(name: str) -> str:
    """What a picture and its caption have in common: the name without its suffix, in NFC."""
    return unicodedata.normalize("NFC", name[: name.rfind(".")])


def _is_reference(name: str) -> bool:
    return ".ref" in name.lower() and reference_of(name[: name.rfind(".")]) is not None


def _reference(name: str) -> tuple[str, int]:
    """Stem of the picture that a reference belongs to, and its number: 1 for a.ref.png."""
    found = reference_of(_stem(name))
    assert found, name
    return found[0], int(found[1] or 1)


def _clean_prefix(prefix: str) -> str:
    """In NFC without control characters; white space at its end is kept as one space."""
    return clean(prefix) + (" " if prefix.strip() and prefix[-1].isspace() else "")


def _check_root(root: str) -> None:
    if os.path.isdir(root):
        return
    if os.path.isfile(root):
        folder = os.path.dirname(root) or "."
        raise SdlabError("is a file; a folder is wanted", where=root, next_step=f"Give the folder: {folder}")
    if os.path.lexists(root):
        raise SdlabError("is not a folder", where=root, next_step="Give the folder that holds the pictures")
    near = did_you_mean(os.path.basename(root), _folders_beside(root))
    raise SdlabError(f"no such folder{near}", where=root, next_step="Give the folder that holds the pictures")


def _folders_beside(root: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(os.path.dirname(root) or ".") if entry.is_dir())
    except OSError:
        return []  # only a hint is lost
