"""Examples -> padded batches, in an order that is a pure function of (seed, epoch).

Every row is used once per epoch, the tail too. Rows wait in buckets of similar length until a batch is full, so an
epoch has few shapes (one per bucket, and tails) and its order decides which rows meet: membership changes each epoch.
For batches of two rows, widths 10 and 30, and an epoch's order a b c d e of rows of 4, 30, 9, 10 and 8 tokens:

    bucket 10    a c | d e        two full batches
    bucket 30    b                the tail; what is left of a narrower bucket would have come first
    steps        a c, b, d e      by the average place of their rows in the order: 1, 1, 3.5 (from 0)

Rejected: sorting by jittered length, which pads more for the same mixing and gives every batch a shape of its own.

Rows are what a person counts, examples what a model is shown: a row may give several, one after the other. A plan
deals in rows; the examples of a batch of rows meet in one optimizer step, in as many micro-batches as they need.

Legend: B examples of a batch, T tokens, N examples, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.beginnings import MIN_GROUP_TOKENS, common, groups
from mlxtune.data.dataset.measured import first_examples, measured
from mlxtune.data.dataset.widths import widths

DEFAULT_ROWS = 4
EVALUATION_TOKENS = 4096  # of a batch of an evaluation, padded, at most
DEFAULT_EPOCHS = 1.0
PAD = 0  # any id: causal attention keeps padding on the right out of every supervised position
# Each bucket is a shape, and fewer pad more: 7,473 lognormal lengths (median 207, sigma 0.27, like word problems) are
# padded by 2.5% with 24 widths, by 5.4% with 12; of chats (median 400, sigma 1, up to 4096) by 7.1% and 15%.
MAX_BUCKETS = 24


@dataclass(frozen=True)
class Batch:
    """Some examples, computed together."""

    rows: np.ndarray  # [B] index of each example in its split (not of its row in the file)
    ids: np.ndarray  # [B, T] int32, padded on the right
    lengths: np.ndarray  # [B] tokens that are not padding
    mask: np.ndarray  # [B, T] uint8: 1 where the token is a target

    @property
    def targets(self) -> int:
        """Supervised tokens: the loss is divided by their number over the whole optimizer step."""
        return int(self.mask[:, 1:].sum())

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    def part(self, rows: slice) -> Batch:
        """Some of its examples, padded as before."""
        return Batch(self.rows[rows], self.ids[rows], self.lengths[rows], self.mask[rows])

    def supervised(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, target ids), [supervised tokens] each: flat positions in a [B, T-1] hidden state that predict a
        supervised token.
        """
        flat = np.flatnonzero(self.mask[:, 1:])
        return flat.astype(np.int32), self.ids[:, 1:].reshape(-1)[flat]


