"""Axes: where a value stands on a drawing, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

Tick = tuple[float, str]  # a value, and how it is written

LARGEST, SMALLEST = 1e100, 1e-100  # what is beyond them is drawn there: no sum or quotient of these is out of range
ALIKE = 1e-9  # of two values: a difference that no axis shows
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
        return math.log10(max(held(value), SMALLEST)) if self.log else held(value)


def held(value: float) -> float:
    """The nearest value that can be drawn."""
    if abs(value) < SMALLEST:
        return 0.0
    return max(-LARGEST, min(LARGEST, value))


def fitted(values: Iterable[float], begin: float, end: float, log: bool = False, room: float = ROOM) -> Scale:
    """The scale of an axis that all values fit on. Of a logarithmic one only those above 0 count; none: 0 to 1."""
    wanted = [held(value) for value in values if math.isfinite(value) and (value >= SMALLEST or not log)]
    if not wanted:
        return Scale(*((1.0, 10.0) if log else (0.0, 1.0)), begin, end, log)
    low, high = min(wanted), max(wanted)
    if log:
        spare = max((high / low) ** room, 1.05)
        return Scale(low / spare, high * spare, begin, end, log)
    if high - low <= max(ALIKE * max(abs(low), abs(high)), SMALLEST):  # one value: it stands in the middle
        spare = max(abs(low) / 2, SMALLEST) if low else 0.5
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
        power = math.floor(math.log10(largest))
        decimals = max(0, power - math.floor(math.log10(apart) + 1e-9))
        return [_with_power(value, power, decimals) for value in values]
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def _with_power(value: float, power: int, decimals: int) -> str:
    """A very small or large value, with the power of ten that all of its axis have: 0.5e-4 beside 1.0e-4."""
    return f"{value / 10.0**power:.{decimals}f}e{power}" if value else "0"


def _round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    wanted = (high - low) / about
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _powers(low: float, high: float, about: int) -> list[float]:
    """Powers of ten between two values; where these are few, 2 and 5 times them too; where there are many, some; of a
    short axis, on which hardly any of them lies, values at equal distances.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 2:
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    else:
        values = [10.0**power for power in range(first, last + 1, math.ceil((last - first) / about))]
    inside = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside if len(inside) > 2 else _round_values(low, high, about)
