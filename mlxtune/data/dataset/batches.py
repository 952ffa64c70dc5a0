"""Examples -> padded batches, in an order that is a pure function of (seed, epoch).

Every row is used once per epoch, the tail too, and which rows meet changes with each epoch. Rows are what a person
counts, examples what a model is shown: a row may give several, one after the other. A plan deals in rows; the examples
of a batch of rows meet in one optimizer step, in as many micro-batches as they need:

    rows           `sharing` finds what they begin with together, once
    an epoch       `dealing` makes batches of rows, by length and by what they share
    a batch        `cutting` makes micro-batches of its examples
    micro-batch    `collate` pads them to one width

Rows that say which answer is preferred are pairs of two answers, or one that is rated. They are never divided: all
examples of a row are in one micro-batch, those of its chosen answer before those of its rejected one.

Legend: B examples of a batch, A answers of it, T tokens, N examples, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.cutting import Cutter, fill, fill_with_rows
from mlxtune.data.dataset.dealing import Dealer
from mlxtune.data.dataset.measured import answer_numbers, first_examples, measured
from mlxtune.data.dataset.sharing import Sharing, nothing_shared
from mlxtune.data.dataset.widths import widths
from mlxtune.data.rows.sides import Side

DEFAULT_ROWS = 4
EVALUATION_TOKENS = 4096  # of a batch of an evaluation, padded, at most
DEFAULT_EPOCHS = 1.0
DEALT = "by what they begin with"  # changes when rows that share a beginning are dealt in another way
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
    # [B] uint8, of `Side`: which answer of a preference each example is of. Not given: of none.
    sides: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    # [B] int32: the number of the answer that each example is of, 0 .. A - 1, going up. Without a side every example is
    # an answer of its own.
    answer_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        if not len(self.sides):
            object.__setattr__(self, "sides", np.zeros(len(self.rows), np.uint8))
        if not len(self.answer_of):
            object.__setattr__(self, "answer_of", np.arange(len(self.rows), dtype=np.int32))

    @property
    def targets(self) -> int:
        """Supervised tokens: the loss is divided by their number over the whole optimizer step."""
        return int(self.mask[:, 1:].sum())

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @property
    def answers(self) -> int:
        """A, how many answers there are: of pairs 2p and 2p + 1 are the chosen and the rejected one of pair p."""
        return int(self.answer_of[-1]) + 1 if len(self.answer_of) else 0

    @property
    def answer_sides(self) -> np.ndarray:
        """[A] uint8, of `Side`."""
        return self.sides[first_examples(self.answer_of)]

    @property
    def answer_tokens(self) -> np.ndarray:
        """[A] supervised tokens of each answer."""
        of_examples = self.mask[:, 1:].sum(axis=1, dtype=np.int64)
        return np.bincount(self.answer_of, of_examples, self.answers).astype(np.int64)

    @property
    def pairs(self) -> int:
        """How many pairs of answers there are."""
        return int(np.sum(self.answer_sides == Side.CHOSEN))

    @property
    def whole_parts(self) -> list[slice]:
        """The examples that are computed together at least: those of a pair, or of one answer."""
        is_second = self.answer_sides == Side.REJECTED
        starts = first_examples(self.answer_of)[~is_second].tolist()
        return [slice(start, end) for start, end in pairwise([*starts, len(self.rows)])]

    def part(self, rows: slice | np.ndarray) -> Batch:
        """Some of its examples, padded as before, their answers numbered from 0.

        rows: places in the batch, [examples of the part] where they are an array; they must hold `whole_parts` whole.
        """
        _, answer_of = np.unique(self.answer_of[rows], return_inverse=True)
        return Batch(
            self.rows[rows],
            self.ids[rows],
            self.lengths[rows],
            self.mask[rows],
            self.sides[rows],
            answer_of.astype(np.int32),
        )

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
    known = measured(examples)
    index = np.asarray(rows, np.int64)
    return Batch(index, ids, lengths, mask, known.sides[index], answer_numbers(known, index))


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] tokens of each example."""
    return measured(examples).lengths


def in_order(examples: Sequence[Example], tokens: int = EVALUATION_TOKENS) -> list[Batch]:
    """Every example once, shortest first, in batches of at most `tokens` padded tokens: for evaluation. Rows that say
    which answer is preferred are whole, and as long as their longest example.
    """
    known = measured(examples)
    lengths = known.lengths
    if not known.have_sides:
        order = np.argsort(lengths, kind="stable").tolist()
        return [collate(examples, batch) for batch in fill(order, lengths, None, tokens)]
    firsts = first_examples(known.row_of)
    by_length = np.argsort(np.maximum.reduceat(lengths, firsts), kind="stable").tolist()
    batches = fill_with_rows(by_length, np.append(firsts, len(lengths)), lengths, tokens)
    return [collate(examples, batch) for batch in batches]


