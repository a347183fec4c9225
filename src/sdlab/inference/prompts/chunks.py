"""A prompt as CLIP takes it in: chunks of 75 token numbers and their weights, between two marks.

How chunks are cut is A1111's rule: a chunk that is full ends after its last comma, if that is among its last 20
tokens, so that a phrase is not torn apart; what stood behind the comma goes to the next chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdlab.errors import SdlabError
from sdlab.inference.prompts.grammar import Break, Parsed, Span, parse
from sdlab.inference.prompts.names import Names
from sdlab.inference.spec import Emphasis

BACK_TO_COMMA = 20  # tokens
MOST_OF_A_CHARACTER = 4  # tokens: bytes of UTF-8


@dataclass(frozen=True)
class Piece:
    """Token numbers of one weight."""

    ids: tuple[int, ...]
    weight: float
    whole: bool = False  # not to be cut where it fits in one chunk


@dataclass(frozen=True)
class Chunk:
    """At most 75 token numbers with their weights; without the marks around them."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Marks:
    """The tokens around and behind a chunk."""

    begin: int
    end: int
    filler: int
    size: int  # tokens of a chunk without the two marks: 75


def filled(chunk: Chunk, marks: Marks) -> tuple[list[int], list[float], list[int]]:
    """Numbers, weights and attention mask of the chunk, all 77 long, filled up as the tokenizer does for one text."""
    spare = marks.size - len(chunk.ids)
    ids = [marks.begin, *chunk.ids, marks.end, *[marks.filler] * spare]
    weights = [1.0, *chunk.weights, 1.0, *[1.0] * spare]
    return ids, weights, [1] * (len(chunk.ids) + 2) + [0] * spare


def chunked(pieces: Iterable[Piece | Break], *, size: int, comma: int | None) -> list[Chunk]:
    """All tokens in order, in at least one chunk of at most `size`; `comma` is the number of the comma's token."""
    filling = _Filling(size, comma)
    for piece in pieces:
        if isinstance(piece, Break):
            filling.next()
        elif piece.whole and len(piece.ids) <= size:
            filling.add_whole(piece)
        else:
            for number in piece.ids:
                filling.add(number, piece.weight)
    return filling.finished()


@dataclass
class _Filling:
    """The chunks so far and the one that is being filled."""

    size: int
    comma: int | None
    chunks: list[Chunk] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    after_comma: int = 0  # how many tokens of this chunk stand up to its last comma

    def add(self, number: int, weight: float) -> None:
        if len(self.ids) == self.size:
            behind = self.size - self.after_comma
            keeps = self.after_comma and behind < BACK_TO_COMMA and number != self.comma
            self.next(self.after_comma if keeps else self.size)
        self.ids.append(number)
        self.weights.append(weight)
        if number == self.comma:
            self.after_comma = len(self.ids)

    def add_whole(self, piece: Piece) -> None:
        if len(self.ids) + len(piece.ids) > self.size:
            self.next()
        self.ids += piece.ids
        self.weights += [piece.weight] * len(piece.ids)

    def next(self, keep: int | None = None) -> None:
        """End the chunk behind `keep` tokens; the others begin the next."""
        keep = len(self.ids) if keep is None else keep
        self.chunks.append(Chunk(tuple(self.ids[:keep]), tuple(self.weights[:keep])))
        self.ids, self.weights, self.after_comma = self.ids[keep:], self.weights[keep:], 0

    def finished(self) -> list[Chunk]:
        if self.ids or not self.chunks:
            self.next()
        return self.chunks


