"""How far two raters agree beyond chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960) of two raters' verdicts on the same things, at least one: 1 is agreement throughout, 0 what
    chance gives to raters with these habits. None where chance alone gives agreement throughout: both always say the
    same one thing.

    Of 50 pairs both say A on 20, both B on 15, A and B on 5, B and A on 10: 70% agree, chance gives 50%, kappa is 0.4.
    """
    n = len(one)
    seen = sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) / n
    mine, theirs = Counter(one), Counter(other)
    chance = sum(mine[verdict] * theirs[verdict] for verdict in mine) / n**2
    if chance == 1:
        return None
    return (seen - chance) / (1 - chance)
