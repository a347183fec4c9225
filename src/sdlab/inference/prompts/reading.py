"""How each kind of model reads a prompt, told with its tokenizer alone: nothing of the model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sdlab.inference.prompts.chunks import Chunk, ClipWords
from sdlab.inference.prompts.embeddings import Embedding, num_vectors
from sdlab.inference.prompts.explain import Explained, Token
from sdlab.inference.prompts.grammar import Break, Span, parse
from sdlab.inference.prompts.tags import Tag, loras_in, without_loras
from sdlab.inference.spec import Emphasis

if TYPE_CHECKING:
    from sdlab.inference.load import Opened
    from sdlab.models.flux2_folder import Flux2Parts
    from sdlab.models.folder import SdParts

_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>?", re.IGNORECASE)
_ASKED = re.compile(r"(?<![\w-])embedding:([\w.-]+)", re.IGNORECASE)
MOST_SAID = 300  # characters
_SINGLE = 1.1  # the weight of (x), which in plain language is a remark in brackets


class Reading(Protocol):
    """How a model reads prompts."""

    def num_chunks(self, text: str, emphasis: Emphasis) -> int:
        """How many chunks of the text encoder the text fills, at least one."""

    def warnings(self, text: str, emphasis: Emphasis) -> list[str]:
        """What probably means something else than was meant, and what is cut off; one line each."""

    def explain(self, text: str, emphasis: Emphasis, *, is_negative: bool = False) -> Explained:
        """The text token by token. It is as typed: <lora:..> is taken out and told, but of a negative prompt."""


def reading_of(opened: Opened, embeddings: Sequence[Embedding] = ()) -> Reading:
    """How the opened model reads prompts, with these textual inversions. Raises SdlabError for a broken tokenizer."""
    family: Any = opened.family
    return READINGS[opened.chosen.model.family](family.parts, embeddings)


class ClipReading:
    """Stable Diffusion: CLIP, in chunks of 75 tokens with weights."""

    def __init__(self, parts: SdParts, embeddings: Sequence[Embedding] = ()) -> None:
        from sdlab.models.sd import load_tokenizer

        self._vectors: Mapping[str, int] = num_vectors(embeddings)
        self._words = ClipWords(load_tokenizer(parts), self._vectors)

    def num_chunks(self, text: str, emphasis: Emphasis) -> int:
        """How many chunks of 75 tokens the text fills, at least one."""
        return len(self._words.chunks(text, emphasis))

    def warnings(self, text: str, emphasis: Emphasis) -> list[str]:
        """Brackets that do not pair up, the syntax of other programs, names of nothing."""
        return [*parse(text, emphasis).warnings, *self._unknown(text), *_everywhere(text)]

    def explain(self, text: str, emphasis: Emphasis, *, is_negative: bool = False) -> Explained:
        """Tokens, weights and chunks."""
        text, loras = _without_loras(text, is_negative)
        chunks = tuple(tuple(self._tokens(chunk)) for chunk in self._words.chunks(text, emphasis))
        warnings = tuple(self.warnings(text, emphasis))
        return Explained(text, chunks, self._words.marks.size, loras=loras, warnings=warnings)

    def _tokens(self, chunk: Chunk) -> Iterator[Token]:
        at = 0
        for shown, ids in self._words.readable(chunk.ids):
            yield Token(shown, ids, chunk.weights[at])
            at += len(ids)

    def _unknown(self, text: str) -> Iterator[str]:
        known = {name.casefold() for name in self._vectors}
        for found in _ASKED.finditer(text):
            name = re.sub(r"\.(pt|bin|safetensors)$", "", found[1].rstrip("."), flags=re.IGNORECASE)
            if name.casefold() not in known:
                yield f"'{found[0]}' is plain text: no --embedding has that name"


class Flux2Reading:
    """FLUX.2: a language model, which knows no weights, with a window of 512 tokens."""

    def __init__(self, parts: Flux2Parts, embeddings: Sequence[Embedding] = ()) -> None:
        from sdlab.models.flux2_text import PromptReader

        assert not embeddings, "the engine takes none"
        self._reader = PromptReader(parts)

    def num_chunks(self, text: str, emphasis: Emphasis) -> int:
        """1: there is one window."""
        return 1

    def warnings(self, text: str, emphasis: Emphasis) -> list[str]:
        """What is cut off, and brackets that would be weights elsewhere."""
        _, lost = self._reader.lost(text)
        cut = f"the prompt is longer than {self._reader.window} tokens, so this is cut off: {_in_short(lost)}"
        return [*([cut] if lost else []), *_odd_here(text, emphasis)]

    def explain(self, text: str, emphasis: Emphasis, *, is_negative: bool = False) -> Explained:
        """The prompt's own tokens, and how much of the window they take."""
        text, loras = _without_loras(text, is_negative)
        ids, around = self._ids(text), self._ids("")
        begin = _alike(ids, around)
        end = len(ids) - _alike(ids[begin:][::-1], around[begin:][::-1])
        tokens = tuple(self._tokens(ids[begin:end]))
        return Explained(
            text,
            (tokens,),
            self._reader.window,
            num_around=len(ids) - (end - begin),
            weighs=False,
            loras=loras,
            lost=self._reader.lost(text)[1],
            warnings=tuple(_odd_here(text, emphasis)),
        )

    def _ids(self, text: str) -> list[int]:
        """What the text encoder is given, without what the window is filled up with."""
        made = self._reader.tokens(text)
        return [int(number) for number in made["input_ids"][made["attention_mask"].bool()]]

    def _tokens(self, ids: Sequence[int]) -> Iterator[Token]:
        waiting: list[int] = []
        for place, number in enumerate(ids):
            waiting.append(number)
            text = str(self._reader.tokenizer.decode(waiting))
            if "\N{REPLACEMENT CHARACTER}" not in text or len(waiting) == 4 or place == len(ids) - 1:
                yield Token(text.strip() or repr(text), tuple(waiting))
                waiting = []


