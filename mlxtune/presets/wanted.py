"""What a run is for, and the rows that it has: all that a preset follows from beside the model and the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Goal = Literal["format", "style", "chat", "code", "documents"]
# What each goal means, as a person is asked for it.
GOALS: dict[Goal, str] = {
    "format": "answers in one fixed form: JSON, a label, a number",
    "style": "a tone or a way to write",
    "chat": "an assistant for a subject, in conversations",
    "code": "programs, in your language or with your libraries",
    "documents": "questions on documents of yours",
}
GRAIN = 64  # data.max_tokens is a multiple of it: a few more rows fit than had to


@dataclass(frozen=True)
class Wanted:
    """What is to be trained."""

    goal: Goal  # what for
    rows: int  # that are trained on; those held out are not counted
    lengths: Sequence[int]  # tokens of each of their examples, uncut; at least one
    supervised: float = 1.0  # share of these tokens that the model must produce; 1: all, which takes most memory

    def covering(self, share: float) -> int:
        """The data.max_tokens with which at least that share of the examples is kept whole."""
        ordered = sorted(self.lengths)
        whole = ordered[min(len(ordered), math.ceil(share * len(ordered))) - 1]
        return -(-whole // GRAIN) * GRAIN

    def share_of_tokens(self, max_tokens: int) -> float:
        """Of all tokens, those that are left where longer examples keep their start."""
        return sum(min(length, max_tokens) for length in self.lengths) / sum(self.lengths)

    def share_whole(self, max_tokens: int) -> float:
        """Of all examples, those that are not cut."""
        return sum(length <= max_tokens for length in self.lengths) / len(self.lengths)


# Of the rows that a table is made for where there are none yet: half have up to 350 tokens, one in twenty more than
# 950, one in a hundred more than 1,400, as chats with answers of some paragraphs have.
TYPICAL_ROWS, MEDIAN, SPREAD = 2_000, 350, 0.6


def typical() -> Wanted:
    """Rows as a data set of chats has them: lengths that are lognormal, as many as a table is made for."""
    normal = NormalDist(math.log(MEDIAN), SPREAD)
    places = ((number + 0.5) / TYPICAL_ROWS for number in range(TYPICAL_ROWS))
    lengths = [round(math.exp(normal.inv_cdf(place))) for place in places]
    return Wanted("chat", TYPICAL_ROWS, lengths)
