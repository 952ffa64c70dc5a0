"""More than two models: one scale for all, from who beats whom (Bradley and Terry 1952).

Each model has a strength, and beats another with the chance 1 / (1 + exp(its strength - own strength)). A person reads
no strengths: what is given is the share of wins to expect against the others, each as often as the next.

Half a win for each side is added to every pair. A model that won everything would otherwise be infinitely strong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxtune.evaluate.statistics.proportions import CONFIDENCE, Interval
from mlxtune.evaluate.statistics.resampling import SEED

ADDED = 0.5  # wins of each side of every pair
DRAWS = 1_000  # of the bootstrap over prompts
CLOSE = 1e-10  # a relative change of strengths after which they are taken as found
MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Rank:
    """One model among the others."""

    share: float  # of wins to expect against the others; a tie is half a win
    interval: Interval  # of it, 95%, over prompts drawn again
    wins: float  # as counted, over all prompts and others; a tie is half a win


def ranking(wins: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> list[Rank]:
    """The models in the order given. wins: [prompts, models, models]: 1 where the row's model beats the column's on a
    prompt, 0.5 for a tie, 0 else; both 0 where the pair was not compared. At least one prompt and two models.
    """
    prompts = len(wins)
    found = shares(wins.sum(axis=0)[None])[0]
    random = np.random.default_rng(seed)
    # How often each prompt is drawn: [draws, prompts].
    often = np.stack([np.bincount(random.integers(prompts, size=prompts), minlength=prompts) for _ in range(draws)])
    again = shares(np.einsum("dp,pij->dij", often, wins))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(again, [tail, 1 - tail], axis=0)
    counted = wins.sum(axis=(0, 2))
    return [
        Rank(float(found[model]), (float(low[model]), float(high[model])), float(counted[model]))
        for model in range(wins.shape[1])
    ]


def shares(wins: np.ndarray) -> np.ndarray:
    """[draws, models] expected shares of wins. wins: [draws, models, models] counts.

    Hunter's iteration (2004): a strength is a model's wins over the sum of games / (own + other's strength).
    """
    models = wins.shape[1]
    others = ~np.eye(models, dtype=bool)
    wins = np.where(others, wins + ADDED, 0.0)
    games = wins + wins.transpose(0, 2, 1)
    strength = np.ones(wins.shape[:2])
    for _ in range(MOST_ROUNDS):
        both = strength[:, :, None] + strength[:, None, :]
        new = wins.sum(axis=2) / (games / both).sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        moved = np.abs(new / strength - 1).max()
        strength = new
        if moved < CLOSE:
            break
    chance = strength[:, :, None] / (strength[:, :, None] + strength[:, None, :])
    result: np.ndarray = np.where(others, chance, 0.0).sum(axis=2) / (models - 1)
    return result
