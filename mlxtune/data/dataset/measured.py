"""What is known of examples before any is read: how long each is, and which row it is of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.data.chat.masking import Example


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

    @abstractmethod
    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[rows of an epoch] the order in which an epoch takes its rows; one may come several times."""


class ListedExamples(MeasuredExamples):
    """Examples in memory, each the only one of its row; an epoch takes them in any order."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

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
        return np.arange(len(self.examples))

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[R] any order."""
        return draw.permutation(len(first_examples(self.row_of)))


def measured(examples: Sequence[Example]) -> MeasuredExamples:
    """The examples themselves where they know of their rows; else each is a row."""
    return examples if isinstance(examples, MeasuredExamples) else ListedExamples(examples)


def first_examples(row_of: np.ndarray) -> np.ndarray:
    """[R] the first example of each row. row_of: [N] the row of each example, going up without a gap."""
    return np.flatnonzero(np.diff(row_of, prepend=-1))
