"""Graded scores: what chance does to a mean difference, found by making it happen.

Both ways work on whole groups: prompts that share a text go together, because they do not tell as much as as many that
do not. Without groups each prompt is a group of its own.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from mlxtune.evaluate.statistics.proportions import CONFIDENCE, Interval

DRAWS = 10_000  # of a permutation test and of a bootstrap
SEED = 0  # of both: the same scores give the same numbers
EXACT = 14  # up to as many differences that are not zero, all ways to sign them are tried: 16,384
AT_ONCE = 2_000_000  # numbers drawn at a time


def sign_flips(differences: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> float:
    """Two-sided p of the sign-flip permutation test: among equals each difference might as well have the other sign.

    [0.5, 0.25, 1.0] has 8 ways to be signed, of which two have a sum as far from zero as it has: 2 / 8.

    differences: [n]; of groups, each one's sum. Exact up to EXACT of them that are not zero; above, signs are drawn,
    and what was seen counts as one draw, so that p is never 0.
    """
    moved = differences[differences != 0]
    if len(moved) == 0:
        return 1.0
    # Sums that are equal on paper may differ in the last bit.
    limit = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    if len(moved) <= EXACT:
        ways = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1  # [ways, n]
        return float(np.mean(np.abs((2 * ways - 1) @ moved) >= limit))
    random = np.random.default_rng(seed)
    hits = 0
    for some in _portions(draws, len(moved)):
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-some * len(moved) // 8)), np.uint8))
        signs = bits[: some * len(moved)].reshape(some, len(moved)) * 2.0 - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ moved) >= limit))
    return (1 + hits) / (1 + draws)


def bootstrap(sums: np.ndarray, sizes: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> Interval:
    """Percentile interval of a mean difference per prompt, by drawing as many whole groups again.

    A resampled mean varies by (groups - 1) / groups too little, as the variance of a sample does; its distance from the
    mean is stretched by the root of that.

    sums: [groups], of the differences of each group's prompts; sizes: [groups], its prompts.
    """
    groups = len(sums)
    mean = float(sums.sum() / sizes.sum())
    if groups == 1:
        return mean, mean
    random = np.random.default_rng(seed)
    means = []
    for some in _portions(draws, groups):
        chosen = random.integers(groups, size=(some, groups))
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(np.concatenate(means), [tail, 1 - tail])
    stretched = mean + (ends - mean) * sqrt(groups / (groups - 1))
    each = sums / sizes
    low, high = np.clip(stretched, each.min(), each.max())
    return float(low), float(high)


def _portions(draws: int, width: int) -> list[int]:
    """How many draws to make at a time."""
    most = max(1, AT_ONCE // width)
    whole, rest = divmod(draws, most)
    return [most] * whole + [rest] * (rest > 0)
