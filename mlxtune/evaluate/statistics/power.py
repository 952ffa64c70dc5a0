"""What so many prompts can show at all.

A difference of 10 points on 100 prompts may be 20 on which only the tuned model passes against 10 on which only the
base does, or 10 against none. The more they disagree, the harder a difference is to see; here they disagree on
DISCORDANT of the prompts, or on as many as the difference itself needs.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from mlxtune.evaluate.statistics.holm import LEVEL

POWER = 0.8  # how often a difference that can be shown is shown
DISCORDANT = 0.2  # of the prompts, on which one model alone passes
NEGLIGIBLE = 1e-12  # probabilities that are left out
STEPS = 1000  # of the answer, from 0 to 1

ASSUMPTION = f"in {POWER:.0%} of such evaluations, if the two models differ on {DISCORDANT:.0%} of the prompts"


@cache
def smallest_difference(n: int, checks: int = 1) -> float | None:
    """The smallest true difference of a 0/1 check that n prompts show with a chance of POWER; None where they never do.

    Computed exactly for McNemar's mid-p, to 0.001. 24 prompts: 0.265; 100: 0.121; 400: 0.063. Fewer than 5 prompts
    never give p < 0.05, even if all of them change.

    checks: with so many in one evaluation, what each shows whatever the others do (Holm's first step).
    """
    if _shown(n, 1.0, checks) < POWER:
        return None
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if _shown(n, middle / STEPS, checks) >= POWER:
            high = middle
        else:
            low = middle
    return high / STEPS


def _shown(n: int, difference: float, checks: int) -> float:
    """How often a difference is called one, under the assumption above."""
    discordant = max(DISCORDANT, difference)
    return power(n, (discordant + difference) / 2, (discordant - difference) / 2, LEVEL / checks)


def power(n: int, better: float, worse: float, level: float = LEVEL) -> float:
    """How likely McNemar's mid-p comes below `level` on n prompts.

    better, worse: chances that the tuned model alone, or the base alone, passes a prompt; at least one above 0.

    The number m of prompts on which they differ is binomial, and so is, for each m, how many of these are better.
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # logs[k] = log k!
    total = 0.0
    for m, weight in enumerate(_binomial(n, better + worse, logs)):
        if weight < NEGLIGIBLE:
            continue
        fair = _binomial(m, 0.5, logs)
        midp = 2 * np.cumsum(fair) - fair  # of 0, 1, 2 ... being the fewer
        significant = int(np.count_nonzero(midp[: m // 2 + 1] < level))  # so many counts, from 0 on
        if significant:
            split = _binomial(m, better / (better + worse), logs)
            total += weight * (split[:significant].sum() + split[m + 1 - significant :].sum())
    return float(total)


def _binomial(n: int, chance: float, logs: np.ndarray) -> np.ndarray:
    """[n + 1] the probabilities of 0 .. n successes. logs: [at least n + 1] logarithms of the factorials."""
    k = np.arange(n + 1)
    if chance >= 1:
        return (k == n).astype(float)
    if chance <= 0:
        return (k == 0).astype(float)
    ways = logs[n] - logs[: n + 1] - logs[n::-1]
    return np.exp(ways + k * np.log(chance) + (n - k) * np.log1p(-chance))
