"""A batch of rows -> the micro-batches of examples in which it is computed.

Where nothing is shared, examples of similar length go together, as many as the rows or the tokens of a batch allow.
Where beginnings are shared, the examples of a row stay together, and rows beside each other that begin alike; what is
counted is what is computed. Three conversations in micro-batches of 1,000 tokens:

    row 0    examples of 100, 300 and 500 tokens, which begin as the next one does but for 10    10 + 10 + 500
    row 1    of 200 and 400, but for 20; 80 tokens are those of row 0                            20 + 400 - 80
    row 2    of 300, 600, 900 and 950, but for 50                                                50 + 50 + 50 + 950

    rows 0 and 1           860
    row 2 but its last     50 + 50 + 900
    its last               950

So a row is divided only where it is too long for a micro-batch of its own, and then its beginning is computed again in
each part of it. Without a number of tokens, as many are allowed as `train.batch_rows` rows of the longest example have:
memory for that is needed anyhow.

A row that says which answer is preferred is never divided, for its loss is one of all its examples; without a number of
tokens, a batch of such rows is one micro-batch.

Legend: N examples, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.data.dataset.sharing import Sharing


def fill(order: Sequence[int], lengths: Any, most: int | None, tokens: int | None) -> list[list[int]]:
    """Cut an order of examples into batches of `most` of them, or of at most `tokens` padded tokens (at least one).

    order: indices of examples; lengths: [N].
    """
    batches: list[list[int]] = []
    longest = 0  # of the last batch
    for example in order:
        widened = max(longest, lengths[example])
        if not batches:
            is_full = True
        elif tokens is None:
            is_full = len(batches[-1]) == most
        else:
            is_full = (len(batches[-1]) + 1) * widened > tokens
        if is_full:
            batches.append([])
            widened = lengths[example]
        longest = widened
        batches[-1].append(example)
    return batches


def fill_with_rows(rows: Sequence[int], first: np.ndarray, lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """As `fill`, by rows with all of their examples.

    rows: an order of them; first: [R + 1], as `Cutter` has it; lengths: [N].
    """
    batches: list[list[int]] = []
    longest = 0  # of the last batch
    for row in rows:
        examples = list(range(int(first[row]), int(first[row + 1])))
        width = int(lengths[examples].max())
        widened = max(longest, width)
        if not batches or (len(batches[-1]) + len(examples)) * widened > tokens:
            batches.append([])
            widened = width
        longest = widened
        batches[-1] += examples
    return batches


@dataclass(frozen=True)
class Cutter:
    """Cuts batches of rows."""

    padded: np.ndarray  # [N] width of the bucket of each example
    computed: np.ndarray  # [N] tokens that an example computes where the next one of its row is beside it
    first: np.ndarray  # [R + 1]: row r has the examples first[r] .. first[r + 1] - 1
    size: int | None  # examples of a micro-batch; None: `tokens` counts
    tokens: int  # of a micro-batch, padded; 0: `size` counts
    sharing: Sharing | None  # what rows begin with together; None: every example is computed whole
    whole_rows: bool = False  # whether rows say which answer is preferred, so that none is divided

    def micro_batches(self, rows: list[int]) -> list[list[int]]:
        """The examples of a batch of rows, as they are computed together."""
        if self.whole_rows and not self.tokens:
            return [[index for row in rows for index in self._examples(row)]]
        if self.sharing is not None:
            return self._beside_each_other(rows, self.sharing)
        if self.whole_rows:
            return fill_with_rows(rows, self.first, self.padded, self.tokens)
        examples = [index for row in rows for index in self._examples(row)]
        fits = not self.tokens or len(examples) * int(self.padded[examples].max()) <= self.tokens
        if len(examples) == len(rows) and fits:
            return [examples]
        examples.sort(key=self.padded.__getitem__)
        return fill(examples, self.padded, self.size, self.tokens or None)

    def whole_examples(self, examples: list[int], width: int) -> int:
        """How many examples of this width have as many tokens as these compute, each row by itself."""
        if self.sharing is None:
            return len(examples)
        tokens = 0
        for index, following in zip(examples, [*examples[1:], None], strict=True):
            branches_off = following == index + 1 and self.sharing.saved[index] > 0
            tokens += int(self.computed[index]) if branches_off else width
        return -(-tokens // width)

    @property
    def most(self) -> int:
        """Tokens of a micro-batch, as they are computed; a single example may have more."""
        return self.tokens or (self.size or 1) * int(self.padded.max())

    def divided(self, rows: list[int]) -> int:
        """How many of these rows are too long to be computed together with all of their examples."""
        if self.sharing is None or self.whole_rows:
            return 0
        return sum(self._whole(row) > self.most for row in rows)

    def _examples(self, row: int) -> range:
        return range(int(self.first[row]), int(self.first[row + 1]))

    def _whole(self, row: int) -> int:
        """Tokens that a row computes alone, with all of its examples."""
        return int(self.computed[self.first[row] : self.first[row + 1]].sum())

    def _beside_each_other(self, rows: list[int], sharing: Sharing) -> list[list[int]]:
        parts: list[list[int]] = []
        room = 0  # tokens that the last part can still take
        for number, row in enumerate(rows):
            needed = self._whole(row)
            again = sharing.between(rows[number - 1], row) if parts else 0  # computed with the row before
            if parts and needed - again <= room:
                parts[-1] += self._examples(row)
                room -= needed - again
                continue
            pieces = self._pieces(row)
            parts += pieces
            room = self.most - self._of_piece(pieces[-1])
        return parts

    def _pieces(self, row: int) -> list[list[int]]:
        """The examples of a row, as many together as are allowed."""
        if self.whole_rows:
            return [list(self._examples(row))]
        pieces: list[list[int]] = []
        for index in self._examples(row):
            if pieces and self._of_piece([*pieces[-1], index]) <= self.most:
                pieces[-1].append(index)
            else:
                pieces.append([index])
        return pieces

    def _of_piece(self, examples: list[int]) -> int:
        """Tokens of some examples of a row that follow each other; the last one is computed whole."""
        return int(self.computed[examples[:-1]].sum() + self.padded[examples[-1]])