def collate(examples: Sequence[Example], rows: Sequence[int], width: int = 0) -> Batch:
    """Pad the chosen examples to the longest of them, or to `width` where that is more. rows: their indices."""
    chosen = [examples[row] for row in rows]
    lengths = np.array([len(example.ids) for example in chosen])
    ids = np.full((len(rows), max(width, int(lengths.max()))), PAD, np.int32)
    mask = np.zeros(ids.shape, np.uint8)
    for place, example in enumerate(chosen):
        ids[place, : lengths[place]] = example.ids
        mask[place, : lengths[place]] = example.mask
    return Batch(np.asarray(rows, np.int64), ids, lengths, mask)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] tokens of each example."""
    return measured(examples).lengths


def in_order(examples: Sequence[Example], tokens: int = EVALUATION_TOKENS) -> list[Batch]:
    """Every example once, shortest first, in batches of at most `tokens` padded tokens: for evaluation."""
    lengths = lengths_of(examples)
    order = np.argsort(lengths, kind="stable").tolist()
    return [collate(examples, rows) for rows in fill(order, lengths, None, tokens)]


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


class Plan:
    """Which rows each optimizer step of a run trains on; any step can be asked for directly, so a run can resume
    anywhere. A step is `train.accumulate` batches of rows. Rows of one example each are one micro-batch; where a row
    gives several, those of its batch are cut into micro-batches within `batch_rows` or `batch_tokens`, similar lengths
    together.

    grouped: rows that share a long beginning, by their first examples, share a batch.
    """

    def __init__(self, examples: Sequence[Example], section: TrainSection, grouped: bool = False) -> None:
        self.examples = measured(examples)
        self.section = section
        self._size = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)  # rows of a batch
        self._tokens = section.batch_tokens or 0  # padded tokens of a batch, where its rows are not counted
        lengths = self.examples.lengths
        usual = self._size or max(1, self._tokens * len(examples) // int(np.sum(lengths)))  # rows of a usual batch
        self.widths = widths(lengths, min(MAX_BUCKETS, max(1, len(examples) // usual)))
        self._measure(lengths)
        self._groups = self._alike() if grouped else []  # rows that share a beginning
        self._epochs: list[list[list[list[int]]]] = []  # epoch -> step -> batch -> row
        self._starts = [0]  # first step (0-based) of each planned epoch
        self.steps = self._all_steps()

    def _measure(self, lengths: np.ndarray) -> None:
        """What is known of each row and example before any epoch. lengths: [N]."""
        starts = first_examples(self.examples.row_of)
        bucket = np.searchsorted(self.widths, lengths)
        padded = np.asarray(self.widths)[bucket]
        longest = np.maximum.reduceat(padded, starts)
        self.rows = len(starts)
        self._first = np.append(starts, len(lengths))  # [R + 1]: row r has the examples first[r] .. first[r + 1] - 1
        self._lengths = np.maximum.reduceat(np.asarray(lengths), starts)  # [R] of each row's longest example
        self._bucket = np.maximum.reduceat(bucket, starts).tolist()  # [R]
        self._padded = padded  # [N]
        self._others = (np.add.reduceat(padded, starts) - longest).tolist()  # [R] padded tokens beside the longest

    def _alike(self) -> list[list[int]]:
        """Groups of rows whose first examples share a beginning that is longer than the one that all have."""
        of_all = min((common(self.examples[0].ids, example.ids) for example in self.examples), default=0)
        found = groups(self.examples, of_all + MIN_GROUP_TOKENS, self._first[:-1].tolist())
        return [np.searchsorted(self._first, group).tolist() for group in found]

    def _all_steps(self) -> int:
        """The steps of the run: as many as are asked for, or those of its epochs, of which the last may be a part."""
        if self.section.steps is not None:
            return self.section.steps
        whole, part = divmod(self.section.epochs or DEFAULT_EPOCHS, 1)
        while len(self._epochs) < int(whole) + (part > 0):
            self._plan_epoch()
        steps = self._starts[int(whole)]
        if part:
            steps += max(1, round(part * len(self._epochs[int(whole)])))
        return steps

    # What meets in an epoch.

    def _plan_epoch(self) -> None:
        draw = np.random.default_rng([self.section.seed, len(self._epochs)])
        batches = self._batches(self.examples.epoch(draw).tolist())
        size = self.section.accumulate
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + len(steps))

    def _batches(self, order: list[int]) -> list[list[int]]:
        """The batches of rows of an epoch's order: first those of groups, then those of buckets. Batches are
        sorted by the mean position of their rows in the order, so the order keeps its meaning.
        """
        place = np.empty(self.rows)  # of each row in the order; later places win where a row comes twice
        place[order] = np.arange(len(order))
        batches, alone = self._of_groups(order)
        if self._groups:
            alone.sort(key=place.__getitem__)
        batches += self._of_buckets(alone)
        return sorted(batches, key=lambda rows: float(place[rows].mean()))

    def _of_groups(self, order: list[int]) -> tuple[list[list[int]], list[int]]:
        """(Batches of rows that share a beginning, the rows that are in none)."""
        group_of: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            for row in group:
                group_of[row] = number
        together: list[list[int]] = [[] for _ in self._groups]
        alone: list[int] = []
        for row in order:  # which may hold a row several times
            if row in group_of:
                together[group_of[row]].append(row)
            else:
                alone.append(row)
        batches: list[list[int]] = []
        for rows in together:
            if not rows:  # an epoch of a mixture may take none of them
                continue
            for batch in self._cut(rows, max(self._lengths[row] for row in rows)):
                if len(batch) > 1:
                    batches.append(batch)
                else:
                    alone += batch
        return batches, alone

    def _of_buckets(self, rows: list[int]) -> list[list[int]]:
        """Full batches of each bucket; what is left of one goes to the next wider one, and the last is the tail."""
        buckets: list[list[int]] = [[] for _ in self.widths]
        for row in rows:
            buckets[self._bucket[row]].append(row)
        batches: list[list[int]] = []
        left: list[int] = []
        for width, bucket in zip(self.widths, buckets, strict=True):
            full = self._cut([*left, *bucket], width)
            left = []
            if full and not self._full(full[-1], width):
                left = full.pop()
            batches += full
        if left:
            batches.append(left)
        return batches

    def _cut(self, rows: list[int], width: int) -> list[list[int]]:
        """Batches of as many rows as go into one, whose longest examples are padded to `width`; the last may have room
        for more.
        """
        if self._size:
            return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]
        batches: list[list[int]] = []
        room = 0  # padded tokens that the last batch can still take
        for row in rows:
            needed = width + self._others[row]
            if not batches or needed > room:
                batches.append([])
                room = self._tokens
            batches[-1].append(row)
            room -= needed
        return batches

    def _full(self, rows: list[int], width: int) -> bool:
        """Whether not even one more example of this width goes into a batch of rows."""
        if self._size:
            return len(rows) == self._size
        return sum(width + self._others[row] for row in rows) + width > self._tokens

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        """The examples of a batch of rows, as they are computed together."""
        examples = [index for row in rows for index in range(self._first[row], self._first[row + 1])]
        if len(examples) == len(rows):
            return [examples]
        examples.sort(key=self._padded.__getitem__)
        return fill(examples, self._padded, self._size, self.section.batch_tokens)

    # What a run asks.

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step `number`, counted from 1."""
        batches = []
        for rows in self._of_step(number):
            for examples in self._micro_batches(rows):
                batches.append(collate(self.examples, examples, self._width(examples)))
        return batches

    def rows_of_step(self, number: int) -> list[int]:
        """The rows of optimizer step `number`, counted from 1."""
        return [row for rows in self._of_step(number) for row in rows]

    @property
    def rows_per_batch(self) -> float:
        """How many rows a step takes for each of its `accumulate` batches, on average of the first epoch."""
        sizes = [len(rows) for rows in self._first_epoch()]
        return sum(sizes) / len(sizes)

    @property
    def passes(self) -> float:
        """How many epochs the run takes, in steps of the first one."""
        self._first_epoch()
        return self.steps / self._starts[1]

    def shapes(self) -> list[tuple[int, int, int]]:
        """(examples, width, targets) of every micro-batch of the first epoch."""
        targets = self.examples.targets
        shapes = []
        for rows in self._first_epoch():
            for examples in self._micro_batches(rows):
                shapes.append((len(examples), self._width(examples), int(targets[examples].sum())))
        return shapes

    def _first_epoch(self) -> list[list[int]]:
        """Its batches of rows."""
        if not self._epochs:
            self._plan_epoch()
        return [rows for step in self._epochs[0] for rows in step]

    def _of_step(self, number: int) -> list[list[int]]:
        """The batches of rows of a step."""
        while self._starts[-1] < number:
            self._plan_epoch()
        epoch = int(np.searchsorted(self._starts, number - 1, side="right")) - 1
        return self._epochs[epoch][number - 1 - self._starts[epoch]]

    def _width(self, examples: list[int]) -> int:
        return int(self._padded[examples].max())
