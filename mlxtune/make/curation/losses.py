"""What a model's loss says of one row: see `ifd`, which takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Losses:
    """Of one row."""

    # Nats a token of its last answer, behind its conversation.
    behind: float
    # The same without it.
    alone: float
    # Of the answer: what both are the mean of.
    tokens: int
    # Of the whole row.
    row_tokens: int

    @property
    def ifd(self) -> float:
        """A model that is sure of the answer without any question (a loss of 0) learns nothing from it: 1."""
        return self.behind / self.alone if self.alone > 0 else 1.0
