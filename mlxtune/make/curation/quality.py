"""How good each row is, from 0 to 1, by whatever scores it.

Scores of different kinds of instruction cannot be compared: a summary is explained by its text far better than a story
by "write a story". So a row's quality is its rank among those of its kind, the best 1 and the worst 0, less what its
faults cost. Four summaries rated by a judge, one of them with a fault, and four by IFD, the border at 0.86
(`strangers`), where rows below it are in an order by chance:

    rating   4.8   4.1    3.9 (cut off)   1.2         IFD      0.31   0.52   0.70   0.97
    rank     1.0   0.67   0.33            0.0         rank     0.33   1.0    0.67   0.0
    quality  1.0   0.67  -0.17            0.0         quality  0.33   1.0    0.67   0.0

So a kind none of whose rows is below the border has its share all the same, of those that come nearest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mlxtune.make.curation.candidates import Candidate

# A fault (`Candidate.faults`) -> the share of a kind's rows that it sets a row back by.
PENALTIES = {
    "cut off": 0.5,
    "copied": 0.5,
    "refusal": 0.25,
    "markup": 0.25,
    "e-mail": 0.25,
}
# Faults with which no row stays, however good its score is.
FATAL = ("empty", "encoding", "secret")
FEW = 10  # rows of a kind below which ranks among them mean little: they are ranked among all rows


def qualities(candidates: Sequence[Candidate], scores: Mapping[str, float]) -> dict[str, float]:
    """The quality of each candidate, by its key. scores: of each, by its key, more is better; equal for all: faults
    alone decide.
    """
    kinds = Counter(candidate.kind for candidate in candidates)
    by_kind: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if kinds[candidate.kind] >= FEW:
            by_kind.setdefault(candidate.kind, []).append(candidate)
    every = _ranks([scores[candidate.key] for candidate in candidates])
    found = {candidate.key: float(rank) for candidate, rank in zip(candidates, every, strict=True)}
    for some in by_kind.values():
        ranks = _ranks([scores[candidate.key] for candidate in some])
        found |= {candidate.key: float(rank) for candidate, rank in zip(some, ranks, strict=True)}
    for candidate in candidates:
        found[candidate.key] -= penalty(candidate)
    return found


def penalty(candidate: Candidate) -> float:
    """What its faults cost a row of its rank."""
    return sum(PENALTIES.get(fault, 0.0) for fault in candidate.faults)


def fatal(candidate: Candidate) -> bool:
    return any(fault in FATAL for fault in candidate.faults)


def _ranks(scores: Sequence[float]) -> np.ndarray:
    """[N] from 0, the lowest score, to 1, the highest; equal scores have one rank, the mean of theirs."""
    values = np.asarray(scores)
    if len(values) < 2:
        return np.ones(len(values))
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means = ends - (counts + 1) / 2  # of the places 0 .. N - 1 that equal scores take
    ranks: np.ndarray = means[where] / (len(values) - 1)
    return ranks
