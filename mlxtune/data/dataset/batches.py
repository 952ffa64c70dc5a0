"""Examples -> padded batches, in an order that is a pure function of (seed, epoch).

Every row is used once per epoch, the tail too. Rows wait in buckets of similar length until a batch is full, so an
epoch has few shapes (one per bucket, and tails) and its order decides which rows meet: membership changes each epoch.
Rejected: sorting by jittered length, which pads more for the same mixing and gives every batch a shape of its own.

Rows are what a person counts, examples what a model is shown: a row may give several, one after the other. A plan
deals in rows; the examples of a batch of rows meet in one optimizer step, in as many micro-batches as they need.

Legend: B examples of a batch, T tokens, W width that a bucket is padded to, N examples, R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example

DEFAULT_ROWS = 4
EVALUATION_TOKENS = 4096  # of a batch of an evaluation, padded, at most
DEFAULT_EPOCHS = 1.0
PAD = 0  # any id: causal attention keeps padding on the right out of every supervised position
MAX_BUCKETS = 24
MIN_GROUP_TOKENS = 32  # a beginning that only some rows share is worth a batch of their own from here on


@dataclass(frozen=True)
class Batch:
    """rows: [B] index of each example in its split (not of its row in the file); ids: [B, T] int32, padded on the
    right; lengths: [B]; mask: [B, T] uint8, 1 where the token is a target.
    """

    rows: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray

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
        """(positions, target ids), [N] each: flat positions in a [B, T-1] hidden state that predict a supervised
        token.
        """
        flat = np.flatnonzero(self.mask[:, 1:])
        return flat.astype(np.int32), self.ids[:, 1:].reshape(-1)[flat]


def collate(examples: Sequence[Example], rows: Sequence[int], width: int = 0) -> Batch:
    """Pad the chosen examples to the longest of them, or to `width` where that is more."""
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
    known = getattr(examples, "lengths", None)
    return np.array([len(example.ids) for example in examples]) if known is None else known


def targets_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] supervised tokens of each example."""
    column = getattr(examples, "column", None)
    return np.array([np.sum(example.mask[1:]) for example in examples]) if column is None else column("targets")


def row_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] the row that each example is of, counted from 0; examples that know of no rows are one row each."""
    known = getattr(examples, "row_of", None)
    return np.arange(len(examples)) if known is None else known


def firsts(rows: np.ndarray) -> np.ndarray:
    """[R] the first example of each row. rows: [N] the row of each example, going up without a gap."""
    return np.flatnonzero(np.diff(rows, prepend=-1))


def fill(order: Sequence[int], lengths: Any, most: int | None, tokens: int | None) -> list[list[int]]:
    """Cut an order of examples into batches of `most` of them, or of at most `tokens` padded tokens (at least one)."""
    out: list[list[int]] = []
    longest = 0
    for example in order:
        longest = max(longest, lengths[example])
        full = bool(out) and (len(out[-1]) == most if tokens is None else (len(out[-1]) + 1) * longest > tokens)
        if not out or full:
            out.append([])
            longest = lengths[example]
        out[-1].append(example)
    return out


def widths(lengths: Any, count: int) -> list[int]:
    """At most `count` widths, ascending, that pad the given lengths least (dynamic programming over distinct ones)."""
    distinct, rows = np.unique(lengths, return_counts=True)
    if len(distinct) > 512:  # fine enough, and quadratic below
        distinct = np.unique(np.quantile(lengths, np.linspace(0, 1, 513), method="higher"))
        rows = np.bincount(np.searchsorted(distinct, lengths), minlength=len(distinct))
    upto = np.concatenate([[0], np.cumsum(rows)])
    # Padded tokens when the lengths i .. j share width j; below, the least when j is the last of k widths.
    cost = np.where(np.tri(len(distinct), dtype=bool).T, (upto[None, 1:] - upto[:-1, None]) * distinct[None], np.inf)
    least, cuts = cost[0], []
    for _ in range(min(count, len(distinct)) - 1):
        through = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        cuts.append(through.argmin(axis=0))
        least = through.min(axis=0)
    out, at = [], len(distinct) - 1
    for cut in reversed(cuts):
        out.append(int(distinct[at]))
        at = int(cut[at]) - 1
    return sorted([*out, int(distinct[at])])


def common(a: Any, b: Any) -> int:
    """How many tokens two rows begin with together."""
    shared = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:shared]) != np.asarray(b[:shared]))
    return int(differ[0]) if len(differ) else shared


def first_target(example: Example) -> int:
    """The position of a row's first supervised token that something predicts."""
    return int(np.flatnonzero(example.mask[1:])[0]) + 1


