r"""One text out of many: ``{red|green|blue}``, ``{2$$, $$a|b|c}`` and ``__name__`` in a prompt.

    {a|b}            one of them             {0.2::a|b}     a weighs 0.2, b weighs 1
    {2$$a|b|c}       two of them, ", " between               {1-2$$a|b|c}   one or two
    {2$$ and $$a|b}  two, " and " between                    {2$$__name__}  two lines of name.txt
    __dir/name__     a line of dir/name.txt in the wildcard folder
    \{ \} \|         these characters themselves

What is drawn is a function of the seed and of the place in the template, so that no prompt hangs on the others of a
job. All this is read before weights are: ``(``, and ``|`` outside braces, are text. No heavy imports.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

from sdlab.errors import SdlabError
from sdlab.inference.prompts.wildcards import (
    MAX_DEPTH,
    UNIT,
    WILD,
    Entry,
    Wildcards,
    read_wildcards,
    weighed,
    wildcards_in,
)
from sdlab.keyed import key

__all__ = ["Wildcards", "expand", "read_wildcards", "warnings_of", "wildcards_in"]

MAX_CHARACTERS = 100_000  # of a template, and of what comes out of it
MAX_DRAWN = 1000  # by one {1000$$...}
NUM_REMEMBERED = 4096  # templates: that of a job is the same for every picture, a wildcard's lines come again
JOINER = ", "

_TOKEN = re.compile(rf"\\[\\{{}}|]|[{{}}|]|\$\$|{WILD}")  # `\\` is a pair, so that `\\{` opens a choice
_COUNT = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_ESCAPED = ("\\{", "\\}", "\\|")


@dataclass(frozen=True)
class _Wild:
    name: str

    @property
    def typed(self) -> str:
        return f"__{self.name}__"


@dataclass(frozen=True)
class _Option:
    weight: int  # millionths
    nodes: tuple[_Node, ...]


@dataclass(frozen=True)
class _Count:
    low: int
    high: int
    joiner: str
    num_tokens: int  # that say so, before the first option


@dataclass(frozen=True)
class _Choice:
    options: tuple[_Option, ...]
    count: _Count | None  # None: one is drawn, and stands as it is


_Node = str | _Wild | _Choice


def expand(template: str, *, seed: int, wildcards: Wildcards | None, part: str) -> str:
    """The template with every choice made; the same for the same seed, `part` ("prompt") and template, anywhere.

    Several are drawn without repeats while there are enough. Without `wildcards`, ``__name__`` stays as it is.
    Raises SdlabError for a wildcard that is missing, empty or leads back to itself, even where it would not be drawn,
    and for a template that is nested too deeply or grows beyond all bounds.
    """
    nodes = _read(template)
    if wildcards is not None:
        wildcards.check(wildcards_in(template))
    return _Draws(seed, part, wildcards).text(nodes, ())


def warnings_of(template: str) -> list[str]:
    """What may not mean what was meant: braces without a partner, a word before ``$$`` that is no number."""
    tokens = _tokens(template)
    partner = _partners(tokens)
    said = []
    for i, token in enumerate(tokens):
        if token in ("{", "}") and i not in partner:
            word = "closed" if token == "{" else "opened"
            said.append(
                f"a '{token}' is never {word}, so it is sent as it is; write \\{token} if that is meant"
            )
        inside = tokens[i + 1 : i + 3]
        if token == "{" and i in partner and "$$" in inside and not _COUNT.fullmatch(inside[0]):
            said.append(f"'{inside[0][:20]}' before $$ is no number; write {{2$$a|b|c}} for two of three")
    return list(dict.fromkeys(said))


# ------------------------------------------------------------------------------------------------ reading


def _tokens(template: str) -> list[str]:
    """Text and signs in turn; joined they are the template."""
    found, at = [], 0
    for match in _TOKEN.finditer(template):
        if match.start() > at:
            found.append(template[at : match.start()])
        found.append(match[0])
        at = match.end()
    return [*found, template[at:]] if at < len(template) else found


def _partners(tokens: Sequence[str]) -> dict[int, int]:
    """Where each ``{`` that is closed is closed, and each ``}`` that is opened is opened."""
    opened: list[int] = []
    partner: dict[int, int] = {}
    for i, token in enumerate(tokens):
        if token == "{":
            opened.append(i)
        elif token == "}" and opened:
            start = opened.pop()
            partner[start], partner[i] = i, start
    return partner


@lru_cache(maxsize=NUM_REMEMBERED)
def _read(template: str) -> tuple[_Node, ...]:
    """What a template means; of frozen parts, so that it may be remembered."""
    if len(template) > MAX_CHARACTERS:
        raise SdlabError(f"a prompt of {len(template):,} characters; at most {MAX_CHARACTERS:,} are read")
    tokens = _tokens(template)
    return _Reader(tokens, _partners(tokens)).nodes(0, len(tokens), 0)


@dataclass(frozen=True)
class _Reader:
    tokens: Sequence[str]
    partner: dict[int, int]

    def nodes(self, start: int, end: int, depth: int) -> tuple[_Node, ...]:
        """What the tokens from `start` to `end` mean; no text stands next to text."""
        if depth > MAX_DEPTH:
            raise SdlabError(f"a prompt's choices are nested more than {MAX_DEPTH} deep")
        found: list[_Node] = []
        i = start
        while i < end:
            token, i = self.tokens[i], i + 1
            if token == "{" and i - 1 in self.partner:
                end_of_braces = self.partner[i - 1]
                found += self._braces(i, end_of_braces, depth)
                i = end_of_braces + 1
            else:
                found.append(_Wild(token[2:-2]) if re.fullmatch(WILD, token) else _plain(token))
        return tuple(_joined(found))

    def _braces(self, start: int, end: int, depth: int) -> list[_Node]:
        """What two braces and the tokens between them mean: a choice, or where it is none, what is typed."""
        count = _count_of(self.tokens[start : min(end, start + 8)])
        spans = self._spans(start + count.num_tokens if count else start, end)
        if len(spans) == 1 and not count:
            return ["{", *self.nodes(start, end, depth + 1), "}"]
        return [_Choice(tuple(self._option(*span, depth) for span in spans), count)]

    def _spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """Where the options are, between the ``|`` that belong to these braces."""
        cuts, i = [start - 1], start
        while i < end:
            if self.tokens[i] == "|":
                cuts.append(i)
            i = self.partner.get(i, i) + 1  # braces within are one
        return [(a + 1, b) for a, b in zip(cuts, [*cuts[1:], end], strict=True)]

    def _option(self, start: int, end: int, depth: int) -> _Option:
        nodes = self.nodes(start, end, depth + 1)
        head = self.tokens[start] if start < end else ""
        weight, rest = weighed(head)
        if rest == head or not isinstance(nodes[0], str):
            return _Option(UNIT, nodes)
        behind = nodes[0][len(head) - len(rest) :]
        return _Option(weight, (behind, *nodes[1:]) if behind else nodes[1:])


def _count_of(inside: Sequence[str]) -> _Count | None:
    """What ``2$$`` or ``1-2$$ and $$`` at the start says; None where there is no such thing."""
    match = _COUNT.fullmatch(inside[0]) if len(inside) > 1 and inside[1] == "$$" else None
    if not match:
        return None
    low, high = sorted((int(match[1]), int(match[2] or match[1])))
    if high > MAX_DRAWN:
        raise SdlabError(f"{{{match[0]}$$ draws more than {MAX_DRAWN:,}")
    end = next((i for i in range(2, len(inside)) if inside[i] in ("$$", "|", "{", "}")), None)
    if end is None or inside[end] != "$$":
        return _Count(low, high, JOINER, 2)
    return _Count(low, high, "".join(map(_plain, inside[2:end])), end + 1)


def _plain(token: str) -> str:
    return token[1:] if token in _ESCAPED else token


def _joined(nodes: Iterable[_Node]) -> Iterable[_Node]:
    for is_text, group in groupby(nodes, lambda node: isinstance(node, str)):
        if is_text:
            yield "".join(str(node) for node in group)
        else:
            yield from group


# ------------------------------------------------------------------------------------------------ drawing


def _nodes(option: _Option | Entry) -> tuple[_Node, ...]:
    return option.nodes if isinstance(option, _Option) else _read(option.text)


class _Draws:
    """Makes the choices of one text. A place is a tuple: which choice, which of its draws, which option, and on."""

    def __init__(self, seed: int, part: str, wildcards: Wildcards | None) -> None:
        self._named = (seed, "prompt choice", part)
        self._wildcards = wildcards
        self._left = MAX_CHARACTERS

    def text(self, nodes: Iterable[_Node], place: tuple[int, ...]) -> str:
        """The nodes as text."""
        if len(place) > 3 * 2 * MAX_DEPTH:
            raise SdlabError(f"a prompt's choices and wildcards are nested more than {2 * MAX_DEPTH} deep")
        pieces, number = [], 0
        for node in nodes:
            if isinstance(node, str):
                self._spend(len(node))
                pieces.append(node)
                continue
            self._spend(1)
            here = (*place, number)
            pieces.append(self._chosen(node, here) if isinstance(node, _Choice) else self._line(node, here))
            number += 1
        return "".join(pieces)

    def _chosen(self, choice: _Choice, place: tuple[int, ...]) -> str:
        options, count = self._options(choice), choice.count
        num = 1 if count is None else count.low + self._below(count.high - count.low + 1, (*place, -1))
        drawn = self._drawn([option.weight for option in options], num, place)
        texts = [self.text(_nodes(options[at]), (*place, i, at)) for i, at in enumerate(drawn)]
        if count is None:
            return texts[0]
        self._spend(len(count.joiner) * len(texts))
        return count.joiner.join(text for text in map(str.strip, texts) if text)

    def _options(self, choice: _Choice) -> Sequence[_Option | Entry]:
        """Its options; several out of one wildcard are several of its entries."""
        [first, *others] = choice.options
        if others or choice.count is None or self._wildcards is None or len(first.nodes) != 1:
            return choice.options
        [node] = first.nodes
        if not isinstance(node, _Wild):
            return choice.options
        return self._wildcards.entries(node.name)

    def _line(self, wild: _Wild, place: tuple[int, ...]) -> str:
        if self._wildcards is None:
            self._spend(len(wild.typed))
            return wild.typed
        entries = self._wildcards.entries(wild.name)
        [at] = self._drawn([entry.weight for entry in entries], 1, place)
        return self.text(_read(entries[at].text), (*place, 0, at))

    def _drawn(self, weights: Sequence[int], num: int, place: tuple[int, ...]) -> list[int]:
        """Places in `weights` of `num` draws, none twice before all have been drawn."""
        usable = [at for at, weight in enumerate(weights) if weight]
        if not usable:
            raise SdlabError("a choice whose options all have the weight 0")
        left: list[int] = []
        drawn = []
        for i in range(num):
            left = left or list(usable)
            sums = list(accumulate(weights[at] for at in left))
            drawn.append(left.pop(bisect_right(sums, self._below(sums[-1], (*place, i)))))
        return drawn

    def _below(self, end: int, place: tuple[int, ...]) -> int:
        """A number in [0, end) that belongs to this place."""
        return key(*self._named, *place) * end >> 63

    def _spend(self, num: int) -> None:
        self._left -= num
        if self._left < 0:
            raise SdlabError(f"a prompt grows beyond {MAX_CHARACTERS:,} characters")
