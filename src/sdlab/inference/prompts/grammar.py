"""What brackets in a prompt mean: ``(x)``, ``((x))``, ``[x]``, ``(x:1.3)``, ``\\(`` and BREAK.

Three readings of one text. `a1111` is the grammar of AUTOMATIC1111's web UI, which most published prompts are
written in: brackets multiply, also where they are nested, and ``[x]`` weakens. `comfy` is that of ComfyUI: a number
sets the weight whatever stands around it, and square brackets are text. `none` sends the text as it was typed.

No recursion, and time in proportion to the text: prompts come out of files that others wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdlab.inference.prompts.notes import Notes, foreign
from sdlab.inference.spec import Emphasis

STRONGER, WEAKER = 1.1, 1 / 1.1  # of a bracket without a number
MAX_NESTING = 50  # 1.1 ** 50 is 117; brackets further in change no weight
MAX_WEIGHT = 1e6  # a larger number is text
UNUSUAL_WEIGHT = 5.0  # pictures come apart long before; it is mostly a year: (poster:1984)

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_A1111 = re.compile(rf"\\(?P<escaped>[()\[\]\\])|:\s*(?P<number>{_NUMBER})\s*\)|[\\()\[\]:]|[^\\()\[\]:]+")
_COMFY = re.compile(r"\\[()]|[()]")
_COMFY_NUMBER = re.compile(rf"\s*({_NUMBER}(?:[eE][+-]?[0-9]+)?)\s*")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Span:
    """Text of one weight, escapes resolved."""

    text: str
    weight: float


@dataclass(frozen=True)
class Break:
    """BREAK: the chunk is filled up, the next one begins."""


@dataclass(frozen=True)
class Parsed:
    """A prompt in parts. Neighbouring spans differ in weight, none is empty; an empty prompt has no part."""

    parts: tuple[Span | Break, ...]
    warnings: tuple[str, ...] = ()  # what probably means something else than was meant


def parse(text: str, emphasis: Emphasis) -> Parsed:
    """The prompt as spans of text with their weights, and warnings of brackets that do not pair up and the like."""
    if emphasis == "none":
        return Parsed((Span(text, 1.0),) if text else ())
    reader = _A1111Reader(text) if emphasis == "a1111" else _ComfyReader(text)
    parts = tuple(_merged(reader.read()))
    warnings = [*reader.notes.lines(), *foreign(text, emphasis)]
    return Parsed(parts, tuple(warnings))


@dataclass
class _Opened:
    """A bracket that waits for its partner."""

    first: int  # index of the first item in it
    at: int
    counts: bool


@dataclass
class _Item:
    text: str
    weight: float = 1.0


class _A1111Reader:
    """Reads the text from left to right; a closing bracket multiplies the weights of all items since its opening.

    Round and square brackets are paired apart, as in the original: ``(a [b) c]`` is two overlapping ranges. An item
    is in at most MAX_NESTING ranges that count, which bounds the work. The products are made in the order in which
    brackets close, so that weights equal the original's to the last digit.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.notes = Notes(text)
        self._items: list[_Item | Break] = []
        self._opened: dict[str, list[_Opened]] = {"(": [], "[": []}
        self._joins = False  # the next text may go to the last item: no bracket stands between

    def read(self) -> list[_Item | Break]:
        """Items in order, unmerged."""
        at = 0
        while at < len(self.text):
            found = _A1111.match(self.text, at)
            assert found is not None, "every character is one of the alternatives"
            at = found.start() + self._take(found)
        for opener, factor in (("(", STRONGER), ("[", WEAKER)):
            for opened in self._opened[opener]:
                self.notes.add(
                    f"never closed, so it weighs on all that follows; write \\{opener} for text", opened.at
                )
                self._weigh(opened, factor)
        return self._items

    def _take(self, found: re.Match[str]) -> int:
        """Take in what was found; how many characters of it are done with."""
        word, at = found[0], found.start()
        if found["escaped"]:
            self._add(found["escaped"])
        elif word in ("(", "["):
            self._open(word, at)
        elif found["number"]:
            return self._close_with(found)
        elif word == ")":
            self._close("(", STRONGER, word, at)
        elif word == "]":
            self._close("[", WEAKER, word, at)
        elif word != "\\":  # one before any other character is dropped
            self._add_words(word)
        return len(word)

    def _open(self, opener: str, at: int) -> None:
        depth = sum(len(opened) for opened in self._opened.values())
        if depth == MAX_NESTING:
            self.notes.add(f"more than {MAX_NESTING} brackets deep, so it changes no weight", at)
        self._opened[opener].append(_Opened(len(self._items), at, depth < MAX_NESTING))
        self._joins = False

    def _close(self, opener: str, factor: float, word: str, at: int) -> None:
        if self._opened[opener]:
            self._weigh(self._opened[opener].pop(), factor)
        else:
            self.notes.add(f"closes no bracket, so it is text; write \\{word} to say so", at)
            self._add(word)

    def _close_with(self, found: re.Match[str]) -> int:
        number = float(found["number"])
        if not self._opened["("] or not abs(number) <= MAX_WEIGHT:
            self._add(":")
            return 1
        _note_unusual(self.notes, number, found.start("number"))
        self._weigh(self._opened["("].pop(), number)
        return len(found[0])

    def _weigh(self, opened: _Opened, factor: float) -> None:
        self._joins = False
        for index in range(opened.first, len(self._items) if opened.counts else 0):
            item = self._items[index]
            if isinstance(item, _Item):
                item.weight *= factor

    def _add_words(self, words: str) -> None:
        """Text that may hold BREAK, also within brackets, where the original takes it for a word of odd weight."""
        head, *rest = _BREAK.split(words)
        self._add(head.rstrip() if rest else head)
        for index, piece in enumerate(rest):
            self._items.append(Break())
            self._joins = False
            self._add(piece.strip() if index < len(rest) - 1 else piece.lstrip())

    def _add(self, text: str) -> None:
        last = self._items[-1] if self._items and self._joins else None
        if isinstance(last, _Item):
            last.text += text
        elif text:
            self._items.append(_Item(text))
            self._joins = True


