"""Keywords of captions: their nouns and the adjectives of those, as a dictionary lists them.

    "two women riding brown horses near a fire hydrant"    woman, horse, brown, fire hydrant
    "a striped red fish on a blue background"              fish, striped, red

Which adjective belongs to which noun goes by the order of words, that in short captions is surer than the parse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sdlab.curate.keywords.filler import Filler, read_filler
from sdlab.curate.keywords.pipeline import open_pipeline
from sdlab.curate.keywords.words import Reader, Word
from sdlab.dataset.captions import clean

if TYPE_CHECKING:
    from spacy.language import Language

MAX_PARTS = 3  # of a compound
MAX_WORDS = 200  # of a caption; a .txt that is a whole book takes the parser minutes
BATCH = 128  # the result is the same for any; larger ones are hardly faster

_SPACED_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")  # word pieces put together: "t - shirt", "man ' s"
_SPACED_APOSTROPHE = re.compile(r"(?<=\w) ' (?=(?:s|t|re|ve|ll|d|m)\b)")
# A dot without its space, "a cat.dog", where it is not one of an address or a file's name.
_GLUED = re.compile(
    r"(?<!\S)([^\W\d_]{2,})\.(?!(?:com|net|org|jpe?g|png|gif|webp)\b)(?=[^\W\d_]+[.,;:!?]?(?:\s|$))",
    re.IGNORECASE,
)
_ODD = frozenset("<>:()[]{}/\\|*=+#@~^$%")  # of smileys, addresses and other programs' prompts


class Tagger:
    """Finds the keywords of captions. The same caption gives the same, whatever it is asked together with."""

    def __init__(self, nlp: Language, filler: Filler) -> None:
        self._nlp, self._filler = nlp, filler
        self._reader = Reader(nlp)
        self.name = f"{nlp.meta['lang']}_{nlp.meta['name']}"
        self.version = str(nlp.meta["version"])

    def keywords(
        self, captions: Sequence[str], *, advance: Callable[[float], None] = lambda done: None
    ) -> list[tuple[str, ...]]:
        """The keywords of each caption, distinct, in the order of the text; adjectives follow their noun.

        Equal captions are read once. `advance` is told how many captions are done.
        """
        texts = [self._readable(caption) for caption in captions]
        distinct = sorted(set(texts))
        found = {}
        for text, doc in zip(distinct, self._nlp.pipe(distinct, batch_size=BATCH), strict=True):
            found[text] = tuple(dict.fromkeys(self._keywords_of(list(self._reader.words(doc)))))
            advance(len(captions) * len(found) / len(distinct))
        return [found[text] for text in texts]

    def _readable(self, caption: str) -> str:
        """The caption's start as a sentence, without made-up words, which spoil the parse of all the others."""
        text = _SPACED_HYPHEN.sub("-", clean(caption).replace("_", " "))
        text = _GLUED.sub(r"\1. ", _SPACED_APOSTROPHE.sub("'", text))
        words = text.split()[:MAX_WORDS]
        return " ".join(word for word in words if not self._is_made_up(word.lower().strip(".,;:!?")))

    def _is_made_up(self, word: str) -> bool:
        return self._filler.has_prefix(word) and not self._reader.dictionary.has(word)

    def _keywords_of(self, words: list[Word]) -> Iterator[str]:
        forms = [frozenset({word.text, word.lemma}) for word in words]
        waiting: list[str] = []  # adjectives whose noun may still come
        at = 0
        while at < len(words):
            word, length = words[at], self._filler.phrase_at(forms, at)
            if length:
                waiting = []
            elif word.kind == "NOUN":
                length = _compound_at(words, at)
                compound = self._without_filler(words[at : at + length])
                yield from _joined(compound)
                yield from waiting if len(compound) == length else ()
                waiting = []
            elif word.kind == "ADJ":
                waiting += [] if self._is_filler(word) else [word.lemma]
            elif not _links(words, at):
                yield from waiting
                waiting = []
            at += max(1, length)
        yield from waiting

    def _without_filler(self, compound: list[Word]) -> list[Word]:
        """What it is about: "beach" of a beach view, nothing of a background image."""
        while compound and self._is_filler(compound[-1]):
            compound = compound[:-1]
        return compound

    def _is_filler(self, word: Word) -> bool:
        for form in {word.text, word.lemma}:
            entry = self._nlp.vocab[form]
            if len(form) < 2 or entry.is_stop or entry.like_num or self._filler.has(form):
                return True
        is_word = word.text[0].isalnum() and any(c.isalpha() for c in word.text)
        return not is_word or not _ODD.isdisjoint(word.text)


def open_tagger(name: str | None, filler: Filler | None = None) -> Tagger:
    """A tagger with the spaCy pipeline of that name or folder, None for English; `filler`: None for the default.

    Raises SdlabError where there is no such pipeline, or where it does not tell parts of speech and lemmas.
    """
    return Tagger(open_pipeline(name), read_filler(None) if filler is None else filler)


def _compound_at(words: Sequence[Word], start: int) -> int:
    """How many words from `start` are one noun: "fire hydrant" two, "clock tower" two."""
    end = start + 1
    while end < len(words) and words[end].kind == "NOUN":
        left, right = words[end - 1], words[end]
        is_singular = left.text == left.lemma
        if not (left.joins or (is_singular and not (left.sure and right.sure))):
            break
        end += 1
    return end - start


def _joined(compound: Sequence[Word]) -> Iterator[str]:
    """The keyword, if there is one; of a long row of nouns the last, which say what it is."""
    if compound:
        yield " ".join([*(word.text for word in compound[-MAX_PARTS:-1]), compound[-1].lemma])


def _links(words: Sequence[Word], at: int) -> bool:
    """Whether the word may stand between an adjective and its noun, as "and" does, or a comma before another."""
    if words[at].kind == "COMMA":
        return at + 1 < len(words) and words[at + 1].kind == "ADJ"
    return words[at].kind == "LINK"
