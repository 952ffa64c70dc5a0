"""Counts: tests and intervals for what can only be so or not.

Two models answer the same n prompts, and each answer passes a check or does not. Only the prompts on which they differ
say which model is better:

                     tuned passes   tuned fails
    base passes          40              3       <- "worse": 3
    base fails           10             47
                          ^ "better": 10

If both were equally good, each of the 13 would be a fair coin. That is McNemar's test. Its exact form calls too little
significant, because a count moves in steps; counting half of what was seen itself (mid-p) mends most of that.
"""

from __future__ import annotations

from math import comb, sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95  # of every interval
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)  # 1.96: as many standard errors to each side

Interval = tuple[float, float]  # from, to


def mcnemar_midp(better: int, worse: int) -> float:
    """Two-sided mid-p of McNemar's test: how likely a split at least as uneven is among equals, that very one by half.

    better, worse: prompts that one model alone passes. 10 and 3 give 0.0574 (Fagerland, Lydersen and Laake 2013).
    """
    fewer, coins = min(better, worse), better + worse
    # Whole numbers until the one division, which Python rounds rightly however large they are.
    at_most = sum(comb(coins, k) for k in range(fewer + 1))
    return (2 * at_most - comb(coins, fewer)) / 2**coins


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of the sign test: ties are no part of it. 10 and 3 give 0.0923."""
    fewer, coins = min(wins, losses), wins + losses
    at_most = sum(comb(coins, k) for k in range(fewer + 1))
    return min(1.0, 2 * at_most / 2**coins)


def wilson(successes: float, n: int) -> Interval:
    """Interval of a share (Wilson 1927), which stays within [0, 1] and has a width at 0 and at n of n, too.

    n: above 0.
    """
    share = successes / n
    middle = share + Z * Z / (2 * n)
    half = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def bonett_price(sums: np.ndarray, sizes: np.ndarray | None = None) -> Interval:
    """Interval of the mean difference between paired scores of 0 to 1 (Bonett and Price 2012).

    Two prompts are added, one "better" and one "worse". Without them three equal pairs out of three would give [0, 0].
    Agresti and Min (2005) add half of each; that covers the truth in as few as 86% of cases, instead of 95%, where
    changes go one way only, as after learning a format. This one does in some 92% at least, from 12 prompts on.

    Prompts in groups: what varies is a group's sum, not each prompt, and the two that are added are groups of the mean
    size. Eight equal pairs in two groups are four groups of 4 with sums 0, 0, 4 and -4. The mean is 0, its variance
    (4^2 + 4^2) / 16^2, and the interval 1.96 * 0.354 = 0.69 to each side. Groups of one prompt give the 2012 formula.

    sums: [groups] of the differences of each group's prompts, which are -1, 0 or 1, or between these where several
    answers to a prompt were averaged; sizes: [groups], its prompts; None: one each.
    """
    if sizes is None:
        sizes = np.ones(len(sums))
    added = sizes.mean()
    prompts = sizes.sum() + 2 * added
    mean = sums.sum() / prompts
    squares = ((sums - mean * sizes) ** 2).sum() + (added - mean * added) ** 2 + (added + mean * added) ** 2
    half = Z * sqrt(squares) / prompts
    return max(-1.0, float(mean - half)), min(1.0, float(mean + half))