def side_by_side(examples: Sequence[Example], tokens: int, sharing: Sharing) -> list[Batch]:
    """As `in_order`, with the examples of a row in one batch and rows that begin alike beside each other; tokens count
    as they are computed.
    """
    if not len(examples):
        return []
    known = measured(examples)
    lengths = known.lengths
    firsts = first_examples(known.row_of)
    longest = np.maximum.reduceat(lengths, firsts)
    rows = np.lexsort((longest, np.array(sharing.group_of))).tolist()
    first = np.append(firsts, len(lengths))
    cutter = Cutter(lengths, lengths - sharing.saved, first, None, tokens, sharing, known.have_sides)
    return [collate(examples, batch) for batch in cutter.micro_batches(rows)]


class Plan:
    """Which rows each optimizer step of a run trains on; any step can be asked for directly, so a run can resume
    anywhere. A step is `train.accumulate` batches of rows (`dealing`), and the examples of a batch are computed in one
    or several micro-batches (`cutting`).
    """

    def __init__(self, examples: Sequence[Example], section: TrainSection, sharing: Sharing | None = None) -> None:
        """sharing: what the examples begin with together, so that those that do meet, and count with what is computed
        of them; None: each counts whole, and only its length decides what it meets.
        """
        self.examples = measured(examples)
        self.section = section
        self.sharing = sharing
        size = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)  # rows of a batch
        tokens = section.batch_tokens or 0  # padded tokens of a batch, where its rows are not counted
        lengths = self.examples.lengths
        usual = size or max(1, tokens * len(examples) // int(np.sum(lengths)))  # rows of a usual batch
        self.widths = widths(lengths, min(MAX_BUCKETS, max(1, len(examples) // usual)))
        starts = first_examples(self.examples.row_of)
        self.rows = len(starts)
        first = np.append(starts, len(lengths))  # [R + 1]: row r has the examples first[r] .. first[r + 1] - 1
        bucket = np.searchsorted(self.widths, lengths)
        padded = np.asarray(self.widths)[bucket]  # [N]
        shared = sharing or nothing_shared(len(lengths), self.rows)
        # What branches off another example is padded but little: not to the width of its bucket.
        computed = np.where(shared.saved > 0, lengths - shared.saved, padded)  # [N]
        beside = np.add.reduceat(computed, starts) - np.maximum.reduceat(padded, starts)  # [R]
        self._dealer = Dealer(
            size=size,
            tokens=tokens,
            widths=self.widths,
            bucket=np.maximum.reduceat(bucket, starts).tolist(),
            beside=beside.tolist(),
            sharing=shared,
        )
        self._cutter = Cutter(padded, computed, first, size, tokens, sharing, self.examples.have_sides)
        self._epochs: list[list[list[list[int]]]] = []  # epoch -> step -> batch -> row
        self._starts = [0]  # first step (0-based) of each planned epoch
        self.steps = self._all_steps()

    def computed_whole(self) -> Plan:
        """The same steps for a way that shares nothing: their examples are cut into micro-batches by what each takes
        alone.
        """
        other = copy(self)
        other._cutter = replace(self._cutter, sharing=None)
        return other

    def with_settings(self, section: TrainSection) -> Plan:
        """The same examples, which share the same, with other sizes of batches."""
        other = Plan(self.examples, section, self.sharing)
        return other if self._cutter.sharing else other.computed_whole()

    @property
    def shares(self) -> bool:
        """Whether examples meet because they begin alike, for longer than all rows do."""
        return self.sharing is not None and self.sharing.beyond_all

    @property
    def dealt(self) -> str:
        """How rows are put together, as a checkpoint notes it: a run whose rows were dealt otherwise had other steps.
        "": by length alone.
        """
        if self.sharing is None:
            return ""
        counted = self.section.batch_tokens and self.sharing.groups[0].tokens
        return DEALT if self.shares or counted else ""

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
        batches = self._dealer.batches(self.examples.epoch(draw).tolist())
        size = self.section.accumulate
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + len(steps))

    # What a run asks.

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step `number`, counted from 1."""
        batches = []
        for rows in self._of_step(number):
            for examples in self._cutter.micro_batches(rows):
                batches.append(collate(self.examples, examples, self.width(examples)))
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
        """(examples, width, targets) of every micro-batch of the first epoch. Where examples of a row share, they count
        as so many of the full width as have the tokens that the rows compute.
        """
        targets = self.examples.targets
        shapes = []
        for examples in self.micro_batches():
            width = self.width(examples)
            shapes.append((self._cutter.whole_examples(examples, width), width, int(targets[examples].sum())))
        return shapes

    def micro_batches(self) -> Iterator[list[int]]:
        """The examples of every micro-batch of the first epoch."""
        for rows in self._first_epoch():
            yield from self._cutter.micro_batches(rows)

    @property
    def divided(self) -> int:
        """Rows of the first epoch that are too long for all of their examples to be computed together."""
        return sum(self._cutter.divided(rows) for rows in self._first_epoch())

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

    def width(self, examples: list[int]) -> int:
        """What the examples of a micro-batch are padded to."""
        return int(self._cutter.padded[examples].max())
