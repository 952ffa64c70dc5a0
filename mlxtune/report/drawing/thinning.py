"""Curves of many points, drawn with fewer.

A mean of neighbours would hide what a person looks for: the one step whose loss was ten times the others'. So a long
curve is cut into buckets of neighbours, and of each the lowest and the highest point stay, in their order:

    losses 2 2 9 2 | 2 2 2 1 | 2 3 2 2   ->   2 9 | 2 1 | 2 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float | None]  # x, and y: None, or not a number, is a gap

MOST = 1_000  # points of a curve: a drawing has not many more columns of pixels


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most `most` of the points, in their order: the first, the last, and of each bucket the lowest and the highest;
    of one with gaps the first gap too. most: at least 5.
    """
    if len(points) <= most:
        return list(points)
    values = [math.nan if y is None else y for _, y in points]
    has_gaps = any(not math.isfinite(value) for value in values)
    buckets = (most - 2) // (3 if has_gaps else 2)
    inner = len(points) - 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        begin, end = 1 + inner * bucket // buckets, 1 + inner * (bucket + 1) // buckets
        kept |= _extremes(values, begin, end, has_gaps)
    return [points[at] for at in sorted(kept)]


def _extremes(values: Sequence[float], begin: int, end: int, has_gaps: bool) -> set[int]:
    """Where the lowest and the highest value of a bucket are, and its first gap."""
    places: Sequence[int] = range(begin, end)
    kept = set()
    if has_gaps:
        places = [at for at in places if math.isfinite(values[at])]
        kept = {at for at in range(begin, end) if not math.isfinite(values[at])}
        kept = {min(kept)} if kept else set()
    if places:
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return kept
