"""A sample of a split's rows, for who may not take the time to look at all of them.

Of a split of 1,000,000 rows the first READ_ROWS are read, and of these some are taken by chance, which the seed
decides. What is said of them is said of a sample: `Sample.line` names it as one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from mlxtune.data.rows.formats import Record, letters_of
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.two_sides import TwoSides, records_of, together

READ_ROWS = 20_000  # rows of a split that are read
READ_LETTERS = 32 << 20  # characters after which reading ends too
TAKEN_LETTERS = 2 << 20  # characters of the sample: about a second to tokenize
_Row = Record | Bad | TwoSides


@dataclass(frozen=True)
class Sample:
    """Rows of one split, in their order."""

    rows: list[Record | Bad]  # those that were taken; of a pair both records
    taken: int  # how many these are, a pair being one
    read: int  # rows among which they were chosen
    is_end: bool  # those are all rows of the split

    @property
    def is_whole(self) -> bool:
        """Whether it is no sample at all, but the split."""
        return self.is_end and self.taken == self.read

    def line(self, seed: int) -> str:
        """What it is, in words; "" where it is all there is."""
        if self.is_whole:
            return ""
        first = "" if self.is_end else "first "
        return f"{self.taken:,} of the {first}{self.read:,} rows, chosen by chance (seed {seed})"


def sample(rows: Iterable[Record | Bad], most: int, seed: int) -> Sample:
    """At most so many of some rows, each with the same chance among those that are read. A pair is one row."""
    chance = random.Random(seed)
    taken: list[tuple[int, _Row]] = []  # (place, row): a reservoir (Vitter 1985, algorithm R)
    read = letters = 0
    is_end = True
    for row in together(rows):
        if read == READ_ROWS or letters > READ_LETTERS:
            is_end = False
            break
        letters += _letters_of(row)
        if len(taken) < most:
            taken.append((read, row))
        else:
            place = chance.randrange(read + 1)
            if place < most:
                taken[place] = (read, row)
        read += 1
    short_enough = _first_letters(taken, chance)
    kept: list[Record | Bad] = []
    for _, row in sorted(short_enough, key=lambda pair: pair[0]):
        kept += records_of(row) if isinstance(row, Record | TwoSides) else [row]
    return Sample(kept, len(short_enough), read, is_end)


def _first_letters(taken: list[tuple[int, _Row]], chance: random.Random) -> list[tuple[int, _Row]]:
    """As many of them, one at least, as TAKEN_LETTERS allow; which, chance decides."""
    order = chance.sample(range(len(taken)), len(taken))
    kept: list[tuple[int, _Row]] = []
    letters = 0
    for index in order:
        row = taken[index][1]
        letters += _letters_of(row)
        if kept and letters > TAKEN_LETTERS:
            break
        kept.append(taken[index])
    return kept


def _letters_of(row: _Row) -> int:
    if isinstance(row, TwoSides):
        return letters_of(row.chosen) + letters_of(row.rejected)
    return letters_of(row) if isinstance(row, Record) else 0
