"""Which folder each picture goes to, from the keywords of all. Pure, and free of any order but the names'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sdlab.curate.names import folder_name

OTHER = "_other"  # for pictures without a keyword that is frequent enough
REVIEW = "_review"  # for pictures with a doubtful caption


def arrange(
    keywords: Mapping[str, Sequence[str]], *, min_count: int, depth: int
) -> dict[str, tuple[str, ...]]:
    """The folders of each picture from the top down, by the picture's id.

    A keyword makes folders if at least `min_count` pictures have it. A picture goes to the most frequent of
    its keywords that does, in it to the next, down to `depth` folders; among equals the alphabet decides. A
    picture without such a keyword goes to ``("_other",)``.
    """
    assert min_count >= 1 and depth >= 1, (min_count, depth)
    frequent = [(word, count) for word, count in counts(keywords) if count >= min_count]
    rank = {word: place for place, (word, _) in enumerate(frequent)}
    names = {word: folder_name(word) for word in rank}
    return {
        id: _path([names[word] for word in sorted(rank.keys() & set(words), key=rank.__getitem__)], depth)
        for id, words in keywords.items()
    }


def counts(keywords: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(keyword, number of pictures that have it), the most frequent first, equals by the alphabet."""
    numbers = Counter(word for words in keywords.values() for word in set(words))
    return sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))


def _path(names: Sequence[str], depth: int) -> tuple[str, ...]:
    """The first `depth` names; the same name again ("t shirt" below "t_shirt") and empty ones are left out."""
    return tuple(dict.fromkeys(filter(None, names)))[:depth] or (OTHER,)
