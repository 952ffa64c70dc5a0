"""Steps computed in smaller parts, for want of memory (`train.on_oom: smaller`).

Micro-batches are cut below the plan of batches: the plan, and with it which rows meet in a step, stays as it was. A
loss is a sum over tokens, so the parts of a step add up to the same one. A division is kept for the steps that follow
and in every checkpoint: whoever resumes computes what the run would have computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np

from mlxtune.compute import proof
from mlxtune.compute.loss import Way
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate, lengths_of
from mlxtune.machine.gpu_errors import Failure

SAME = 1e-3  # relative, of loss and gradients: recomputing a block repeats the same operations


class TooLarge(Exception):
    """A part of a step did not fit the memory; nothing was updated. failure: what was said here or, of another process,
    elsewhere; examples: of that part, the most of any process.
    """

    def __init__(self, failure: Failure, examples: int) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.examples = examples


@dataclass(frozen=True)
class Division:
    """halved: how often each micro-batch is cut in two, as far as it has two examples; checkpointed: every block keeps
    its input only, whatever the run's configuration says.
    """

    halved: int = 0
    checkpointed: bool = False

    def parts(self, batch: Batch) -> list[Batch]:
        """A micro-batch as it is computed, its examples in their order, padded as before."""
        parts = [batch]
        for _ in range(self.halved):
            parts = [half for part in parts for half in _halves(part)]
        return parts

    def way(self, way: Way) -> Way:
        """How the loss of a part is computed."""
        return replace(way, recompute=1) if self.checkpointed else way

    def smaller(self, examples: int, way: Way) -> Division | None:
        """The next one, after a part of so many examples did not fit; None: there is none. way: of the run."""
        if examples > 1:
            return replace(self, halved=self.halved + 1)
        if self.way(way).recompute != 1:
            return replace(self, checkpointed=True)
        return None

    def __str__(self) -> str:
        parts = f"each micro-batch in up to {2**self.halved} parts" if self.halved else "micro-batches as planned"
        return f"{parts}, every block checkpointed" if self.checkpointed else parts


def _halves(batch: Batch) -> list[Batch]:
    middle = (len(batch.rows) + 1) // 2
    return [half for half in (batch.part(slice(middle)), batch.part(slice(middle, None))) if len(half.rows)]


def same(model: nn.Module, way: Way, other: Way, examples: Sequence[Example]) -> bool:
    """Whether two ways give the same loss and gradients for the shortest example, which needs least memory."""
    batch = collate(examples, [int(np.argmin(lengths_of(examples)))])
    with proof.nudged(model):
        found, wanted = proof.gradients(model, other, batch), proof.gradients(model, way, batch)
    return proof.difference(found, wanted).within(SAME, SAME)
