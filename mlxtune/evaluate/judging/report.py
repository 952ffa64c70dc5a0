"""What a judge says of an evaluation: the part "judge" of its document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.comparison.scores import Side, means
from mlxtune.evaluate.comparison.summary import check_results
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.judging.exam import CONSISTENT, Exam, examine
from mlxtune.evaluate.judging.judge import CRITERIA, RUBRIC, Judge
from mlxtune.evaluate.judging.length import length_effect
from mlxtune.evaluate.judging.likert import always_the_same, rate_answers, scores_of
from mlxtune.evaluate.judging.remembered import Remembered
from mlxtune.evaluate.judging.verdicts import Pair, PairVerdict, first_rate, judge_pairs
from mlxtune.evaluate.statistics.holm import verdict
from mlxtune.evaluate.statistics.paired import compare_scores, wins_against_losses
from mlxtune.evaluate.turns import Conversations

Rate = Literal["pairwise", "likert"]
JUDGE = "judge"  # the name of its pairwise result, for gates
SHOWN_REFERENCE = ("math", "code", "coding", "reasoning")  # tags of prompts whose reference the judge is shown
LIKES_LONG = 0.8  # share of wins of the longer answer, from which it is said
FIRST = (0.3, 0.7)  # share of decisions for what is shown first, outside of which a judge is not trusted
FAILED = 0.1  # share of replies that cannot be read, above which it is said that the others may be a selection


@dataclass(frozen=True)
class Judging:
    """What is wanted of a judge."""

    open: Callable[[], Judge]  # called when all is answered
    rate: Rate = "pairwise"  # which of two answers is better, or each answer from 1 to 5
    rubric: str = RUBRIC  # what it is told to be good
    anyway: bool = False  # its verdicts are wanted though it fails its exam
    notes: tuple[str, ...] = ()  # what must be said of it in any case
    identity: str = ""  # what of the judge decides its replies
    kept: Path | None = None  # the file where its replies are kept as they come; None: nowhere
    exam: tuple[Pair, ...] = ()  # pairs whose "tuned" side is better; (): made of the suite's references

    @property
    def names(self) -> tuple[str, ...]:
        """Of its results, as gates may name them."""
        return (JUDGE,) if self.rate == "pairwise" else tuple(CRITERIA)


@dataclass(frozen=True)
class Judged:
    """What a judge said."""

    document: dict[str, Any]  # the part "judge" of the evaluation's document
    lines: list[dict[str, Any]] = field(default_factory=list)  # of verdicts.jsonl
    refused: bool = False  # it failed its exam, and gives no verdicts

    @property
    def held_to(self) -> dict[str, Any]:
        """Name -> what a gate looks at: "difference" and "verdict". Empty where it gives no verdicts."""
        if "difference" in self.document:
            return {JUDGE: self.document}
        return dict(self.document.get("criteria", {}))


def pairs_of(rows: Sequence[SuiteRow], answers: Mapping[Side, Sequence[Answer]]) -> list[Pair]:
    """Each prompt's answers of both sides, the first with the first and so on."""
    texts: dict[tuple[Side, int], dict[str, str]] = {}  # (side, sample) -> the prompt's id -> what was answered
    for side, given in answers.items():
        for answer in given:
            texts.setdefault((side, answer.sample), {})[answer.id] = answer.text
    conversations = Conversations(rows)
    samples = sorted({sample for _, sample in texts})
    pairs = []
    for row in rows:
        reference = row.reference if set(row.tags) & set(SHOWN_REFERENCE) else None
        for sample in samples:
            base, tuned = texts.get(("base", sample), {}), texts.get(("tuned", sample), {})
            if row.id not in base or row.id not in tuned:
                continue
            question = conversations.asked(row.id)
            both = conversations.said(row.id, base), conversations.said(row.id, tuned)
            pairs.append(Pair(row.id, question, *both, sample, reference, row.group))
    return pairs


