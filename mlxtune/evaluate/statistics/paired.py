"""Two models on the same prompts: the difference, its interval, and how likely chance alone gives as much.

What is compared is each prompt with itself. Prompts differ far more than models do; a pair takes that out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from mlxtune.evaluate.statistics.power import POWER, smallest_difference
from mlxtune.evaluate.statistics.proportions import Interval, Z, bonett_price, mcnemar_midp, sign_test
from mlxtune.evaluate.statistics.resampling import DRAWS, SEED, bootstrap, sign_flips


@dataclass(frozen=True)
class Comparison:
    """One check on two models. A verdict needs `holm` over all checks of the evaluation."""

    n: int  # prompts
    base: float  # mean score
    tuned: float  # mean score
    difference: float  # tuned - base
    interval: Interval  # of the difference, 95%; not corrected for other checks
    p: float  # two-sided; not corrected for other checks
    smallest_difference: float | None  # that so many prompts can show; None: none at all


def compare_scores(
    base: np.ndarray,
    tuned: np.ndarray,
    graded: bool,
    groups: Sequence[str | None] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Comparison:
    """Compare the scores of two models on the same prompts, at least one.

    Scores of several answers to a prompt are averaged first: they are no prompts of their own.

    0/1 scores: McNemar's mid-p and Bonett-Price's interval; where several answers to a prompt were averaged to
    something between, or prompts are in groups, sign flips and that interval. Graded scores: sign flips and the
    bootstrap. Groups are flipped, drawn and counted as a whole.

    base: [n, answers of a prompt], tuned: [n, answers of a prompt], whose number may differ; graded: scores may be
    other than 0 and 1; groups: [n] names, None: a group of its own; draws, seed: of the resampling.
    """
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    before, after = base.mean(axis=1), tuned.mean(axis=1)
    differences = after - before
    sums, sizes = grouped(differences, groups)
    in_groups = len(sums) < len(differences)
    are_coins = not graded and not in_groups and np.isin(differences, (-1, 0, 1)).all()
    if are_coins:
        p = mcnemar_midp(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p = sign_flips(sums, draws, seed)
    interval = bootstrap(sums, sizes, draws, seed) if graded else bonett_price(sums, sizes)
    smallest = _smallest_graded(sums, sizes) if graded else smallest_difference(len(sums))
    return Comparison(
        n=len(differences),
        base=float(before.mean()),
        tuned=float(after.mean()),
        difference=float(differences.mean()),
        interval=interval,
        p=p,
        smallest_difference=smallest,
    )


def grouped(differences: np.ndarray, groups: Sequence[str | None] | None) -> tuple[np.ndarray, np.ndarray]:
    """([groups] sums of the differences of each group, [groups] numbers of its prompts), in the order they appear."""
    names: list[tuple[str, object]] = []
    for index in range(len(differences)):
        name = groups[index] if groups is not None else None
        names.append(("alone", index) if name is None else ("group", name))
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = np.array([places[name] for name in names])
    return np.bincount(member, differences), np.bincount(member).astype(float)


def wins_against_losses(ahead: np.ndarray, groups: Sequence[str | None] | None) -> tuple[float, str]:
    """(Two-sided p, name of the test) of who wins more prompts: the sign test; of prompts in groups, whose results are
    not independent, sign flips of whole groups.

    ahead: [n] 1 where the tuned side wins, -1 where it loses, 0 for a tie; groups: as `compare_scores` takes them.
    """
    sums, _ = grouped(ahead, groups)
    if len(sums) < len(ahead):
        return sign_flips(sums), "sign flips of groups"
    return sign_test(int((ahead > 0).sum()), int((ahead < 0).sum())), "sign test"


def _smallest_graded(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    """The difference that so many graded scores, which vary as these do, show with a chance of POWER; None where they
    do not vary: sqrt(n) grows, and a standard error shrinks, with the groups.

    sums: [groups], sizes: [groups].
    """
    groups = len(sums)
    if groups < 2:
        return None
    mean = sums.sum() / sizes.sum()
    spread = np.sum((sums - mean * sizes) ** 2) / (groups - 1)  # the variance of a group's sum
    error = sqrt(spread * groups) / sizes.sum()
    return float((Z + NormalDist().inv_cdf(POWER)) * error) or None
