"""Steps computed in smaller parts, for want of memory (`train.on_oom: smaller`).

Micro-batches are cut below the plan of batches: the plan, and with it which rows meet in a step, stays as it was. A
loss is a sum over tokens, so the parts of a step add up to the same one:

    planned           one micro-batch of the examples 1 2 3
    halved once       1 2 | 3
    halved twice      1 | 2 | 3
    and checkpointed  the same, every block computed again in the backward pass
    and in pieces     the same, each block given a row piece by piece (`pieces`), where rows are longer than a piece

Answers that are compared stay together: of pairs a half has whole pairs, and a single pair is not halved.

A division is kept for the steps that follow and in every checkpoint: whoever resumes computes what the run would have
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np

from mlxtune.compute import proof
from mlxtune.compute.fast_ways import divided, may_have_small_chunks
from mlxtune.compute.loss import Way
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate, lengths_of
from mlxtune.machine.gpu_errors import Failure

SAME = 1e-3  # relative, of loss and gradients: recomputing a block repeats the same operations


class TooLarge(Exception):
    """A part of a step did not fit the memory; nothing was updated.

    failure: what was said here or, of another process, elsewhere; examples: of that part, as `units` counts them, the
    most of any process.
    """

    def __init__(self, failure: Failure, examples: int) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.examples = examples


@dataclass(frozen=True)
class Division:
    """How the steps of a run are made smaller than they were planned."""

    halved: int = 0  # how often each micro-batch is cut in two, as far as it has two examples or pairs
    checkpointed: bool = False  # every block keeps its input only, whatever the run's configuration says
    in_pieces: bool = False  # and is computed in pieces of a row

    def parts(self, batch: Batch) -> list[Batch]:
        """A micro-batch as it is computed, its examples in their order, padded as before."""
        parts = [batch]
        for _ in range(self.halved):
            halves: list[Batch] = []
            for part in parts:
                halves += _halves(part)
            parts = halves
        return parts

    def way(self, way: Way) -> Way:
        """How the loss of a part is computed."""
        if self.in_pieces:
            return divided(way)
        if self.checkpointed:
            return replace(way, recompute=1, small_chunks=may_have_small_chunks(way))
        return way

    def smaller(self, examples: int, way: Way, may_divide: bool = False) -> Division | None:
        """The next one, after a part of so many examples did not fit; None: there is none.

        way: of the run; may_divide: whether blocks can be computed in pieces, and some row is longer than one.
        """
        if examples > 1:
            return replace(self, halved=self.halved + 1)
        computed = self.way(way)
        if computed.recompute != 1:
            return replace(self, checkpointed=True)
        if may_divide and not computed.tokens:
            return replace(self, checkpointed=True, in_pieces=True)
        return None

    def __str__(self) -> str:
        text = "micro-batches as planned"
        if self.halved:
            text = f"each micro-batch in up to {2**self.halved} parts"
        if self.checkpointed:
            text += ", every block checkpointed"
        if self.in_pieces:
            text += " and in pieces of a row"
        return text


def units(batch: Batch) -> int:
    """What a micro-batch can be cut between: its examples, or of preferences its pairs or rated answers."""
    return len(batch.whole_parts)


def _halves(batch: Batch) -> list[Batch]:
    """The first and the second half of a batch; a batch of one unit is its own first half."""
    parts = batch.whole_parts
    if len(parts) < 2:
        return [batch]
    middle = parts[(len(parts) + 1) // 2].start
    return [batch.part(slice(middle)), batch.part(slice(middle, None))]


def same(model: nn.Module, way: Way, other: Way, examples: Sequence[Example]) -> bool:
    """Whether two ways give the same loss and gradients for the shortest example, which needs least memory. It is
    divided into as many pieces as the rows of a proof.
    """
    batch = collate(examples, [int(np.argmin(lengths_of(examples)))])
    with proof.nudged(model):
        found = proof.sums_of(model, proof.divided(other, batch), batch)
        wanted = proof.sums_of(model, proof.divided(way, batch), batch)
    return proof.difference(found, wanted).within(SAME, SAME)
