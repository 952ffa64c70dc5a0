"""A curve in one line of text: ▇▅▄▃▂▂▁▁.

A run may have a million steps, and a line has some sixty places. So steps are put together in bins of one size; when
there are too many bins, each two become one. With room for 4 bins, the values 8 6 4 2, and then 1:

    8  6  4  2     bins of one step
    7  3  1        bins of two steps, of which the last has one so far
"""

from __future__ import annotations

from dataclasses import dataclass

BARS = "▁▂▃▄▅▆▇█"
GAP = " "  # where there was no number
MOST = 120  # bins that are kept, an even number; a line shows as many as it has room for
LARGEST = 1e100  # a value beyond it, or below its negative, is a gap: sums of more would be no numbers


@dataclass
class _Bin:
    """Some values that came one after the other."""

    values: int = 0  # all of them
    numbers: int = 0  # those that are numbers
    total: float = 0.0  # the sum of these

    def add(self, value: float | None) -> None:
        self.values += 1
        if value is not None and -LARGEST < value < LARGEST:
            self.numbers += 1
            self.total += value


def _joined(bins: list[_Bin]) -> _Bin:
    return _Bin(sum(one.values for one in bins), sum(one.numbers for one in bins), sum(one.total for one in bins))


class Sparkline:
    """Values that come one after the other, and what they look like so far."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most  # bins, an even number
        self._size = 1  # values of a whole bin
        self._bins: list[_Bin] = []

    def add(self, value: float | None) -> None:
        """Take in the next value. None, or no number: a gap."""
        if not self._bins or self._bins[-1].values == self._size:
            if len(self._bins) == self._most:
                self._bins = self._together(2)
                self._size *= 2
            self._bins.append(_Bin())
        self._bins[-1].add(value)

    def _together(self, count: int) -> list[_Bin]:
        """Each so many bins as one."""
        return [_joined(self._bins[begin : begin + count]) for begin in range(0, len(self._bins), count)]

    def means(self, width: int) -> list[float | None]:
        """The mean of each of at most `width` bins; None where it has no number."""
        count = max(1, -(-len(self._bins) // width))  # rounded up
        return [one.total / one.numbers if one.numbers else None for one in self._together(count)]

    def text(self, width: int) -> str:
        """A bar for each bin, from the lowest to the highest mean; "" before there are two to compare."""
        means = self.means(width)
        known = [mean for mean in means if mean is not None]
        if len(known) < 2:
            return ""
        low, high = min(known), max(known)
        return "".join(GAP if mean is None else _bar(mean, low, high) for mean in means)


def _bar(value: float, low: float, high: float) -> str:
    if high == low:
        return BARS[len(BARS) // 2]
    return BARS[round((value - low) / (high - low) * (len(BARS) - 1))]
