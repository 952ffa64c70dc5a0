"""What observations are made of, and the two ways to find one: a share that is too high, and one that rose.

Several observations look at the same answers, so one that rose must be less likely by chance than a check's verdict
(LEVEL), and worth a word (LEAST_RISE). One without a base to compare with must be frequent, and seen more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune.data.rows.formats import Record
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.comparison.scores import PromptScores, Side, means
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.statistics.paired import compare_scores

LEVEL = 0.01  # of p, below which a share is said to have risen
LEAST_RISE = 0.05  # of a share, that is worth a word
OFTEN = 0.1  # share of prompts, from which something is said that has nothing to be compared with
TWICE = 2  # prompts at least: one alone may be odd
LISTED = 5  # prompts or rows that are named
ROSE = f"it rose by {100 * LEAST_RISE:.0f} points, p < {LEVEL:g}"
FREQUENT = f"in {OFTEN:.0%} of the prompts"


@dataclass(frozen=True)
class Seen:
    """What there is to look at; whatever is missing gives no observation."""

    rows: Sequence[SuiteRow]  # the prompts
    answers: Mapping[Side, Sequence[Answer]]  # of each side, to all of them
    scores: Sequence[PromptScores] = ()  # of the checks
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # as `summary.check_results` gives them
    trained: Sequence[Record] = ()  # conversations that were trained on
    events: Sequence[Mapping[str, Any]] = ()  # of the run, as `train.events` describes them
    forgetting: Mapping[str, Any] | None = None  # as `forgetting.document` gives it; None: not measured

    @property
    def final(self) -> Side:
        """Whose answers are looked at: the tuned side's, or the base's where nobody else was asked."""
        return "tuned" if "tuned" in self.answers else "base"

    def by_row(self, side: Side) -> list[list[Answer]]:
        """[prompts][samples]"""
        found: dict[str, list[Answer]] = {row.id: [] for row in self.rows}
        for answer in self.answers[side]:
            found[answer.id].append(answer)
        return list(found.values())


@dataclass(frozen=True)
class Observation:
    """One thing that went wrong."""

    name: str  # of what is observed
    measure: str  # what was counted, in words with its numbers
    value: float  # the number that was held against the threshold
    threshold: float  # from which it is said
    limit: str  # the threshold in words
    fix: str  # what is likely to help, with the keys to turn
    examples: tuple[str, ...] = ()  # prompts that show it

    def as_json(self) -> dict[str, Any]:
        line = {"observation": self.name, "measure": self.measure, "value": self.value, "threshold": self.threshold}
        return {**line, "limit": self.limit, "fix": self.fix, "examples": list(self.examples)}


@dataclass(frozen=True)
class Share:
    """In how many of the prompts something is so."""

    of: int  # prompts that it was asked of
    final: float  # share among the final side's answers
    base: float | None  # share among the base's; None: the base alone was asked
    p: float  # of the difference, two-sided; 1 where there is nothing to compare
    examples: tuple[str, ...]  # prompts of the final side that have it
    found: int  # prompts of the final side that have it

    @property
    def rose(self) -> bool:
        return self.base is not None and self.final - self.base >= LEAST_RISE and self.p < LEVEL

    @property
    def is_frequent(self) -> bool:
        """Often so, and not just as often in the base, which no training has made so."""
        is_new = self.base is None or self.final - self.base >= LEAST_RISE
        return self.final >= OFTEN and self.found >= TWICE and is_new

    @property
    def figures(self) -> str:
        before = "" if self.base is None else f", of the base's {self.base:.0%}"
        return f"{self.final:.0%} of the answers to {self.of} prompts{before}"


def share(
    seen: Seen, is_so: Callable[[Answer, SuiteRow], bool], asked: Callable[[SuiteRow], bool] = lambda row: True
) -> Share:
    """Count something in the answers. is_so: of an answer; asked: whether a prompt counts at all."""
    places = [place for place, row in enumerate(seen.rows) if asked(row)]
    if not places:
        return Share(0, 0.0, None, 1.0, (), 0)

    def counted(side: Side) -> np.ndarray:
        """[prompts, 1]"""
        given = seen.by_row(side)
        return means([[float(is_so(answer, seen.rows[place])) for answer in given[place]] for place in places])

    final = counted(seen.final)
    having = [seen.rows[place].id for place, mean in zip(places, final[:, 0], strict=True) if mean > 0]
    base, p = None, 1.0
    if seen.final == "tuned":
        before = counted("base")
        groups = [seen.rows[place].group for place in places]
        base, p = float(before.mean()), compare_scores(before, final, graded=False, groups=groups).p
    return Share(len(places), float(final.mean()), base, p, tuple(having[:LISTED]), len(having))


def named(rows: Sequence[object]) -> str:
    """Rows in words: "3, 8, 9, ..."."""
    return ", ".join(map(str, rows[:LISTED])) + (", ..." if len(rows) > LISTED else "")
