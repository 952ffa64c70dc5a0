"""Which widths rows are padded to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_DISTINCT = 512  # lengths that are looked at: fine enough, and the search takes the square of it in time and memory


def widths(lengths: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most `count` widths, ascending, that pad the given lengths least: each length is padded to the next width.

    lengths: [N]. Lengths of 3 4 4 9 10 30 and two widths: 10 and 30 pad by 7 + 6 + 6 + 1 = 20 tokens, 4 and 30 by
    1 + 21 + 20 = 42, so it is 10 and 30.

    Dynamic programming: the best k widths of which the last is the length j are the best k - 1 widths up to some length
    before, and j for all lengths between.
    """
    distinct, rows = _distinct(np.asarray(lengths))  # [D] each: lengths going up, and how many rows have each
    cost = _padded(distinct, rows)
    least = cost[0]  # [D] padded tokens of the lengths up to j when j is the last of k widths: here of one
    cuts: list[np.ndarray] = []  # [D] for 2, 3, ... widths: the first of the lengths that share width j
    for _ in range(min(count, len(distinct)) - 1):
        before = np.concatenate([[np.inf], least[:-1]])  # [D] of the lengths before i
        through = before[:, None] + cost  # [D, D] when the lengths i .. j share width j
        cuts.append(through.argmin(axis=0))
        least = through.min(axis=0)
    last = len(distinct) - 1
    chosen = [int(distinct[last])]
    for cut in reversed(cuts):
        last = int(cut[last]) - 1
        chosen.append(int(distinct[last]))
    return sorted(chosen)


def _distinct(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[D] different lengths, going up, and [D] how many rows have each; of very many, some and how many each covers."""
    distinct, rows = np.unique(lengths, return_counts=True)
    if len(distinct) <= MAX_DISTINCT:
        return distinct, rows
    shares = np.linspace(0, 1, MAX_DISTINCT + 1)
    distinct = np.unique(np.quantile(lengths, shares, method="higher"))
    return distinct, np.bincount(np.searchsorted(distinct, lengths), minlength=len(distinct))


def _padded(distinct: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[D, D] padded tokens of all rows of the lengths i .. j when they share width j; infinite where i > j."""
    rows_before = np.concatenate([[0], np.cumsum(rows)])  # [D + 1]
    between = rows_before[None, 1:] - rows_before[:-1, None]  # [D, D] rows of the lengths i .. j
    is_range = np.tri(len(distinct), dtype=bool).T
    return np.where(is_range, between * distinct[None], np.inf)
