"""Evaluation folders without a model: prompts and answers in, whatever the product makes of them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.evaluate.checks.check import Check, Rule, SuiteRow
from mlxtune.evaluate.comparison import folder as folders
from mlxtune.evaluate.comparison.scores import Side, score_answers
from mlxtune.evaluate.comparison.summary import document
from mlxtune.evaluate.engines.request import Answer

YES = Check("contains", Rule(lambda answer, _: float("yes" in answer.text)))
SHORT = Check("short", Rule(lambda answer, _: 1 / (1 + len(answer.text)), graded=True))


def rows(n: int, checks: Sequence[Check] = (YES,), groups: Sequence[str] = ()) -> list[SuiteRow]:
    """Questions with a reference, ids r1, r2 ..."""
    return [
        SuiteRow(
            f"r{number}",
            [{"role": "user", "content": f"Question {number}?"}],
            reference=f"yes, it is {number}",
            checks=list(checks),
            group=groups[number - 1] if groups else None,
        )
        for number in range(1, n + 1)
    ]


def answers(suite: Sequence[SuiteRow], texts: Sequence[str]) -> list[Answer]:
    """One answer to each row; texts are repeated as often as needed."""
    return [Answer(row.id, 0, texts[place % len(texts)], "", "stop", 3) for place, row in enumerate(suite)]


def write(
    path: Path, prompts: Sequence[SuiteRow], base: Sequence[str], tuned: Sequence[str] | None = None, **provenance: Any
) -> Path:
    """A folder as `eval --suite --out` writes it. base, tuned: texts of the answers; provenance: replaces keys."""
    path.mkdir(parents=True)
    given: dict[Side, list[Answer]] = {"base": answers(prompts, base)}
    if tuned is not None:
        given["tuned"] = answers(prompts, tuned)
    lines = [
        {
            "side": side,
            "id": one.id,
            "sample": one.sample,
            "text": one.text,
            "thought": "",
            "finish": "stop",
            "tokens": 3,
        }
        for side, some in given.items()
        for one in some
    ]
    folders.write_prompts(path, prompts)
    folders.write_lines(path / folders.ANSWERS, lines)
    scores = score_answers(prompts, given)
    facts = {"suite": {"digest": "5eed"}, "sides": {side: {"name": f"{path.name} {side}"} for side in given}}
    summary = document(len(prompts), scores, {**facts, **provenance}, provenance.pop("notes", ()))
    folders.write_results(path, scores, summary)
    return path
