"""Examples -> padded batches, in an order that is a pure function of (seed, epoch).

Legend: B rows, T tokens. Every row is used once per epoch, the tail too. Rows of similar length share a batch, yet the
membership changes each epoch: lengths are jittered by a seeded draw before they are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.config import TrainSection
from mlxtune.data.chat import Example

DEFAULT_ROWS = 4
DEFAULT_EPOCHS = 1.0
PAD = 0  # any id: causal attention keeps padding on the right out of every supervised position
JITTER = 0.15  # share of a row's length by which the sort key is moved


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

    def supervised(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, target ids), [N] each: flat positions in a [B, T-1] hidden state that predict a supervised
        token.
        """
        flat = np.flatnonzero(self.mask[:, 1:])
        return flat.astype(np.int32), self.ids[:, 1:].reshape(-1)[flat]


def collate(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Pad the chosen examples to the longest of them."""
    chosen = [examples[row] for row in rows]
    lengths = np.array([len(example.ids) for example in chosen])
    ids = np.full((len(rows), int(lengths.max())), PAD, np.int32)
    mask = np.zeros(ids.shape, np.uint8)
    for place, example in enumerate(chosen):
        ids[place, : lengths[place]] = example.ids
        mask[place, : lengths[place]] = example.mask
    return Batch(np.asarray(rows, np.int64), ids, lengths, mask)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] tokens of each example."""
    known = getattr(examples, "lengths", None)
    return np.array([len(example.ids) for example in examples]) if known is None else known


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


class Plan:
    """Which rows each optimizer step of a run trains on; any step can be asked for directly, so a run can resume
    anywhere.
    """

    def __init__(self, examples: Sequence[Example], section: TrainSection) -> None:
        self.examples = examples
        self.section = section
        self._lengths = lengths_of(examples)
        self._rows = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)
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
        epoch = len(self._epochs)
        draw = np.random.default_rng([self.section.seed, epoch])
        noise = draw.uniform(1 - JITTER, 1 + JITTER, len(self._lengths))
        order = np.argsort(self._lengths * noise, kind="stable").tolist()
        batches = fill(order, self._lengths, self._rows, self.section.batch_tokens)
        batches = [batches[index] for index in draw.permutation(len(batches))]
        size = self.section.accumulate
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + len(steps))

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step `number`, counted from 1."""
        while self._starts[-1] < number:
            self._plan_epoch()
        epoch = int(np.searchsorted(self._starts, number - 1, side="right")) - 1
        chosen = self._epochs[epoch][number - 1 - self._starts[epoch]]
        return [collate(self.examples, rows) for rows in chosen]


def in_order(examples: Sequence[Example], tokens: int = 4096) -> list[Batch]:
    """Every example once, shortest first, in batches of at most `tokens` padded tokens: for evaluation."""
    lengths = lengths_of(examples)
    order = np.argsort(lengths, kind="stable").tolist()
    return [collate(examples, rows) for rows in fill(order, lengths, None, tokens)]