def judge_evaluation(wanted: Judging, rows: Sequence[SuiteRow], answers: Mapping[Side, Sequence[Answer]]) -> Judged:
    """The exam, and verdicts or ratings of a judge that passed it; of any, where wanted anyway. Raises UserError where
    the judge cannot be asked.
    """
    judge = wanted.open()
    if wanted.kept is not None:
        judge = Remembered(judge, wanted.kept, wanted.identity)
    exam = examine(judge, rows, wanted.rubric, known=wanted.exam)
    document: dict[str, Any] = {"judge": judge.name, "rate": wanted.rate, "rubric": wanted.rubric}
    document |= {"exam": exam.as_json(), "refused": not exam.passed and not wanted.anyway}
    if document["refused"]:
        return Judged(
            {**document, "notes": [f"{exam.sentence}: no verdicts", *wanted.notes, *judge.notes]}, refused=True
        )
    pairs = pairs_of(rows, answers)
    if wanted.rate == "likert":
        ratings = rate_answers(judge, pairs, wanted.rubric)
        failed = sum(rating.value is None for rating in ratings)
        facts = {"ratings": len(ratings), "failed": failed, "criteria": check_results(scores_of(ratings))}
        said = [always_the_same(ratings), _failures(failed, len(ratings))]
        lines = [rating.as_json() for rating in ratings]
    else:
        verdicts = judge_pairs(judge, pairs, wanted.rubric)
        facts = pairwise_facts(verdicts)
        said = pairwise_notes(facts)
        lines = [one.as_json() for one in verdicts]
    notes = [_of_exam(exam), *said, *wanted.notes, *judge.notes]
    return Judged({**document, **facts, "notes": [note for note in notes if note]}, lines)


def pairwise_facts(verdicts: Sequence[PairVerdict]) -> dict[str, Any]:
    """Counts, win rate and what to make of them. Where no verdict could be read, or there is none, no rates."""
    read = [one for one in verdicts if not one.failed]
    asked = [one for one in read if not one.identical]
    counts = {outcome: sum(one.outcome == outcome for one in read) for outcome in ("win", "tie", "loss")}
    facts: dict[str, Any] = {
        "pairs": len(verdicts),
        "identical": sum(one.identical for one in verdicts),
        "failed": len(verdicts) - len(read),
        "wins": counts["win"],
        "ties": counts["tie"],
        "losses": counts["loss"],
        "consistency": fmean(one.consistent for one in asked) if asked else None,
        "first_position": first_rate(asked),
    }
    if not read:
        return facts
    prompts = _by_prompt(read)
    # From 0 to 1 against what is left of 1: the difference of two scores, whose interval has no width of nothing.
    tuned = means([[one.preference for one in some] for some in prompts])
    groups = [some[0].pair.group for some in prompts]
    low, high = compare_scores(1 - tuned, tuned, graded=False, groups=groups).interval
    ahead = _decided(prompts)
    p, test = wins_against_losses(ahead, groups)
    return {
        **facts,
        "win_rate": float(tuned.mean()),
        "difference": float(ahead.mean()),
        "interval": [(1 + low) / 2, (1 + high) / 2],
        "p": p,
        "test": test,
        "verdict": verdict(float(ahead.sum()), p),
        "length": length_effect(read).as_json(),
    }


def pairwise_notes(facts: Mapping[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    notes = [_failures(facts["failed"], facts["pairs"])]
    if facts["identical"]:
        notes.append(
            f"{facts['identical']} of {facts['pairs']} pairs are identical answers: ties, of which nobody was asked"
        )
    if facts["consistency"] is not None and facts["consistency"] < CONSISTENT:
        notes.append(
            f"only {facts['consistency']:.0%} of the pairs get the same verdict in both orders: not to be trusted"
        )
    first = facts["first_position"]
    if first is not None and not FIRST[0] <= first <= FIRST[1]:
        notes.append(f"the judge prefers what it is shown first in {first:.0%} of its decisions: not to be trusted")
    longer = facts.get("length", {}).get("longer_wins")
    if longer is not None and longer >= LIKES_LONG:
        notes.append(f"the longer answer wins {longer:.0%} of the decided pairs: see the win rate at equal length")
    return notes


def _by_prompt(verdicts: Sequence[PairVerdict]) -> list[list[PairVerdict]]:
    found: dict[str, list[PairVerdict]] = {}
    for one in verdicts:
        found.setdefault(one.pair.id, []).append(one)
    return list(found.values())


def _decided(prompts: Sequence[Sequence[PairVerdict]]) -> np.ndarray:
    """[prompts] 1 where the tuned side wins, -1 where it loses: by more of its answers, where there are several."""
    worth = {"win": 1, "tie": 0, "loss": -1}
    ahead: np.ndarray = np.sign([sum(worth[one.outcome] for one in some) for some in prompts])
    return ahead


def _of_exam(exam: Exam) -> str:
    return "" if exam.passed else f"{exam.sentence}: what it says is shown because of --anyway"


def _failures(failed: int, asked: int) -> str:
    if not failed:
        return ""
    text = f"{failed} of {asked} replies of the judge could not be read, and count for nothing"
    return f"{text}; what is left may be a selection" if failed > FAILED * asked else text
