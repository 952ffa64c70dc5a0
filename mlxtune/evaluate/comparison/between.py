"""Saved evaluations of one suite side by side: the same prompts, the same checks, no model.

What takes part of each evaluation is what was tuned, or its base where nothing else was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.errors import UserError
from mlxtune.evaluate.comparison.by_judge import ranked_by_judge
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.comparison.scores import PromptScores
from mlxtune.evaluate.comparison.summary import document
from mlxtune.evaluate.statistics.ranking import ranking

Scores = dict[tuple[str, str], PromptScores]  # (prompt's id, check) -> scores


def compare(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The document that `mlxtune compare --json` prints. Of two it is that of `eval`: "base" is the first, "tuned" the
    second. Of more it ranks them (`statistics.ranking`) by which wins more checks on a prompt, and by a judge's
    verdicts where all have them.

    Raises UserError for evaluations of other suites, or without a prompt in common.
    """
    _refuse_other_suites(evaluations)
    scores = [_final(one) for one in evaluations]
    common = [key for key in scores[0] if all(key in other for other in scores[1:])]
    if not common:
        raise UserError(
            f"{_names(evaluations)}: no prompt has a check in all of them",
            "Evaluate the same suite with the same checks.",
        )
    notes = _notes(evaluations, scores, common)
    prompts = len({id for id, _ in common})
    shared = {"suite": evaluations[0].summary["suite"]}
    if len(evaluations) == 2:
        first, second = scores
        pairs = [_pair(first[key], second[key]) for key in common]
        sides = {"base": _side(evaluations[0]), "tuned": _side(evaluations[1])}
        return document(prompts, pairs, {**shared, "sides": sides}, notes)
    return {
        "n": prompts,
        "evaluations": [_side(one) for one in evaluations],
        "ranking": _ranked(evaluations, scores, common),
        "by_judge": ranked_by_judge(evaluations),
        **shared,
        "notes": notes,
    }


def _refuse_other_suites(evaluations: Sequence[Evaluation]) -> None:
    for other in evaluations[1:]:
        if other.suite != evaluations[0].suite:
            raise UserError(
                f"{evaluations[0].name} and {other.name} are evaluations of different suites",
                "Compare answers to the same prompts: run eval with the same --suite for both.",
            )


def _final(evaluation: Evaluation) -> Scores:
    """What takes part of an evaluation, as its scores of one side."""
    found = {}
    for one in evaluation.scores:
        final = one.base if one.tuned is None else one.tuned
        found[one.id, one.check] = PromptScores(one.id, one.check, one.graded, one.group, final, None)
    return found


def _pair(first: PromptScores, second: PromptScores) -> PromptScores:
    return PromptScores(first.id, first.check, first.graded, first.group, first.base, second.base)


def _side(evaluation: Evaluation) -> dict[str, Any]:
    """The name of what takes part, and what its folder says of it."""
    sides = evaluation.summary.get("sides")
    described = sides.get("tuned") or sides.get("base") if isinstance(sides, dict) else None
    return {"evaluation": evaluation.name, **(described if isinstance(described, dict) else {})}


def _ranked(
    evaluations: Sequence[Evaluation], scores: Sequence[Scores], common: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The best first, each with its checks' means."""
    ranks = ranking(_wins(scores, common))
    entries = []
    for evaluation, mine, rank in zip(evaluations, scores, ranks, strict=True):
        checks: dict[str, list[float]] = {}
        for key in common:
            checks.setdefault(key[1], []).append(float(np.mean(mine[key].base)))
        entries.append(
            {
                "evaluation": evaluation.name,
                "share": rank.share,
                "interval": list(rank.interval),
                "wins": rank.wins,
                "checks": {name: float(np.mean(means)) for name, means in checks.items()},
            }
        )
    return sorted(entries, key=lambda entry: -entry["share"])


def _wins(scores: Sequence[Scores], common: Sequence[tuple[str, str]]) -> np.ndarray:
    """[prompts, evaluations, evaluations] 1 where the row's evaluation scores higher on more checks of a prompt than
    the column's, 0.5 where neither does. Counting checks needs no common scale of theirs.
    """
    ids = {id: place for place, id in enumerate(dict.fromkeys(id for id, _ in common))}
    ahead = np.zeros((len(ids), len(scores), len(scores)))
    for key in common:
        means = np.array([np.mean(one[key].base) for one in scores])
        ahead[ids[key[0]]] += np.sign(means[:, None] - means[None, :])
    wins: np.ndarray = (np.sign(ahead) + 1) / 2
    wins[:, np.arange(len(scores)), np.arange(len(scores))] = 0
    return wins


def _notes(evaluations: Sequence[Evaluation], scores: Sequence[Scores], common: Sequence[tuple[str, str]]) -> list[str]:
    """What a person must know beside the numbers: what differs that should not, and what each evaluation said."""
    notes = []
    for evaluation, mine in zip(evaluations, scores, strict=True):
        if len(mine) > len(common):
            notes.append(f"{evaluation.name}: {len(mine) - len(common)} scores have no counterpart, and are left out")
    first = _settings(evaluations[0])
    for evaluation in evaluations[1:]:
        theirs = _settings(evaluation)
        differing = [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]
        for key in differing:
            notes.append(
                f"{key} differs: {first.get(key)} in {evaluations[0].name}, {theirs.get(key)} in {evaluation.name}"
            )
    for evaluation in evaluations:
        said = evaluation.summary.get("notes")
        notes += [f"{evaluation.name}: {note}" for note in (said if isinstance(said, list) else [])]
    return notes


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """What answers depend on beside the models."""
    sampling = evaluation.summary.get("sampling")
    found = dict(sampling) if isinstance(sampling, dict) else {}
    found["turns"] = evaluation.summary.get("turns", "one")
    if "computed by" in evaluation.summary:
        found["what computed the answers"] = evaluation.summary["computed by"]
    return found


def _names(evaluations: Sequence[Evaluation]) -> str:
    return ", ".join(evaluation.name for evaluation in evaluations)
