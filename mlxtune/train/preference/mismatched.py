"""kto's baseline: how much likelier the model became to give *any* answer, estimated on each prompt with another row's.

A rated answer is good by how much likelier it became than that (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.2:
the baseline is an estimate of the KL divergence from the reference, over answers that do not belong to the prompts).

    row 0    <user> 2 + 2 = ? <model> 4           row 0 with the answer of row 2    <user> 2 + 2 = ? <model> Paris
    row 1    <user> Say hi.   <model> Hello!      row 1 with the answer of row 0    <user> Say hi.   <model> 4
    row 2    <user> Capital?  <model> Paris       row 2 with the answer of row 1    <user> Capital?  <model> Hello!

Which row lends its answer to which is one cycle through all rows, drawn by the seed: no row keeps its own, and the
reference's values of these examples too are computed once.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.data.dataset.measured import MeasuredExamples, first_examples


class Mismatched(Sequence[Example]):
    """Each row's prompt with the answer of another row: R examples."""

    def __init__(self, examples: MeasuredExamples, seed: int) -> None:
        """examples: of rated rows. Of a row with several examples the first one counts."""
        self._examples = examples
        self._firsts = first_examples(examples.row_of)
        self._row_of = examples.row_of
        self._longest = int(examples.lengths.max())
        self.lender = one_cycle(len(self._firsts), seed)  # [R] the row whose answer each row's prompt gets

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, row: Any) -> Any:
        """The example of a row: what stands before its first target, then the other's from its first target on. It is
        cut where the longest example of all ends: memory for more was not planned.
        """
        own, other = self._examples[self._firsts[row]], self._examples[self._firsts[self.lender[row]]]
        prompt = int(np.argmax(own.mask))
        answer = int(np.argmax(other.mask))
        ids = np.concatenate([own.ids[:prompt], other.ids[answer:]])[: self._longest]
        mask = np.concatenate([np.zeros(prompt, np.uint8), np.asarray(other.mask[answer:], np.uint8)])[: self._longest]
        return Example(ids, mask)

    def beside(self, batch: Batch) -> Batch:
        """The mismatched example of each of a batch's answers. Its `rows` are rows of the split, not examples."""
        firsts = np.searchsorted(batch.answer_of, np.arange(batch.answers))
        return collate(self, self._row_of[batch.rows[firsts]].tolist())


def one_cycle(rows: int, seed: int) -> np.ndarray:
    """[R] a permutation of one cycle: for two rows and more, none is its own."""
    order = np.random.default_rng([seed, rows]).permutation(rows)
    lender = np.empty(rows, np.int64)
    lender[order] = np.roll(order, 1)
    return lender
