"""How a prompt is read, in words for a person: tokens, weights, chunks, and what is cut off."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sdlab.inference.prompts.tags import Tag

WIDTH = 100  # columns
GLUE = "\N{NO-BREAK SPACE}"  # keeps a token and its number on one line


@dataclass(frozen=True)
class Token:
    """What stands at one place; several numbers where they are parts of one character or of a textual inversion."""

    text: str
    ids: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Explained:
    """A prompt as a model reads it."""

    text: str  # as sent
    chunks: tuple[tuple[Token, ...], ...]
    size: int  # tokens that a chunk holds, or the window
    num_around: int = 0  # tokens of the template around the prompt, counted in the window
    weighs: bool = True  # False: this kind of text encoder knows no weights
    loras: tuple[Tag, ...] = ()
    lost: str = ""  # the words that do not fit
    warnings: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of the prompt that are read."""
        return sum(_num(chunk) for chunk in self.chunks)


def as_lines(explained: Explained) -> list[str]:
    """The prompt, the counts, then the tokens in rows of one weight, each with its number in brackets."""
    lines = textwrap.wrap(f"prompt: {explained.text}", WIDTH, subsequent_indent="  ") or ["prompt:"]
    lines.append(_counts(explained))
    for number, chunk in enumerate(explained.chunks, 1):
        lines += _chunk_lines(explained, number, chunk)
    lines += [f"LoRA {tag.name}, weight {tag.weight:g}" for tag in explained.loras]
    if explained.lost:
        lines += textwrap.wrap(f"cut off: {explained.lost}", WIDTH, subsequent_indent="  ")
    return lines + [f"warning: {warning}" for warning in explained.warnings]


def _counts(explained: Explained) -> str:
    tokens = _counted(explained.num_tokens, "token")
    if not explained.weighs:
        both = explained.num_tokens + explained.num_around
        return f"{tokens}, {both} of {explained.size} with what the model puts around a prompt; brackets are text"
    return f"{tokens}, {_counted(len(explained.chunks), 'chunk')} of {explained.size}"


def _chunk_lines(explained: Explained, number: int, chunk: Sequence[Token]) -> Iterator[str]:
    if len(explained.chunks) > 1:
        yield f"chunk {number}, {_counted(_num(chunk), 'token')}"
    if not chunk:
        yield "  (empty)"
    elif explained.weighs:
        yield "  weight  token (number), .. where a word goes on"
    for weight, tokens in groupby(chunk, key=lambda token: token.weight):
        head = f"  {weight:<6.4g}  " if explained.weighs else "  "
        words = "  ".join(_shown(token) for token in tokens)
        for line in textwrap.wrap(
            words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        ):
            yield line.replace(GLUE, " ")


def _shown(token: Token) -> str:
    numbers = ", ".join(str(number) for number in token.ids)
    return f"{token.text} ({numbers})".replace(" ", GLUE)


def _num(chunk: Sequence[Token]) -> int:
    return sum(len(token.ids) for token in chunk)


def _counted(num: int, what: str) -> str:
    return f"{num} {what}" if num == 1 else f"{num} {what}s"
