"""Which rows are computed together, and which beginnings they share.

A row is what the model reads to score a text: the context and the text, without its last token. Five examples of one
subject stand before each question, and one question before each of its answers:

    row 0   e x a m p l e s   question one   answer A         shared[0]: the examples
    row 1   e x a m p l e s   question one   answer B         shared[1]: the examples and question one
    row 2   e x a m p l e s   question two   answer A
    row 3   e x a m p l e s   question two   answer B

Parts: rows 0 and 1 behind (examples, + question one), rows 2 and 3 behind (examples, + question two). Taken in this
order, the examples are computed once and each question once (`Scorer`). Rows sorted by their tokens stand beside those
that begin alike, so that looking at neighbours is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlxtune.data.dataset.beginnings import MIN_GROUP_TOKENS, common


@dataclass(frozen=True)
class Pair:
    """A text whose probability is asked, and what stands before it. Neither is empty."""

    context: tuple[int, ...]  # token ids
    text: tuple[int, ...]  # token ids

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.context + self.text[:-1]

    @property
    def first(self) -> int:
        """The position in the inputs that predicts the text's first token."""
        return len(self.context) - 1


@dataclass(frozen=True)
class Row:
    """What is read once for all pairs that have the same inputs, as those of answers of one token have."""

    ids: tuple[int, ...]  # the inputs
    first: int  # the first position whose prediction is needed
    places: tuple[int, ...]  # of its pairs


@dataclass(frozen=True)
class Part:
    """Rows that are computed in one pass."""

    rows: tuple[Row, ...]  # distinct, the padding decided by the longest
    # Lengths of the beginnings that they share, each longer than the one before, which other parts share too.
    shared: tuple[int, ...]


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """The distinct rows of pairs, sorted by their tokens."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.inputs, []).append(place)
    return [Row(ids, min(pairs[place].first for place in own), tuple(own)) for ids, own in sorted(places.items())]


def parts(rows: Sequence[Row], most: int, longest: int | None = None) -> list[Part]:
    """Every row in one part, of `most` rows at most. rows: sorted by their tokens.

    longest: rows of more tokens are computed alone and share nothing (`model.corrections.extent`); None: none is.
    """
    alone = [row for row in rows if longest is not None and len(row.ids) > longest]
    others = [row for row in rows if longest is None or len(row.ids) <= longest]
    found = _behind((), others, most) if most > 1 else [Part((row,), ()) for row in others]
    return [*found, *(Part((row,), ()) for row in alone)]


def _behind(shared: tuple[int, ...], rows: Sequence[Row], most: int) -> list[Part]:
    """The parts of rows that share what `shared` says: first those that share more among them, then the others."""
    done = shared[-1] if shared else 0
    found: list[Part] = []
    left: list[Row] = []
    for cluster in _clusters(rows, done):
        if len(cluster) == 1:
            left += cluster
        else:
            more = min(_alike(one, other) for one, other in pairwise(cluster))
            found += _behind((*shared, more), cluster, most)
    left.sort(key=lambda row: len(row.ids))  # rows of like lengths need little padding
    for start in range(0, len(left), most):
        found.append(Part(tuple(left[start : start + most]), shared))
    return found


def _clusters(rows: Sequence[Row], done: int) -> list[list[Row]]:
    """Neighbours that share enough beyond their first `done` tokens to be worth a pass of its own."""
    found: list[list[Row]] = []
    for row in rows:
        if found and _alike(found[-1][-1], row) >= done + MIN_GROUP_TOKENS:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _alike(one: Row, other: Row) -> int:
    """How many tokens two rows can share: those before what is needed of either."""
    return min(common(one.ids, other.ids), one.first, other.first)