def groups(examples: Sequence[Example], least: int, among: Iterable[int] | None = None) -> list[list[int]]:
    """Sets of two and more examples that share their first `least` tokens, all before their first target.

    among: the examples to look at, else all.
    """
    found: dict[bytes, list[int]] = {}
    for index in range(len(examples)) if among is None else among:
        example = examples[index]
        if first_target(example) > least:
            beginning = np.asarray(example.ids[:least], np.int32).tobytes()
            found.setdefault(hashlib.blake2b(beginning, digest_size=16).digest(), []).append(index)
    return [group for group in found.values() if len(group) > 1]


def epoch_order(examples: Sequence[Example], rows: int, draw: np.random.Generator) -> list[int]:
    """The order in which an epoch takes its rows: as the examples have it (a mixture, a curriculum), else any."""
    own = getattr(examples, "epoch", None)
    order: list[int] = (draw.permutation(rows) if own is None else own(draw)).tolist()
    return order


class Plan:
    """Which rows each optimizer step of a run trains on; any step can be asked for directly, so a run can resume
    anywhere. A step is `train.accumulate` batches of rows. Rows of one example each are one micro-batch; where a row
    gives several, those of its batch are cut into micro-batches within `batch_rows` or `batch_tokens`, similar lengths
    together.

    grouped: rows that share a long beginning, by their first examples, share a batch.
    """

    def __init__(self, examples: Sequence[Example], section: TrainSection, grouped: bool = False) -> None:
        self.examples = examples
        self.section = section
        self._size = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)
        self._tokens = section.batch_tokens or 0
        lengths = lengths_of(examples)
        usual = self._size or max(1, self._tokens * len(examples) // int(np.sum(lengths)))
        self.widths = widths(lengths, min(MAX_BUCKETS, max(1, len(examples) // usual)))
        self._measure(lengths)
        self._groups: list[list[int]] = []
        if grouped:
            start = min((common(examples[0].ids, example.ids) for example in examples), default=0)
            alike = groups(examples, start + MIN_GROUP_TOKENS, self._first[:-1].tolist())
            self._groups = [np.searchsorted(self._first, group).tolist() for group in alike]
        self._epochs: list[list[list[list[int]]]] = []  # epoch -> step -> batch -> row
        self._starts = [0]  # first step (0-based) of each planned epoch
        if section.steps is not None:
            self.steps = section.steps
        else:
            whole, part = divmod(section.epochs or DEFAULT_EPOCHS, 1)
            while len(self._epochs) < int(whole) + (part > 0):
                self._plan_epoch()
            self.steps = self._starts[int(whole)]
            if part:
                self.steps += max(1, round(part * len(self._epochs[int(whole)])))

    def _measure(self, lengths: Any) -> None:
        """What is known of each row and example before any epoch. lengths: [N]."""
        starts = firsts(row_of(self.examples))
        bucket = np.searchsorted(self.widths, lengths)
        padded = np.asarray(self.widths)[bucket]
        longest = np.maximum.reduceat(padded, starts)
        self.rows = len(starts)
        self._first = np.append(starts, len(lengths))  # [R + 1]: row r has the examples first[r] .. first[r + 1] - 1
        self._lengths = np.maximum.reduceat(np.asarray(lengths), starts)  # [R] of each row's longest example
        self._bucket = np.maximum.reduceat(bucket, starts).tolist()  # [R]
        self._padded = padded  # [N]
        self._others = (np.add.reduceat(padded, starts) - longest).tolist()  # [R] padded tokens beside the longest

    def _plan_epoch(self) -> None:
        draw = np.random.default_rng([self.section.seed, len(self._epochs)])
        batches = self._batches(epoch_order(self.examples, self.rows, draw))
        size = self.section.accumulate
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + len(steps))

    def _batches(self, order: list[int]) -> list[list[int]]:
        """Full batches of rows of each group and bucket; what is left of a bucket goes to the next wider one. A batch
        comes where its rows come on average, so the order keeps its meaning.
        """
        place = np.empty(self.rows)  # of each row in the order; later places win where a row comes twice
        place[order] = np.arange(len(order))
        batches: list[list[int]] = []
        group_of = {row: number for number, group in enumerate(self._groups) for row in group}
        together: list[list[int]] = [[] for _ in self._groups]
        alone: list[int] = []
        for row in order:  # which may hold a row several times
            (together[group_of[row]] if row in group_of else alone).append(row)
        for rows in filter(None, together):
            for part in self._cut(rows, max(self._lengths[row] for row in rows)):
                if len(part) > 1:
                    batches.append(part)
                else:
                    alone += part
        buckets: list[list[int]] = [[] for _ in self.widths]
        for row in sorted(alone, key=place.__getitem__) if self._groups else alone:
            buckets[self._bucket[row]].append(row)
        left: list[int] = []
        for width, bucket in zip(self.widths, buckets, strict=True):
            parts = self._cut([*left, *bucket], width)
            left = parts.pop() if parts and not self._full(parts[-1], width) else []
            batches += parts
        batches += [left] if left else []  # the tail
        return sorted(batches, key=lambda rows: float(place[rows].mean()))

    def _cut(self, rows: list[int], width: int) -> list[list[int]]:
        """Batches of as many rows as go into one, whose longest examples are padded to `width`; the last may have room
        for more.
        """
        if self._size:
            return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]
        out: list[list[int]] = []
        room = 0
        for row in rows:
            needed = width + self._others[row]
            if not out or needed > room:
                out.append([])
                room = self._tokens
            out[-1].append(row)
            room -= needed
        return out

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

    def rows_of_step(self, number: int) -> list[int]:
        """The rows of optimizer step `number`, counted from 1."""
        return [row for rows in self._of_step(number) for row in rows]

    @property
    def rows_per_batch(self) -> float:
        """How many rows a step takes for each of its `accumulate` batches, on average of the first epoch."""
        if not self._epochs:
            self._plan_epoch()
        sizes = [len(rows) for step in self._epochs[0] for rows in step]
        return sum(sizes) / len(sizes)

    def shapes(self) -> list[tuple[int, int, int]]:
        """(examples, width, targets) of every micro-batch of the first epoch."""
        if not self._epochs:
            self._plan_epoch()
        targets = targets_of(self.examples)
        batches = [part for step in self._epochs[0] for rows in step for part in self._micro_batches(rows)]
        return [(len(part), self._width(part), int(targets[part].sum())) for part in batches]

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step `number`, counted from 1."""
        parts = [part for rows in self._of_step(number) for part in self._micro_batches(rows)]
        return [collate(self.examples, part, self._width(part)) for part in parts]

    def _of_step(self, number: int) -> list[list[int]]:
        """The batches of rows of a step."""
        while self._starts[-1] < number:
            self._plan_epoch()
        epoch = int(np.searchsorted(self._starts, number - 1, side="right")) - 1
        return self._epochs[epoch][number - 1 - self._starts[epoch]]

    def _width(self, examples: list[int]) -> int:
        return int(self._padded[examples].max())


def in_order(examples: Sequence[Example], tokens: int = EVALUATION_TOKENS) -> list[Batch]:
    """Every example once, shortest first, in batches of at most `tokens` padded tokens: for evaluation."""
    lengths = lengths_of(examples)
    order = np.argsort(lengths, kind="stable").tolist()
    return [collate(examples, rows) for rows in fill(order, lengths, None, tokens)]
