"""What a pipeline's own dictionary knows of words: the lists (in English, WordNet's) that its lemmatizer goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.language import Language

KINDS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Dictionary:
    """Words in lower case by kind. Empty for pipelines that find lemmas in another way."""

    words: Mapping[str, frozenset[str]] = field(default_factory=lambda: dict.fromkeys(KINDS, frozenset()))
    singulars: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of irregular plurals
    endings: Sequence[Sequence[str]] = ()  # (of the plural, of the singular)

    def has(self, word: str) -> bool:
        """Whether it is listed as anything."""
        return bool(self.kinds(word))

    def kinds(self, word: str, base: str = "") -> set[str]:
        """All that a word, whose form without ending is `base`, can be: some of KINDS."""
        found = {kind for kind in KINDS if word in self.words[kind]}
        if base in self.words["verb"]:
            found.add("verb")
        if self.singular(word):
            found.add("noun")
        return found

    def singular(self, word: str) -> str | None:
        """The noun without the ending of the plural; None where the word is not known as a noun."""
        nouns = self.words["noun"]
        if word in self.singulars:
            return self.singulars[word][0]
        if word in nouns:
            return word
        forms = (word.removesuffix(old) + new for old, new in self.endings if word.endswith(old))
        return next((form for form in forms if form in nouns), None)

    def is_ing_form(self, word: str) -> bool:
        """Whether an English word that ends in -ing can be a form of a verb: grazing, riding, swimming."""
        stem = word.removesuffix("ing")
        return not self.words["verb"].isdisjoint({stem, f"{stem}e", stem[:-1]})


def dictionary_of(nlp: Language) -> Dictionary:
    """The dictionary inside the pipeline, if it has one."""
    lemmatizer = nlp.get_pipe("lemmatizer") if nlp.has_pipe("lemmatizer") else None
    lookups = getattr(lemmatizer, "lookups", None)
    if getattr(lemmatizer, "mode", "") != "rule" or lookups is None or not lookups.has_table("lemma_index"):
        return Dictionary()
    tables = {name: lookups.get_table(f"lemma_{name}", {}) for name in ("index", "exc", "rules")}
    return Dictionary(
        words={kind: frozenset(tables["index"].get(kind, ())) for kind in KINDS},
        singulars=tables["exc"].get("noun", {}),
        endings=tables["rules"].get("noun", ()),
    )
