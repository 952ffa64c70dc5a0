"""Ratings from 1 to 5 by a judge, for each side and criterion.

A rating is the expected value over the five replies (as in G-Eval, arXiv 2303.16634), not the likeliest of them: a
judge that wavers between 3 and 4 says 3.5, and small differences are not rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.evaluate.comparison.scores import PromptScores, Side
from mlxtune.evaluate.judging.judge import CRITERIA, RUBRIC, SCALE, Judge, Probabilities, rating_prompt
from mlxtune.evaluate.judging.verdicts import Pair

NO_USE = 0.9  # share of one rating among all, from which they tell nothing


@dataclass(frozen=True)
class Rating:
    """One answer by one criterion."""

    id: str  # of the prompt
    sample: int  # which answer to it
    side: Side  # whose answer
    criterion: str  # of CRITERIA
    group: str | None  # of the prompt
    chances: Probabilities | None  # of SCALE; None: a reply that could not be read

    @property
    def value(self) -> float | None:
        """The expected rating, 1 to 5."""
        if self.chances is None:
            return None
        return sum(int(label) * chance for label, chance in zip(SCALE, self.chances, strict=True))

    def as_json(self) -> dict[str, Any]:
        """A line of verdicts.jsonl."""
        line = {"id": self.id, "sample": self.sample, "side": self.side, "criterion": self.criterion}
        return {**line, "chances": self.chances, "rating": self.value}


def rate_answers(judge: Judge, pairs: Sequence[Pair], rubric: str = RUBRIC) -> list[Rating]:
    """Every answer of both sides by every criterion. Raises UserError as the judge does."""
    wanted: list[tuple[Pair, Side, str]] = []
    for criterion in CRITERIA:
        for pair in pairs:
            wanted += [(pair, "base", criterion), (pair, "tuned", criterion)]
    prompts = []
    for pair, side, criterion in wanted:
        answer = pair.base if side == "base" else pair.tuned
        prompts.append(rating_prompt(pair.question, answer, criterion, pair.reference, rubric))
    replies = judge.label_probabilities(prompts, SCALE)
    return [
        Rating(pair.id, pair.sample, side, criterion, pair.group, reply)
        for (pair, side, criterion), reply in zip(wanted, replies, strict=True)
    ]


def scores_of(ratings: Sequence[Rating]) -> list[PromptScores]:
    """As scores of graded checks, one for each criterion; an answer whose rating failed counts on neither side."""
    found: dict[tuple[str, str, int], dict[str, Rating]] = {}
    for rating in ratings:
        if rating.value is not None:
            found.setdefault((rating.criterion, rating.id, rating.sample), {})[rating.side] = rating
    by_prompt: dict[tuple[str, str], PromptScores] = {}
    for (criterion, id, _), sides in found.items():
        if len(sides) < 2:
            continue
        scores = by_prompt.setdefault((criterion, id), PromptScores(id, criterion, True, sides["base"].group, [], []))
        assert scores.tuned is not None
        scores.base.append(_value(sides, "base"))
        scores.tuned.append(_value(sides, "tuned"))
    return list(by_prompt.values())


def _value(sides: Mapping[str, Rating], side: Side) -> float:
    value = sides[side].value
    assert value is not None
    return value


def always_the_same(ratings: Sequence[Rating]) -> str:
    """What must be said where nearly all answers get one rating; "" else."""
    counts = dict.fromkeys(SCALE, 0)
    for rating in ratings:
        if rating.chances is not None:
            counts[SCALE[rating.chances.index(max(rating.chances))]] += 1
    total = sum(counts.values())
    label = max(counts, key=lambda one: counts[one])
    if not total or counts[label] < NO_USE * total:
        return ""
    return f"the judge rated {counts[label] / total:.0%} of the answers {label}: its ratings tell little"