READINGS: dict[str, Callable[[Any, Sequence[Embedding]], Reading]] = {
    "sd": ClipReading,
    "flux2": Flux2Reading,
}


def _without_loras(text: str, is_negative: bool) -> tuple[str, tuple[Tag, ...]]:
    return (text, ()) if is_negative else (without_loras(text), tuple(loras_in(text)))


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _odd_here(text: str, emphasis: Emphasis) -> list[str]:
    return [*_plain_here(text, emphasis), *_everywhere(text)]


def _in_short(text: str) -> str:
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID - 60]} ... {text[-60:]}"


def _plain_here(text: str, emphasis: Emphasis) -> Iterator[str]:
    """A warning where brackets or BREAK would mean something to Stable Diffusion.

    A single (x) is not spoken of: in plain language that is a remark.
    """
    meant = [part for part in parse(text, emphasis).parts if _means_something(part)]
    if meant:
        first = meant[0]
        what = (
            "BREAK"
            if isinstance(first, Break)
            else f"the weight {first.weight:.4g} of '{first.text.strip()[:40]}'"
        )
        more = f" and {len(meant) - 1} more" if len(meant) > 1 else ""
        yield f"{what}{more} is plain text to FLUX.2: its text encoder knows no weights and reads brackets as they are"


def _means_something(part: Span | Break) -> bool:
    return isinstance(part, Break) or part.weight not in (1.0, _SINGLE)


def _everywhere(text: str) -> Iterator[str]:
    if "Negative prompt:" in text:
        yield "other programs will take what follows 'Negative prompt:' in a prompt for the negative one"
    for found in _TAG.finditer(text):
        lora = found[0].lower().startswith("<lora:")
        reason = (
            "a LoRA is named in the prompt, as <lora:name:0.8>"
            if lora
            else "sdlab knows only <lora:name:0.8>"
        )
        yield f"'{found[0][:60]}' is sent as text: {reason}"