class ClipWords:
    """Texts to chunks with CLIP's tokenizer; safe to use from several threads.

    `num_vectors` has the textual inversions: name -> vectors. Each vector is a token with a number of its own, from
    `first_vector` on, in the order of the mapping.
    """

    def __init__(self, tokenizer: Any, num_vectors: Mapping[str, int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a call sets how the tokenizer cuts and fills, for all callers
        vocabulary = tokenizer.get_vocab()
        self.first_vector = max(vocabulary.values()) + 1
        self.marks = Marks(
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            int(tokenizer.model_max_length) - 2,
        )
        self._comma = vocabulary.get(",</w>")
        self._vectors = self._numbered(num_vectors or {})
        self._names = Names(self._vectors)

    def _numbered(self, num_vectors: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        numbers, first = {}, self.first_vector
        for name, num in num_vectors.items():
            numbers[name] = tuple(range(first, first + num))
            first += num
        return numbers

    def chunks(self, text: str, emphasis: Emphasis) -> list[Chunk]:
        """All of the text, in at least one chunk."""
        return self.chunks_of(parse(text, emphasis))

    def chunks_of(self, parsed: Parsed) -> list[Chunk]:
        """All of the parsed text, in at least one chunk."""
        return chunked(self._pieces(parsed), size=self.marks.size, comma=self._comma)

    def cut(self, text: str, emphasis: Emphasis) -> Chunk:
        """The first 75 tokens, as diffusers cuts a prompt."""
        pieces = [piece for piece in self._pieces(parse(text, emphasis)) if isinstance(piece, Piece)]
        ids = tuple(number for piece in pieces for number in piece.ids)
        weights = tuple(piece.weight for piece in pieces for _ in piece.ids)
        return Chunk(ids[: self.marks.size], weights[: self.marks.size])

    def readable(self, ids: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
        """Tokens as a person reads them, with their numbers; ``..`` behind one whose word goes on.

        Tokens that are parts of one character stand together, and so do the vectors of a textual inversion.
        """
        rows: list[tuple[str, tuple[int, ...]]] = []
        waiting: tuple[int, ...] = ()
        for place, number in enumerate(ids):
            waiting = (*waiting, number)
            text = self._text(waiting)
            goes_on = "\N{REPLACEMENT CHARACTER}" in text and len(waiting) < MOST_OF_A_CHARACTER
            same = self._name_of(number) and self._name_of(number) == self._name_of(_after(ids, place))
            if place == len(ids) - 1 or not (goes_on or same):
                rows.append((text, waiting))
                waiting = ()
        return rows

    def _text(self, ids: Sequence[int]) -> str:
        if name := self._name_of(ids[-1]):
            return name
        plain = [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]
        words = [token.removesuffix("</w>") for token in plain]
        text = str(self._tokenizer.convert_tokens_to_string(words)).strip()
        return text if plain[-1].endswith(("</w>", "|>")) else f"{text}.."

    def _name_of(self, number: int) -> str:
        """The textual inversion that a vector's number belongs to, "" for a token of CLIP's own."""
        if number < self.first_vector:
            return ""
        return next((name for name, numbers in self._vectors.items() if number in numbers), "")

    def _pieces(self, parsed: Parsed) -> Iterator[Piece | Break]:
        for part in parsed.parts:
            if isinstance(part, Span):
                yield from self._span(part)
            else:
                yield part

    def _span(self, span: Span) -> Iterator[Piece]:
        at = 0
        for found in self._names.find(span.text):
            yield Piece(self._ids(span.text[at : found.begin]), span.weight)
            yield Piece(self._vectors[found.name], span.weight, whole=True)
            at = found.end
        yield Piece(self._ids(span.text[at:]), span.weight)

    def _ids(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        with self._lock:
            made = self._tokenizer(
                text, add_special_tokens=False, truncation=False, padding=False, verbose=False
            )
        return tuple(made.input_ids)


def _after(ids: Sequence[int], place: int) -> int:
    return ids[place + 1] if place + 1 < len(ids) else -1


def check_clip_skip(clip_skip: int, num_layers: int, *, where: str = "--clip-skip") -> None:
    """Raises SdlabError where the text encoder has not so many layers to go back."""
    most = num_layers + 1  # what goes into the first layer can be read too
    if not 1 <= clip_skip <= most:
        raise SdlabError(
            f"{clip_skip} is too far back: this text encoder has {num_layers} layers",
            where=where,
            next_step=f"Use 1 to {most}",
        )
