"""What each check says of each prompt, for both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.engines.request import Answer

Side = Literal["base", "tuned"]
SIDES: tuple[Side, ...] = ("base", "tuned")


@dataclass(frozen=True)
class PromptScores:
    """One check on the answers to one prompt."""

    id: str  # of the prompt
    check: str  # its name
    graded: bool  # any number; else 0 or 1
    group: str | None  # of the prompt; None: none
    base: list[float]  # one for each answer
    tuned: list[float] | None  # one for each answer; None: only the base was asked

    def as_json(self) -> dict[str, Any]:
        """A line of scores.jsonl."""
        line: dict[str, Any] = {"id": self.id, "check": self.check, "graded": self.graded}
        if self.group is not None:
            line["group"] = self.group
        line["base"] = self.base
        if self.tuned is not None:
            line["tuned"] = self.tuned
        return line


def score_answers(rows: Sequence[SuiteRow], answers: Mapping[Side, Iterable[Answer]]) -> list[PromptScores]:
    """Ask every check of every row. What a check does not apply to, on one of the sides, is left out on both.

    answers: those of each side to all prompts, in any order.
    """
    by_prompt: dict[tuple[str, str], list[Answer]] = {}
    for side, given in answers.items():
        for answer in sorted(given, key=lambda one: one.sample):
            by_prompt.setdefault((side, answer.id), []).append(answer)
    found = []
    for row in rows:
        for check in row.checks:
            scored = {side: _applying(check, row, by_prompt[side, row.id]) for side in answers}
            if all(scored.values()):
                found.append(
                    PromptScores(row.id, check.name, check.graded, row.group, scored["base"], scored.get("tuned"))
                )
    return found


def _applying(check: Check, row: SuiteRow, answers: list[Answer]) -> list[float]:
    scores = [check.score(answer, row) for answer in answers]
    return [score for score in scores if score is not None]


def by_check(scores: Iterable[PromptScores]) -> dict[str, list[PromptScores]]:
    """The scores of each check, checks in the order in which they appear."""
    found: dict[str, list[PromptScores]] = {}
    for one in scores:
        found.setdefault(one.check, []).append(one)
    return found


def means(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """[prompts, 1] each prompt's mean over its answers."""
    return np.array([[fmean(answers)] for answers in scores])
