"""What is known of examples before any is read: how long each is, which row it is of, and which answer of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.rows.sides import Side


class MeasuredExamples(Sequence[Example]):
    """N examples of R rows, those of a row one after the other."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""

    @property
    @abstractmethod
    def targets(self) -> np.ndarray:
        """[N] supervised tokens of each example."""

    @property
    @abstractmethod
    def row_of(self) -> np.ndarray:
        """[N] the row of each example, counted from 0, going up without a gap."""

    @property
    @abstractmethod
    def sides(self) -> np.ndarray:
        """[N] uint8, of `Side`: which answer of a preference each is of. Of a pair the chosen one comes first."""

    @abstractmethod
    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[rows of an epoch] the order in which an epoch takes its rows; one may come several times."""

    @property
    def have_sides(self) -> bool:
        """Whether rows say which answers are preferred; then each is computed as a whole."""
        return bool(self.sides.any())


class ListedExamples(MeasuredExamples):
    """Examples in memory; an epoch takes them in any order."""

    def __init__(self, examples: Sequence[Example], sides: Sequence[int] | None = None) -> None:
        """sides: of each example, as `Side` has them; None: none has one. An example without a side, or of a rated
        answer, is the only one of its row; the examples of a chosen and of the rejected answer after it are a pair.
        """
        self.examples = examples
        self.sides_given = sides

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """[N]"""
        return np.array([len(example.ids) for example in self.examples])

    @property
    def targets(self) -> np.ndarray:
        """[N]"""
        return np.array([np.sum(example.mask[1:]) for example in self.examples])

    @property
    def row_of(self) -> np.ndarray:
        """[N]"""
        if self.sides_given is None:
            return np.arange(len(self.examples))
        before = np.append(np.uint8(Side.NONE), self.sides[:-1])
        of_same_row = (self.sides == Side.REJECTED) | ((self.sides == Side.CHOSEN) & (before == Side.CHOSEN))
        return np.cumsum(~of_same_row) - 1

    @property
    def sides(self) -> np.ndarray:
        """[N]"""
        if self.sides_given is None:
            return np.zeros(len(self.examples), np.uint8)
        return np.array(self.sides_given, np.uint8)

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[R] any order."""
        return draw.permutation(len(first_examples(self.row_of)))


def measured(examples: Sequence[Example]) -> MeasuredExamples:
    """The examples themselves where they know of their rows; else each is a row."""
    return examples if isinstance(examples, MeasuredExamples) else ListedExamples(examples)


def first_examples(row_of: np.ndarray) -> np.ndarray:
    """[R] the first example of each row. row_of: [N] the row of each example, going up without a gap."""
    return np.flatnonzero(np.diff(row_of, prepend=-1))


def answer_numbers(examples: MeasuredExamples, chosen: np.ndarray) -> np.ndarray:
    """[B] int32: for some examples the number of the answer that each is of, going up from 0. chosen: [B] indices.

    Without a side every example is an answer of its own; else those that follow each other of one row and side are one.
    """
    if not len(chosen):
        return np.zeros(0, np.int32)
    sides, rows = examples.sides[chosen], examples.row_of[chosen]
    follows = chosen[1:] == chosen[:-1] + 1
    of_same_answer = follows & (sides[1:] > Side.NONE) & (sides[1:] == sides[:-1]) & (rows[1:] == rows[:-1])
    return np.append(0, np.cumsum(~of_same_answer)).astype(np.int32)