class _ComfyReader:
    """Pairs the brackets first, then hands out the text between them with the weight that holds there.

    A bracket without a partner turns what follows into text up to where the count of brackets is even again, as
    in the original.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.notes = Notes(text)

    def read(self) -> Iterator[_Item]:
        """Items in order, unmerged."""
        marks = self._paired()
        numbers = self._numbers(marks)
        weights, at = [1.0], 0
        for place in marks:
            closes = self.text[place] == ")"
            colon, _ = numbers.get(place, (place, 0.0))
            yield self._item(at, colon if closes else place, weights[-1])
            at = place + 1
            if closes:
                weights.pop()
            else:
                weights.append(self._weight(weights, numbers.get(place)))
        yield self._item(at, len(self.text), weights[-1])

    def _weight(self, weights: list[float], number: tuple[int, float] | None) -> float:
        if number is not None:
            return number[1]
        return weights[-1] * STRONGER if len(weights) <= MAX_NESTING else weights[-1]

    def _item(self, begin: int, end: int, weight: float) -> _Item:
        return _Item(self.text[begin:end].replace("\\(", "(").replace("\\)", ")"), weight)

    def _paired(self) -> list[int]:
        """Places of the brackets that have a partner."""
        marks, waiting, level = [], [], 0
        for found in _COMFY.finditer(self.text):
            if found[0] not in "()":
                continue
            step = 1 if found[0] == "(" else -1
            if level < 0 or level + step < 0:
                self.notes.add("text, since a ) that closes no bracket upsets the pairs", found.start())
            else:
                waiting.append(found.start())
            level += step
            if level == 0:
                marks += waiting
                waiting = []
        if waiting:
            self.notes.add("never closed, so it and all that follows are text", waiting[0])
        return marks

    def _numbers(self, marks: Sequence[int]) -> dict[int, tuple[int, float]]:
        """By the place of either bracket of a pair with a number: where its colon stands, and the number."""
        found, opened, last = {}, [], -1
        for place in marks:
            if self.text[place] == "(":
                opened.append(place)
            else:
                begin = opened.pop()
                number = self._number(last, place, begin)
                if number is not None:
                    found[begin] = found[place] = number
            last = place
        return found

    def _number(self, last: int, close: int, begin: int) -> tuple[int, float] | None:
        colon = self.text.rfind(":", last + 1, close)
        word = _COMFY_NUMBER.fullmatch(self.text, colon + 1, close) if colon > begin + 1 else None
        number = float(word[1]) if word else math.nan
        if not abs(number) <= MAX_WEIGHT:
            return None
        _note_unusual(self.notes, number, colon + 1)
        return colon, number


def _note_unusual(notes: Notes, number: float, at: int) -> None:
    if abs(number) > UNUSUAL_WEIGHT:
        notes.add(
            f"the weight {number:g}; useful ones are 0.5 to 1.5. If it is text, write \\( and \\) around it",
            at,
        )


def _merged(items: list[_Item | Break] | Iterator[_Item]) -> Iterator[Span | Break]:
    """Neighbours of one weight as one span, so that a text without weights stays whole; no empty ones."""
    texts: list[str] = []
    weight = 1.0
    for item in items:
        if texts and (isinstance(item, Break) or (item.text and item.weight != weight)):
            yield Span("".join(texts), weight)
            texts = []
        if isinstance(item, Break):
            yield item
        elif item.text:
            texts.append(item.text)
            weight = item.weight
    if texts:
        yield Span("".join(texts), weight)
