"""The words of a caption with what they are: what the pipeline says, held against its own dictionary.

Captions are short and in lower case, and the pipeline has learnt from newspapers: to it the hydrant of "near a
fire hydrant" is an adverb. The lists below are English; with other languages the pipeline has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sdlab.curate.keywords.dictionary import dictionary_of

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token

# A colour before a noun is an adjective, whatever the tagger thinks of "pink" and "orange".
COLOURS = frozenset(
    "red orange yellow green blue purple violet pink brown black white gray grey beige turquoise teal".split()
)
# These have no singular, or none that means the same.
ALWAYS_PLURAL = frozenset(
    "binoculars clothes data glasses goggles graffiti headphones jeans leggings media overalls pajamas pants pliers "
    "pyjamas ramen scissors shorts spaghetti stairs sunglasses tights tongs trousers woods".split()
)
# An adjective and a noun that mean another thing together than the noun does.
SET_PHRASES = frozenset(
    {
        ("brussels", "sprout"), ("double", "decker"), ("french", "fries"), ("golden", "retriever"),
        ("high", "chair"), ("high", "heel"), ("hot", "air"), ("hot", "dog"), ("hot", "tub"), ("living", "room"),
        ("polar", "bear"), ("remote", "control"), ("soft", "drink"), ("solar", "panel"), ("stained", "glass"),
        ("stuffed", "animal"), ("stuffed", "bear"), ("swimming", "pool"),
    }
)  # fmt: skip
# What ends in -ing right after a noun is what that noun does ("a horse grazing"), but for these.
THINGS_IN_ING = frozenset(
    "building carving ceiling clothing coating covering crossing dressing drawing earring engraving flooring king "
    "landing lighting lightning lining marking opening outing painting parking paving piping pudding railing ring "
    "seating setting sibling siding spring sting string swing topping wedding wing wiring writing".split()
)

_HYPHENS = ("-", "‐", "‑")
_KINDS = {"ADJ": "ADJ", "CCONJ": "LINK", "ADV": "LINK", "NUM": "LINK"}


class Word(NamedTuple):
    """A word of a caption; parts joined by hyphens are one word."""

    text: str  # lower case
    lemma: str  # of a noun its singular, lower case
    kind: str  # NOUN, ADJ, LINK (may stand between an adjective and its noun), COMMA or "" (anything else)
    joins: bool = False  # whether the parser takes it for the first part of a compound
    sure: bool = True  # False where the dictionary has overruled the tagger: the parse went wrong there too


class Reader:
    """Tells the words of captions that the pipeline has read."""

    def __init__(self, nlp: Language) -> None:
        self.dictionary = dictionary_of(nlp)
        self._english = nlp.lang == "en"

    def words(self, doc: Doc) -> Iterator[Word]:
        """The words in the order of the text, parts with hyphens put together."""
        start = 0
        for token in doc:
            if not _is_glued(doc, token.i) and not _is_glued(doc, token.i + 1):
                front = doc[start : token.i].text.lower()
                word = self._word(token)
                yield word._replace(text=front + word.text, lemma=front + word.lemma) if front else word
                start = token.i + 1

    def _word(self, token: Token) -> Word:
        return (self._english and self._english_word(token)) or self._any_word(token)

    def _english_word(self, token: Token) -> Word | None:
        text = token.text.lower()
        if text in COLOURS:
            return Word(text, text, "ADJ")
        if self._begins_set_phrase(token):
            return Word(text, text, "NOUN", joins=True)
        return Word(text, text, "") if self._is_doing(token) else None

    def _any_word(self, token: Token) -> Word:
        text, base, part = token.text.lower(), token.lemma_.lower(), token.pos_
        known = self.dictionary.kinds(text, base)
        if part in ("ADJ", "ADV", "VERB", "INTJ", "X") and known == {"noun"}:
            return Word(text, self._singular(token), "NOUN", _joins(token), sure=False)
        if part in ("NOUN", "PROPN") and not token.is_punct:  # the dot of "mr. smith" is taken for a name
            return Word(text, self._singular(token), "NOUN", _joins(token))
        if part == "VERB" and token.dep_ == "amod" and token.head.i > token.i:
            has_doer = (
                token.i > 0 and token.nbor(-1).pos_ == "NOUN"
            )  # "snow covered" says no more than "snow"
            return Word(text, text, "LINK" if has_doer else "ADJ")
        if part == "VERB" and "noun" in known and text == base and _is_listed(token):
            return Word(text, text, "NOUN")
        kind = "LINK" if text in _HYPHENS else "COMMA" if text == "," else _KINDS.get(part, "")
        if self._english and kind == "ADJ" and not text.startswith(base[:-1]):
            base = text  # "biggest" and "happier" say big and happy; "best" does not say good
        return Word(text, base, kind)

    def _begins_set_phrase(self, token: Token) -> bool:
        if token.i + 1 == len(token.doc):
            return False
        after = token.nbor().text.lower()
        return not SET_PHRASES.isdisjoint(
            (token.text.lower(), form) for form in (after, self.dictionary.singular(after))
        )

    def _is_doing(self, token: Token) -> bool:
        """Whether it is what the noun before it does: "a horse grazing"."""
        text = token.text.lower()
        if not text.endswith("ing") or text in THINGS_IN_ING or token.i == 0:
            return False
        is_after_noun = token.pos_ == "NOUN" and token.nbor(-1).pos_ in ("NOUN", "PROPN")
        return is_after_noun and self.dictionary.is_ing_form(text)

    def _singular(self, token: Token) -> str:
        text, base = token.text.lower(), token.lemma_.lower()
        if self._english and text in ALWAYS_PLURAL and not _is_drunk_from(token):
            return text
        if base in self.dictionary.words["noun"] and text not in self.dictionary.singulars:
            return base
        return self.dictionary.singular(text) or base


def _joins(token: Token) -> bool:
    """Whether the parser, if there is one, takes it for the first part of a compound."""
    if not token.doc.has_annotation("DEP"):
        return True
    return token.dep_ in ("compound", "nmod", "amod") and token.head.i > token.i


def _is_glued(doc: Doc, at: int) -> bool:
    """Whether the token is a hyphen that makes one word of its neighbours ("black-and-white" is three)."""
    if not 0 < at < len(doc) - 1 or doc[at].text not in _HYPHENS:
        return False
    left, hyphen, right = doc[at - 1], doc[at], doc[at + 1]
    return not (left.whitespace_ or hyphen.whitespace_ or "CCONJ" in (left.pos_, right.pos_))


def _is_listed(token: Token) -> bool:
    """Whether it follows a noun in a list: "a stove, refrigerator, and sink"."""
    return bool(token.dep_ == "conj" and token.head.pos_ in ("NOUN", "PROPN"))


def _is_drunk_from(token: Token) -> bool:
    """Whether these glasses are "wine glasses" or "glasses of water"."""
    if token.text.lower() != "glasses":
        return False
    before = token.i > 0 and token.nbor(-1).dep_ == "compound"
    return before or (token.i + 1 < len(token.doc) and token.nbor().text.lower() == "of")
