"""Examples -> padded batches, in an order that is a pure function of (seed, epoch).

Every row is used once per epoch, the tail too. Rows wait in buckets of similar length until a batch is full, so an
epoch has few shapes (one per bucket, and tails) and its order decides which rows meet: membership changes each epoch.
Rejected: sorting by jittered length, which pads more for the same mixing and gives every batch a shape of its own.

Legend: B rows, T tokens, W width that a bucket's rows are padded to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.data.chat import Example
from mlxtune.sections import TrainSection

DEFAULT_ROWS = 4
DEFAULT_EPOCHS = 1.0
PAD = 0  # any id: causal attention keeps padding on the right out of every supervised position
MAX_BUCKETS = 24
MIN_GROUP_TOKENS = 32  # a beginning that only some rows share is worth a batch of their own from here on


@dataclass(frozen=True)
class Batch:
    """rows: [B] index of each example in its split; ids: [B, T] int32, padded on the right; lengths: [B];
    mask: [B, T] uint8, 1 where the token is a target."""

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
        """Some of its rows, padded as before."""
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


def fill(order: Sequence[int], lengths: Any, rows: int | None, tokens: int | None) -> list[list[int]]:
    """Cut an order of rows into batches of `rows` rows, or of at most `tokens` padded tokens (at least one row)."""
    out: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        full = bool(out) and (len(out[-1]) == rows if tokens is None else (len(out[-1]) + 1) * longest > tokens)
        if not out or full:
            out.append([])
            longest = lengths[row]
        out[-1].append(row)
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


def groups(examples: Sequence[Example], least: int) -> list[list[int]]:
    """Sets of two and more rows that share their first `least` tokens, all before their first target."""
    found: dict[bytes, list[int]] = {}
    for row in range(len(examples)):
        example = examples[row]
        if first_target(example) > least:
            beginning = np.asarray(example.ids[:least], np.int32).tobytes()
            found.setdefault(hashlib.blake2b(beginning, digest_size=16).digest(), []).append(row)
    return [group for group in found.values() if len(group) > 1]


def epoch_order(examples: Sequence[Example], draw: np.random.Generator) -> list[int]:
    """The order in which an epoch takes its rows: as the examples have it (a mixture, a curriculum), else any."""
    own = getattr(examples, "epoch", None)
    order: list[int] = (draw.permutation(len(examples)) if own is None else own(draw)).tolist()
    return order


class Plan:
    """Which rows each optimizer step of a run trains on; any step can be asked for directly, so a run can resume
    anywhere. grouped: rows that share a long beginning share a batch.
    """

    def __init__(self, examples: Sequence[Example], section: TrainSection, grouped: bool = False) -> None:
        self.examples = examples
        self.section = section
        self._lengths = lengths_of(examples)
        self._rows = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)
        usual = self._rows or max(1, (section.batch_tokens or 0) * len(examples) // int(np.sum(self._lengths)))
        self.widths = widths(self._lengths, min(MAX_BUCKETS, max(1, len(examples) // usual)))
        self._groups: list[list[int]] = []
        if grouped:
            start = min((common(examples[0].ids, example.ids) for example in examples), default=0)
            self._groups = groups(examples, start + MIN_GROUP_TOKENS)
        self._epochs: list[list[list[list[int]]]] = []  # epoch -> step -> micro-batch -> row
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

    def _plan_epoch(self) -> None:
        draw = np.random.default_rng([self.section.seed, len(self._epochs)])
        batches = self._batches(epoch_order(self.examples, draw))
        size = self.section.accumulate
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + len(steps))

    def _batches(self, order: list[int]) -> list[list[int]]:
        """Full batches of each group and bucket; what is left of a bucket goes to the next wider one. A batch comes
        where its rows come on average, so the order keeps its meaning.
        """
        place = np.empty(len(self._lengths))  # of each row in the order; later places win where a row comes twice
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
            buckets[int(np.searchsorted(self.widths, self._lengths[row]))].append(row)
        left: list[int] = []
        for width, bucket in zip(self.widths, buckets, strict=True):
            waiting = [*left, *bucket]
            whole = len(waiting) - len(waiting) % self._size(width)
            batches += self._cut(waiting[:whole], width)
            left = waiting[whole:]
        batches += [left] if left else []  # the tail
        return sorted(batches, key=lambda rows: float(place[rows].mean()))

    def _size(self, width: int) -> int:
        """Rows of a full batch that is padded to `width`."""
        return self._rows or max(1, (self.section.batch_tokens or 0) // width)

    def _cut(self, rows: list[int], width: int) -> list[list[int]]:
        size = self._size(width)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def shapes(self) -> list[tuple[int, int, int]]:
        """(rows, width, targets) of every micro-batch of the first epoch."""
        if not self._epochs:
            self._plan_epoch()
        targets = targets_of(self.examples).tolist()
        batches = [rows for step in self._epochs[0] for rows in step]
        return [(len(rows), self._width(rows), sum(targets[row] for row in rows)) for rows in batches]

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step `number`, counted from 1."""
        while self._starts[-1] < number:
            self._plan_epoch()
        epoch = int(np.searchsorted(self._starts, number - 1, side="right")) - 1
        chosen = self._epochs[epoch][number - 1 - self._starts[epoch]]
        return [collate(self.examples, rows, self._width(rows)) for rows in chosen]

    def _width(self, rows: list[int]) -> int:
        return self.widths[int(np.searchsorted(self.widths, max(self._lengths[row] for row in rows)))]


def in_order(examples: Sequence[Example], tokens: int = 4096) -> list[Batch]:
    """Every example once, shortest first, in batches of at most `tokens` padded tokens: for evaluation."""
    lengths = lengths_of(examples)
    order = np.argsort(lengths, kind="stable").tolist()
    return [collate(examples, rows) for rows in fill(order, lengths, None, tokens)]
