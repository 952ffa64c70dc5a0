"""Rows -> batches of rows, in the order of an epoch: similar lengths together, and what begins alike.

Rows wait in buckets of similar length until a batch is full, so an epoch has few shapes (one for each bucket, and
tails) and its order decides which rows meet. For batches of two rows, widths 10 and 30, and an epoch's order a b c d e
of rows of 4, 30, 9, 10 and 8 tokens:

    bucket 10    a c | d e        two full batches
    bucket 30    b                the tail; what is left of a narrower bucket would have come first
    batches      a c, b, d e      by the average place of their rows in the order: 1, 1, 3.5 (from 0)

Rows that begin alike are dealt so among themselves first, and what does not fill a batch goes on together to the group
around theirs (`sharing` draws the groups). Four rows to a batch, seven questions on each of two documents, all lengths
alike:

    document 1    a b c d | e f g      e f g go on
    document 2    h i j k | l m n      l m n go on
    all rows      e f g l | m n        a batch may hold the questions of several documents

So every batch is full but the last one, whatever shares a beginning. Where tokens are counted instead of rows, those
that are computed are counted: what a row shares with the one before it in its batch is not.

Rejected: sorting by jittered length, which pads more for the same mixing and gives every batch a shape of its own.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mlxtune.data.dataset.sharing import Sharing


@dataclass(frozen=True)
class Dealer:
    """Deals the rows of an epoch."""

    size: int | None  # rows of a batch; None: `tokens` counts
    tokens: int  # of a batch, padded and computed, at most; one row may be more
    widths: list[int]  # of the buckets, ascending
    bucket: list[int]  # [R] number of the bucket of each row, by its longest example
    beside: list[int]  # [R] computed tokens of a row beside its longest example
    sharing: Sharing  # what rows begin with together

    def batches(self, order: Sequence[int]) -> list[list[int]]:
        """The batches of an epoch's order of rows, which may hold a row several times. They are sorted by the mean
        place of their rows in the order, so the order keeps its meaning.
        """
        place = np.empty(len(self.bucket))  # of each row in the order; later places win where a row comes twice
        place[order] = np.arange(len(order))
        groups = self.sharing.groups
        alone: list[list[int]] = [[] for _ in groups]  # the rows of each group that are in none inside it
        for row in order:
            alone[self.sharing.group_of[row]].append(row)
        left: list[list[list[int]]] = [[] for _ in groups]  # what the groups inside each could not fill a batch with
        batches: list[list[int]] = []
        for number in reversed(range(len(groups))):  # a group comes after the one that it is in
            full, rest = self._of_group(alone[number], left[number])
            batches += full
            if not rest:
                continue
            if number:
                left[groups[number].around].append(rest)
            else:
                batches.append(rest)
        return sorted(batches, key=lambda rows: float(place[rows].mean()))

    def _of_group(self, rows: list[int], units: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """(full batches of each bucket, what is left at last). What is left of a bucket goes to the next wider one.

        units: rows that stay beside each other.
        """
        buckets: list[list[int]] = [[] for _ in self.widths]
        for unit in units:
            buckets[max(self.bucket[row] for row in unit)] += unit
        for row in rows:
            buckets[self.bucket[row]].append(row)
        batches: list[list[int]] = []
        left: list[int] = []
        for width, bucket in zip(self.widths, buckets, strict=True):
            full = self._cut([*left, *bucket], width)
            left = []
            if full and not self._is_full(full[-1], width):
                left = full.pop()
            batches += full
        return batches, left

    def _cut(self, rows: list[int], width: int) -> list[list[int]]:
        """Batches of as many rows as go into one, whose longest examples are padded to `width`; the last may have room
        for more.
        """
        if self.size:
            return [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        batches: list[list[int]] = []
        room = 0  # tokens that the last batch can still take
        for row in rows:
            needed = width + self.beside[row]
            if batches:
                needed -= self.sharing.between(batches[-1][-1], row)
            if not batches or needed > room:
                batches.append([])
                needed = width + self.beside[row]
                room = self.tokens
            batches[-1].append(row)
            room -= needed
        return batches

    def _is_full(self, rows: list[int], width: int) -> bool:
        """Whether not even one more example of this width goes into a batch of rows."""
        if self.size:
            return len(rows) == self.size
        return self._computed(rows, width) + width - self.sharing.groups[0].tokens > self.tokens

    def _computed(self, rows: list[int], width: int) -> int:
        """Tokens that a batch computes whose longest examples are padded to `width`."""
        total = width + self.beside[rows[0]]
        for before, row in pairwise(rows):
            total += width + self.beside[row] - self.sharing.between(before, row)
        return total
