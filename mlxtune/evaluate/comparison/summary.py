"""What an evaluation shows: the document that `--json` prints, and the sentences that go with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlxtune.evaluate.comparison.scores import PromptScores, by_check, means
from mlxtune.evaluate.statistics.holm import holm, verdict
from mlxtune.evaluate.statistics.paired import Comparison, compare_scores, grouped
from mlxtune.evaluate.statistics.power import ASSUMPTION, smallest_difference
from mlxtune.evaluate.statistics.proportions import wilson
from mlxtune.evaluate.statistics.resampling import bootstrap

UNCORRECTED = "p is corrected for the number of checks (Holm), the 95% intervals are not"


def document(
    n: int, scores: Sequence[PromptScores], provenance: Mapping[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The result of an evaluation, as `--json` prints it and summary.json keeps it.

    n: prompts of the suite; provenance: further keys, such as suite, sides and sampling; notes: what a person must
    know.
    """
    groups = _groups(n, scores)
    return {
        "n": n,
        "groups": groups,
        "smallest_difference": smallest_difference(groups),
        "checks": check_results(scores),
        **provenance,
        "notes": list(notes),
    }


def _groups(n: int, scores: Sequence[PromptScores]) -> int:
    """How many groups n prompts are, each prompt without one being its own: their results are independent.

    Five prompts, three of them in one group: 5 - 3 + 1 = 3.
    """
    group_of = {one.id: one.group for one in scores if one.group is not None}
    return n - len(group_of) + len(set(group_of.values()))


def check_results(scores: Iterable[PromptScores]) -> dict[str, dict[str, Any]]:
    """For each check what both sides have, their difference and what may be claimed of it; where the base alone was
    asked, its mean and an interval of that.

    "p" is Holm's, by which the verdict is found; "p_alone" is the check's own.
    """
    checks = by_check(scores)
    alone = {name: _alone(some) for name, some in checks.items() if some[0].tuned is None}
    compared = {name: _compared(some) for name, some in checks.items() if name not in alone}
    corrected = dict(zip(compared, holm([found.p for found in compared.values()]), strict=True))
    results = {}
    for name, some in checks.items():
        if name in alone:
            results[name] = alone[name]
        else:
            results[name] = _as_json(compared[name], corrected[name])
        results[name]["graded"] = some[0].graded
    return results


def _as_json(found: Comparison, p: float) -> dict[str, Any]:
    return {
        "base": found.base,
        "tuned": found.tuned,
        "difference": found.difference,
        "interval": list(found.interval),
        "p": p,
        "verdict": verdict(found.difference, p),
        "p_alone": found.p,
        "n": found.n,
        "smallest_difference": found.smallest_difference,
    }


def _compared(scores: Sequence[PromptScores]) -> Comparison:
    base = means([one.base for one in scores])
    tuned = means([one.tuned or [] for one in scores])
    return compare_scores(base, tuned, scores[0].graded, [one.group for one in scores])


def _alone(scores: Sequence[PromptScores]) -> dict[str, Any]:
    """Of one side: its mean score and an interval of it."""
    each = means([one.base for one in scores])[:, 0]
    sums, sizes = grouped(each, [one.group for one in scores])
    mean = float(np.mean(each))
    # A group counts as one prompt: drawn again, groups that all pass would give an interval without a width.
    interval = bootstrap(sums, sizes) if scores[0].graded else wilson(mean * len(sums), len(sums))
    return {"base": mean, "interval": list(interval), "n": len(each)}


def what_can_be_shown(result: Mapping[str, Any]) -> str:
    """The sentence that belongs to every result: 24 prompts show differences of 0/1 checks from 26.5 points on. Prompts
    in groups show as much as there are groups.
    """
    n, groups, checks = result["n"], result["groups"], len(result["checks"])
    prompts = "1 prompt" if n == 1 else f"{n} prompts"
    if groups < n:
        prompts += f" in {groups} group{'s' if groups != 1 else ''}"
    smallest = smallest_difference(groups)
    if smallest is None:
        return f"{prompts} cannot show any difference of a check, whatever the answers are; make the suite larger."
    text = f"{prompts} show differences of a check from {100 * smallest:.1f} points on ({ASSUMPTION}"
    several = smallest_difference(groups, checks) if checks > 1 else smallest
    if several is None:
        text += f"; of {checks} checks at once, one alone cannot be shown"
    elif checks > 1:
        text += f"; of {checks} checks at once, one alone from {100 * several:.1f} on"
    return f"{text})."
