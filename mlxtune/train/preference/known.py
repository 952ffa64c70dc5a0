"""What is known of the answers of one split before the first step: their log-probabilities under the reference.

A split of two pairs, the second with two examples of its chosen answer (a template that drops earlier thoughts):

    examples     0 chosen   1 rejected   2 chosen   3 chosen   4 rejected      rows 0 0 1 1 1
    answer_of    0          1            2          2          3
    values       -41.2      -38.0        -90.5                 -77.1            nats, of all of an answer's tokens

Legend: N examples, A answers of the split, K answers of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxtune.data.dataset.batches import Batch

UNKNOWN = 1.0  # in place of a log-probability, which is at most 0


@dataclass(frozen=True)
class Known:
    """Log-probabilities under the model at step 0."""

    answer_of: np.ndarray  # [N] the answer that each example of the split is of
    values: np.ndarray  # [A] float32, nats; UNKNOWN: the run never asks for it

    @classmethod
    def nothing(cls, answer_of: np.ndarray) -> Known:
        """Of a split whose values nobody computed yet. answer_of: [N], as above."""
        return cls(answer_of, np.full(int(answer_of[-1]) + 1, UNKNOWN, np.float32))

    @property
    def is_known(self) -> np.ndarray:
        """[A] bool."""
        return self.values != UNKNOWN

    def answers(self, batch: Batch) -> np.ndarray:
        """[K] the numbers that a batch's answers have in the split."""
        firsts = np.searchsorted(batch.answer_of, np.arange(batch.answers))
        return self.answer_of[batch.rows[firsts]]

    def of(self, batch: Batch) -> np.ndarray:
        """[K] float32, nats, of a batch's answers."""
        values = self.values[self.answers(batch)]
        assert (values != UNKNOWN).all(), "an answer whose reference nobody computed"
        return values
