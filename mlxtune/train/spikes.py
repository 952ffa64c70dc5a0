"""A loss that is far above the recent ones, which a person should know of. The limits are chosen, not measured."""

from __future__ import annotations

from collections import deque
from statistics import fmean, pstdev

RECENT = 50  # losses that a new one is compared with
ENOUGH = 20  # losses before any is called a spike
SIGMAS = 6.0  # standard deviations above the mean: of losses with a normal distribution, one of 10^9 is as high
LEAST_DEVIATION = 1e-3  # of the mean: losses that hardly differ are no measure


class Spikes:
    """Compares each loss with the ones before it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, loss: float) -> str:
        """What to say of this loss where it is a spike, else ""; from now on it is one of the recent ones."""
        text = ""
        if len(self._recent) >= ENOUGH:
            mean = fmean(self._recent)
            deviation = max(pstdev(self._recent), LEAST_DEVIATION * mean)
            if loss > mean + SIGMAS * deviation:
                text = f"{loss:.3f}, {mean:.3f} was usual"
        self._recent.append(loss)
        return text
