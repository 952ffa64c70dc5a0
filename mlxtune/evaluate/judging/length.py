"""How much of a preference is one for length.

Judges like long answers. Beside the raw win rate stand three figures:

- the share of decided pairs that the longer answer wins;
- the win rate at equal length: the preference, as it depends on how much longer the tuned answer is, by a logistic
  curve, read off where the difference is none;
- the win rate of the pairs whose lengths are within CLOSE of each other, where there are any.

The curve's term, tanh of the difference over its spread, is that of Dubois et al. (arXiv 2404.04475). The result is not
AlpacaEval's "length-controlled" rate, which needs its own 805 prompts and their difficulties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.evaluate.judging.verdicts import PairVerdict

CLOSE = 0.2  # of the longer answer, by which the lengths of a close pair differ at most
# What holds level and slope of the curve down. Where the longer answer always wins the slope is infinite without it,
# and the level any: 1 is worth some four more pairs that are even, so that it claims little rather than much.
RIDGE = (1.0, 0.01)
CONVERGED = 1e-9  # change of a coefficient after which the curve is found
MOST_ROUNDS = 200


@dataclass(frozen=True)
class LengthEffect:
    """How length goes with preference."""

    longer_wins: float | None  # share of decided pairs of different lengths; None: there is none
    equal_length: float | None  # win rate read off the curve; None: all differences in length are the same
    close: float | None  # win rate of close pairs; None: there is none
    close_pairs: int  # how many these are

    def as_json(self) -> dict[str, Any]:
        facts = {"longer_wins": self.longer_wins, "equal_length": self.equal_length}
        return {**facts, "close": self.close, "close_pairs": self.close_pairs}


def length_effect(verdicts: Sequence[PairVerdict]) -> LengthEffect:
    """Of verdicts that have not failed. Lengths are those of the texts, in characters."""
    base = np.array([len(verdict.pair.base) for verdict in verdicts], float)
    tuned = np.array([len(verdict.pair.tuned) for verdict in verdicts], float)
    preferences = np.array([verdict.preference for verdict in verdicts], float)
    longer = decided = 0
    for verdict, more in zip(verdicts, tuned - base, strict=True):
        if verdict.outcome != "tie" and more != 0:
            decided += 1
            longer += (verdict.outcome == "win") == (more > 0)
    close = np.abs(tuned - base) <= CLOSE * np.maximum(tuned, base)
    return LengthEffect(
        longer_wins=longer / decided if decided else None,
        equal_length=at_equal_length(tuned - base, preferences),
        close=float(preferences[close].mean()) if close.any() else None,
        close_pairs=int(close.sum()),
    )


def at_equal_length(longer: np.ndarray, preferences: np.ndarray) -> float | None:
    """The preference where a logistic curve has no difference in length. None where the differences are all the same.

    longer: [n] by how much the tuned answers are longer; preferences: [n] for the tuned answers, 0 to 1.

    preference = 1 / (1 + exp(-(level + slope * tanh(longer / spread)))), by reweighted least squares with a ridge.
    """
    spread = longer.std() if len(longer) else 0.0
    if spread == 0:
        return None
    terms = np.stack([np.ones_like(longer), np.tanh(longer / spread)], axis=1)  # [n, 2]
    ridge = np.array(RIDGE)
    level_and_slope = np.zeros(2)
    for _ in range(MOST_ROUNDS):
        fitted = 1 / (1 + np.exp(-terms @ level_and_slope))
        weights = np.maximum(fitted * (1 - fitted), 1e-9)
        gradient = terms.T @ (preferences - fitted) - ridge * level_and_slope
        curvature = terms.T @ (terms * weights[:, None]) + np.diag(ridge)
        step = np.clip(np.linalg.solve(curvature, gradient), -1, 1)
        level_and_slope = level_and_slope + step
        if np.abs(step).max() < CONVERGED:
            break
    return float(1 / (1 + np.exp(-level_and_slope[0])))
