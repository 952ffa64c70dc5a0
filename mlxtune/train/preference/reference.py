"""The reference of a run on preferences: what the model at step 0 gives each answer, computed once.

The model at step 0 is whatever the run begins from: the base, an adapter on it (`lora.start_from`), layers and tokens
of its own. So no second copy of the weights is needed, nothing is switched off, and nothing drifts. Each training
answer is computed in the very micro-batch in which the run first trains on it, by the way that trains it: where nothing
is random, the first step compares numbers with the same bits, and every margin is 0 (`start`).

A run whose steps end before its first epoch does asks for the answers of these steps alone. A run that goes on takes
what is in its folder (`reference_file`); a longer one (`--resume-anyway`) computes what its further steps need, from
the same beginning.

Legend: A answers of a split, R rows, K answers of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute.gradients import Gradients
from mlxtune.compute.loss import Way
from mlxtune.compute.trunk_states import RowStates
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.model.arrays import to_numpy
from mlxtune.train.events import Listener
from mlxtune.train.preference.goal import Forward, OfSplit
from mlxtune.train.preference.known import Known
from mlxtune.train.ranks import Ranks

TOLD_SECONDS = 5.0  # between two words on how far the pass is


def forward_of(model: nn.Module, way: Way, states: RowStates | None = None) -> Forward:
    """Computes log-probabilities of answers as the model is whenever it is called.

    states: of frozen blocks, for training rows, whose states are kept; None: all blocks are computed.
    """
    if states is None:
        way = replace(way, frozen=0)
    gradients = Gradients(model, replace(way, recompute=0), states=states)  # nothing goes back

    def forward(batch: Batch) -> np.ndarray:
        """[K] float32, nats."""
        return -to_numpy(gradients.answer_sums(batch))

    return forward


class _Found:
    """Values of some answers, as this process and others find them."""

    def __init__(self, known: Known) -> None:
        self.known = known  # before
        self.is_new = ~known.is_known  # [A] what is still to be found, by any process
        self._values = np.zeros(len(known.values), np.float32)  # [A] found here
        self._count = np.zeros(len(known.values), np.float32)  # [A] 1: found here

    def lacks(self, batch: Batch) -> bool:
        """Whether some answer of a batch is still to be found."""
        return bool(self.is_new[self.known.answers(batch)].any())

    def add(self, batch: Batch, values: np.ndarray) -> None:
        """values: [K] of a batch's answers. What is there stays."""
        answers = self.known.answers(batch)
        fresh = self.is_new[answers] & (self._count[answers] == 0)
        self._values[answers[fresh]] = values[fresh]
        self._count[answers[fresh]] = 1

    def passed(self, batches: Sequence[Batch]) -> None:
        """These batches are done, on all processes."""
        for batch in batches:
            self.is_new[self.known.answers(batch)] = False

    def all_of(self, ranks: Ranks) -> Known:
        """What was known before and what all processes found: the same on each. An answer that two of them computed has
        the mean of the two.
        """
        summed = ranks.sum_tree({"count": mx.array(self._count), "values": mx.array(self._values)})
        count, values = to_numpy(summed["count"]), to_numpy(summed["values"])
        found = np.where(count > 0, values / np.maximum(count, 1), self.known.values)
        return replace(self.known, values=found.astype(np.float32))


class _Told:
    """Says how far the pass is, now and then."""

    def __init__(self, listener: Listener, total: int) -> None:
        self._listener, self._total = listener, total
        self._done = 0
        self._last = -TOLD_SECONDS

    def add(self, answers: int) -> None:
        self._done += answers
        now = time.monotonic()
        if now - self._last >= TOLD_SECONDS:
            self._last = now
            what = f"computing the reference: {self._done:,} of {self._total:,} answers"
            self._listener({"kind": "doing", "what": what})


class _Pass:
    """The answers of a split, and the mismatched ones beside them, as they are computed batch by batch."""

    def __init__(self, split: OfSplit, forward: Forward, of_mismatched: Forward, listener: Listener) -> None:
        assert split.known is not None
        self._split = split
        self._forward, self._of_mismatched = forward, of_mismatched
        self._found = _Found(split.known)
        self._mismatched = _Found(split.known_mismatched) if split.known_mismatched else None
        self._told = _Told(listener, int(self._found.is_new.sum()))

    @property
    def is_complete(self) -> bool:
        return not self._found.is_new.any()

    def lacks(self, batch: Batch) -> bool:
        return self._found.lacks(batch)

    def compute(self, batch: Batch) -> None:
        if not self._found.lacks(batch):
            return
        self._told.add(batch.answers)
        self._found.add(batch, self._forward(batch))
        if self._mismatched is not None:
            others = self._others(batch)
            self._mismatched.add(others, self._of_mismatched(others))

    def passed(self, batches: Sequence[Batch]) -> None:
        """These batches are done, by all processes."""
        self._found.passed(batches)
        if self._mismatched is not None:
            self._mismatched.passed([self._others(batch) for batch in batches])

    def result(self, ranks: Ranks) -> OfSplit:
        known = self._found.all_of(ranks)
        mismatched = self._mismatched.all_of(ranks) if self._mismatched else None
        return replace(self._split, known=known, known_mismatched=mismatched)

    def _others(self, batch: Batch) -> Batch:
        assert self._split.mismatched is not None
        return self._split.mismatched.beside(batch)


def of_training(
    split: OfSplit,
    plan: Plan,
    shared: int | None,
    forward: Forward,
    of_mismatched: Forward,
    ranks: Ranks,
    listener: Listener,
) -> OfSplit:
    """The training rows with all values that the steps of a plan ask for. The model must be as it is at step 0.

    shared: as in `Way.prefix`; forward, of_mismatched: of answers, and of kto's examples.
    """
    under_way = _Pass(split, forward, of_mismatched, listener)
    for number in range(1, plan.steps + 1):
        if under_way.is_complete:
            break
        batches = plan.step(number)
        if any(under_way.lacks(batch) for batch in batches):
            for part in ranks.own_batches(batches, shared):
                under_way.compute(part)
            under_way.passed(batches)
    return under_way.result(ranks)


def of_held_out(
    split: OfSplit, batches: Sequence[Batch], forward: Forward, ranks: Ranks, listener: Listener
) -> OfSplit:
    """The held-out rows with all their values. batches: this process's part of them."""
    under_way = _Pass(split, forward, forward, listener)
    for batch in batches:
        under_way.compute(batch)
    return under_way.result(ranks)
