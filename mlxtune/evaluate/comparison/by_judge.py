"""A ranking by a judge's verdicts, of saved evaluations that one judge compared with the same base.

The judge never saw two tuned models side by side. Each was compared with the base, so the base is one of those ranked,
and the others are compared through it (`statistics.ranking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.evaluate.comparison.folder import VERDICTS, Evaluation
from mlxtune.evaluate.statistics.ranking import ranking

WORTH = {"win": 1.0, "tie": 0.5, "loss": 0.0}  # outcome of the tuned side -> its share of a win


def ranked_by_judge(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The base and what each evaluation tuned, the best first; [] where not all have verdicts of one judge on the
    same answers of a base. Raises UserError for damaged files.
    """
    judges = {_judge(evaluation) for evaluation in evaluations}
    if len(judges) > 1 or None in judges:
        return []
    bases = [evaluation.answers_of("base") for evaluation in evaluations]
    if any(base != bases[0] for base in bases[1:]):
        return []
    worths = [_worths(evaluation) for evaluation in evaluations]
    ids = [id for id in bases[0] if all(id in worth for worth in worths)]
    if not ids:
        return []
    wins = np.zeros((len(ids), len(evaluations) + 1, len(evaluations) + 1))  # the base is the first
    for place, id in enumerate(ids):
        for number, worth in enumerate(worths, 1):
            wins[place, number, 0] = worth[id]
            wins[place, 0, number] = 1 - worth[id]
    names = ["base", *(evaluation.name for evaluation in evaluations)]
    entries = [{"evaluation": name, **asdict(rank)} for name, rank in zip(names, ranking(wins), strict=True)]
    return sorted(entries, key=lambda entry: -entry["share"])


def _judge(evaluation: Evaluation) -> tuple[str, str] | None:
    """(Name, rubric) of the judge that gave pairwise verdicts; None where there are none."""
    judge = evaluation.summary.get("judge")
    if not isinstance(judge, dict) or "win_rate" not in judge:
        return None
    return str(judge.get("judge")), str(judge.get("rubric"))


def _worths(evaluation: Evaluation) -> dict[str, float]:
    """The prompt's id -> the tuned side's share of wins over its answers."""
    file = evaluation.path / VERDICTS
    found: dict[str, list[float]] = {}
    if not file.is_file():
        return {}
    for row in raw_rows(file):
        if not isinstance(row, Bad):
            _, line = row
            if line.get("outcome") in WORTH:
                found.setdefault(str(line.get("id")), []).append(WORTH[line["outcome"]])
    return {id: float(np.mean(worths)) for id, worths in found.items()}
