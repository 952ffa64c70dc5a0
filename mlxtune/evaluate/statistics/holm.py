"""Several checks at once, and the one place that says better or worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

LEVEL = 0.05  # of false verdicts among equals, over all checks of an evaluation together

Verdict = Literal["better", "worse", "no difference shown"]


def holm(p: Sequence[float]) -> list[float]:
    """Each p after Holm's correction (1979): below LEVEL, it is significant among all of them together.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none gets below the one before it:
    0.01, 0.04, 0.03 -> 0.03, 0.06, 0.06. Ten checks without any effect would otherwise show one in four evaluations.
    """
    corrected = [0.0] * len(p)
    highest = 0.0
    order = sorted(range(len(p)), key=lambda index: p[index])
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, p[index] * (len(p) - place)))
        corrected[index] = highest
    return corrected


def verdict(difference: float, p: float) -> Verdict:
    """What may be claimed. difference: tuned minus base; p: after Holm. Never "equal": that cannot be shown."""
    if p >= LEVEL or difference == 0:
        return "no difference shown"
    return "better" if difference > 0 else "worse"
