"""What a suite is made of: prompts, and the checks on their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxtune.evaluate.engines.request import Answer

# What an answer comes to, in every way that it may be read, so that answers can be counted: "50%" is {"50", "1/2"}.
# Two answers agree where they have one in common; of an answer that comes to nothing it is empty.
Meanings = frozenset[str]

# What a check says of one answer: 0.0 or 1.0, or a number between where it is graded; None: it does not apply.
Score = float | None


@dataclass(frozen=True)
class SuiteRow:
    """One prompt of a suite."""

    id: str  # as given, else the line's number as text; no two rows have the same
    messages: list[dict[str, Any]]  # the prompt: all before the last answer
    tools: list[dict[str, Any]] | None = None  # in OpenAI's form; None for none
    reference: str | None = None  # the answer to compare with: the key "reference", else the last answer
    checks: list[Check] = field(default_factory=list)  # those of the suite's settings, then its own
    tags: list[str] = field(default_factory=list)  # its subjects, for tables by subject
    group: str | None = None  # rows of one group share a text, so that their results are not independent
    calls: list[dict[str, Any]] | None = None  # the tool calls of the last answer; None where it has none
    turns: list[str] = field(default_factory=list)  # what the user says after each answer of the model, in order
    turn_references: list[str] = field(default_factory=list)  # the answers to compare those to `turns` with
    follows: str | None = None  # the prompt whose answer stands in this one (`evaluate.turns`); None: none does


@dataclass(frozen=True)
class Rule:
    """What a check computes, its arguments filled in."""

    judge: Callable[[Answer, SuiteRow], Score]  # of one answer
    graded: bool = False  # any number from 0 to 1; else 0 or 1
    of_reference: bool = False  # compares with the row's reference; None for a row without one
    of_data: bool = True  # can be asked of a training answer; False: of a model's alone
    # What an answer comes to, whether that is right or not; None: answers to such rows cannot be counted.
    meanings: Callable[[Answer, SuiteRow], Meanings] | None = None


@dataclass(frozen=True)
class Check:
    """One question about an answer."""

    name: str  # its kind; the second one of a row is KIND-2
    rule: Rule  # what it computes
    # What must be told of its results: each sentence with the number of answers that it is true of.
    notes: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def graded(self) -> bool:
        """Any number from 0 to 1; else 0 or 1."""
        return self.rule.graded

    def score(self, answer: Answer, row: SuiteRow) -> Score:
        """0.0 or 1.0, or a number between where it is graded; None where the check does not apply to this row."""
        return self.rule.judge(answer, row)
