"""Which of two answers a judge prefers, asked in both orders.

Judges prefer what they are shown first, or second. Each pair is shown both ways round:

    tuned answer first    A 0.7  B 0.2  C 0.1    -> for the tuned one: 0.7 + 0.1 / 2 = 0.75
    base answer first     A 0.4  B 0.5  C 0.1    -> for the tuned one: 0.5 + 0.1 / 2 = 0.55
                                       preference for the tuned answer: 0.65
    decisions: A, then B: the tuned one both times, so it wins. Two different decisions are a tie (as in MT-Bench,
    arXiv 2306.05685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.judge import PAIR_LABELS, RUBRIC, Judge, Probabilities, pair_prompt

Outcome = Literal["win", "tie", "loss"]  # of the tuned answer
FIRST, SECOND, NEITHER = range(3)  # places of PAIR_LABELS


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    id: str  # of the prompt
    question: Messages  # all before the answers
    base: str  # the answer of one side
    tuned: str  # of the other
    sample: int = 0  # which answers to this prompt
    reference: str | None = None  # an answer that is right, to be shown to the judge; None: none
    group: str | None = None  # of the prompt


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of a pair."""

    pair: Pair  # which one
    tuned_first: Probabilities | None  # of PAIR_LABELS; None: not asked, or a reply that could not be read
    base_first: Probabilities | None  # the same, the base's answer shown first

    @property
    def identical(self) -> bool:
        """Then nobody is asked: it is a tie."""
        return self.pair.base == self.pair.tuned

    @property
    def failed(self) -> bool:
        return not self.identical and (self.tuned_first is None or self.base_first is None)

    @property
    def preference(self) -> float:
        """For the tuned answer, from 0 to 1. Of a verdict that has not failed."""
        if self.tuned_first is None or self.base_first is None:
            return 0.5
        shown_first = self.tuned_first[FIRST] + self.tuned_first[NEITHER] / 2
        shown_second = self.base_first[SECOND] + self.base_first[NEITHER] / 2
        return (shown_first + shown_second) / 2

    @property
    def decisions(self) -> tuple[Outcome, Outcome]:
        """In the order tuned first, base first. Of a verdict that has not failed."""
        if self.tuned_first is None or self.base_first is None:
            return "tie", "tie"
        by_place: tuple[Outcome, Outcome, Outcome] = ("win", "loss", "tie")
        turned: tuple[Outcome, Outcome, Outcome] = ("loss", "win", "tie")
        return by_place[_likeliest(self.tuned_first)], turned[_likeliest(self.base_first)]

    @property
    def consistent(self) -> bool:
        """Whether both orders have the same decision."""
        one, other = self.decisions
        return one == other

    @property
    def outcome(self) -> Outcome:
        return self.decisions[0] if self.consistent else "tie"

    def as_json(self) -> dict[str, Any]:
        """A line of verdicts.jsonl."""
        line: dict[str, Any] = {"id": self.pair.id, "sample": self.pair.sample}
        line |= {"tuned_first": self.tuned_first, "base_first": self.base_first}
        if self.failed:
            return {**line, "outcome": "failed"}
        return {**line, "outcome": self.outcome, "preference": self.preference}


def judge_pairs(judge: Judge, pairs: Sequence[Pair], rubric: str = RUBRIC) -> list[PairVerdict]:
    """Ask about every pair in both orders, but for identical answers. Raises UserError as the judge does."""
    asked = [pair for pair in pairs if pair.base != pair.tuned]
    prompts = []
    for pair in asked:
        for first, second in ((pair.tuned, pair.base), (pair.base, pair.tuned)):
            prompts.append(pair_prompt(pair.question, first, second, pair.reference, rubric))
    replies = iter(judge.label_probabilities(prompts, PAIR_LABELS) if prompts else [])
    verdicts = []
    for pair in pairs:
        if pair.base == pair.tuned:
            verdicts.append(PairVerdict(pair, None, None))
        else:
            verdicts.append(PairVerdict(pair, next(replies), next(replies)))
    return verdicts


def first_rate(verdicts: Sequence[PairVerdict]) -> float | None:
    """The share of decisions for the answer shown first, of those for one of the two. None: there is none."""
    first = second = 0
    for verdict in verdicts:
        for reply in (verdict.tuned_first, verdict.base_first):
            if reply is not None:
                first += _likeliest(reply) == FIRST
                second += _likeliest(reply) == SECOND
    return first / (first + second) if first + second else None


def _likeliest(reply: Probabilities) -> int:
    """The place of the label decided for; of equally likely ones, neither."""
    best = max(reply)
    places = [place for place, chance in enumerate(reply) if chance == best]
    return places[0] if len(places) == 1 else NEITHER
