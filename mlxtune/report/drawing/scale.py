"""Axes: where a value stands on a drawing, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

Tick = tuple[float, str]  # a value, and how it is written

LARGEST = 1e300  # the difference of two larger numbers may be none; whatever is beyond is drawn here
SMALLEST = 1e-300  # of a logarithmic axis
ROOM = 0.05  # of the range, left free at both ends of an axis


@dataclass(frozen=True)
class Scale:
    """Values along an axis of a drawing."""

    low: float  # the value at its beginning
    high: float  # the value at its end, above `low`
    begin: float  # where it begins in the drawing
    end: float  # where it ends; less than `begin` where it goes up
    log: bool = False  # whether equal steps multiply

    def place(self, value: float) -> float:
        """Where a value stands in the drawing."""
        low, high = self._measured(self.low), self._measured(self.high)
        share = (self._measured(value) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, about: int) -> list[Tick]:
        """Round values, some `about` of them."""
        values = _powers(self.low, self.high, about) if self.log else _round_values(self.low, self.high, about)
        return list(zip(values, written(values), strict=True))

    def _measured(self, value: float) -> float:
        return math.log10(max(value, SMALLEST)) if self.log else max(-LARGEST, min(LARGEST, value))


def fitted(values: Iterable[float], begin: float, end: float, log: bool = False, room: float = ROOM) -> Scale:
    """The scale of an axis that all values fit on. Of a logarithmic one only those above 0 count; none: 0 to 1."""
    wanted = [max(-LARGEST, min(LARGEST, value)) for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not wanted:
        return Scale(*((1.0, 10.0) if log else (0.0, 1.0)), begin, end, log)
    low, high = min(wanted), max(wanted)
    if log:
        spare = max((high / low) ** room, 1.05)
        return Scale(max(low / spare, SMALLEST), high * spare, begin, end, log)
    if low == high:  # one value: it stands in the middle
        spare = abs(low) / 2 or 0.5
        return Scale(low - spare, high + spare, begin, end)
    spare = (high - low) * room
    return Scale(low - spare, high + spare, begin, end)


def written(values: list[float]) -> list[str]:
    """Values of one axis, all with as many decimals as their distance asks for: 0.5, 1.0, 1.5."""
    if not values:
        return []
    largest = max(abs(value) for value in values)
    apart = min((b - a for a, b in pairwise(values)), default=largest) or 1.0
    if largest and (largest < 1e-3 or largest >= 1e7):
        return [f"{value:.3g}" for value in values]
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def _round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    wanted = (high - low) / about
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _powers(low: float, high: float, about: int) -> list[float]:
    """Powers of ten between two values; where these are few, 2 and 5 times them too; where there are many, some."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 2:
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    else:
        values = [10.0**power for power in range(first, last + 1, math.ceil((last - first) / about))]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
