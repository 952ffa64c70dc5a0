"""The numbers of preference tuning, counted pair by pair: means of batches would depend on how rows were dealt.

Of each answer the reward is known, as TRL defines it:

    dpo, ipo, apo, kto    beta (log p - log p under the reference)      0 at step 0; of the whole answer
    simpo, orpo           beta log p per token                          no reference

The objective wants it to be large for a good answer. Two compare it per token, ipo and dpo with `length_normalised`,
and for these a longer answer's reward is no fair measure: the pair

    chosen, 10 tokens, 3 nats likelier      0.3 a token      reward 0.3 (beta 0.1)
    rejected, 40 tokens, 4 nats likelier    0.1 a token      reward 0.4

is told apart as the objective wants it, though its margin is below 0. So the accuracy, by which `train.keep_by` may
choose, follows the objective, and the rewards and their margin stay comparable between objectives.

    reward_chosen     mean over the chosen (or good) answers
    reward_rejected   mean over the rejected (or bad) answers
    margin            the difference of the two
    accuracy          of pairs: the share whose chosen answer has the higher reward (of ipo, and of dpo with
                      `length_normalised`: the higher one per token); ties count half
                      of rated answers: the share that stands on its side of the baseline (of 0 for apo); ties count
                      half
    drift             nats a token by which the chosen (or good) answers became less likely than under the reference;
                      above 0 for many steps, the model leaves the texts that it is shown as good

Sums are kept, so that processes can add theirs up. Legend: A answers of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from mlxtune.compute.preference.objectives import Settings
from mlxtune.config.preference import WITHOUT_REFERENCE
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.rows.sides import Side


@dataclass
class Tally:
    """Sums over answers so far."""

    chosen: float = 0.0  # answers that are chosen or good
    rejected: float = 0.0  # answers that are rejected or bad
    reward_chosen: float = 0.0  # of the first ones
    reward_rejected: float = 0.0  # of the others
    right: float = 0.0  # pairs, or rated answers, that are told apart
    fallen: float = 0.0  # nats by which chosen answers became less likely than under the reference
    chosen_nats: float = 0.0  # the chosen answers' own loss
    chosen_tokens: float = 0.0  # supervised tokens of chosen answers
    apart: float = 0.0  # answers whose log-probability is not the reference's, beyond what rounding does

    def add(
        self,
        settings: Settings,
        batch: Batch,
        log_p: np.ndarray,
        reference: np.ndarray,
        baseline: float,
        rounding: float,
    ) -> None:
        """Count a batch's answers.

        log_p, reference: [A] nats under the model and the reference (zeros where there is none); baseline: of rated
        answers, nats; rounding: relative, what two computations of one log-probability may differ by.
        """
        sides, tokens = batch.answer_sides, batch.answer_tokens
        good = (sides == Side.CHOSEN) | (sides == Side.GOOD)
        reward = rewards(settings, log_p, reference, tokens)
        self.chosen += int(good.sum())
        self.rejected += int((~good).sum())
        self.reward_chosen += float(reward[good].sum())
        self.reward_rejected += float(reward[~good].sum())
        if batch.pairs:
            compared = reward / tokens if compares_per_token(settings) else reward
            ahead = compared[0::2] - compared[1::2]
        else:
            ahead = (reward - settings.beta * baseline) * np.where(good, 1, -1)
        self.right += float((ahead > 0).sum()) + float((ahead == 0).sum()) / 2
        self.chosen_nats -= float(log_p[good].sum())
        self.chosen_tokens += int(tokens[good].sum())
        if settings.objective not in WITHOUT_REFERENCE:
            self.fallen += float((reference - log_p)[good].sum())
            apart = np.abs(log_p - reference) > rounding * np.maximum(1, np.abs(reference))
            self.apart += int(apart.sum())

    def numbers(self) -> list[float]:
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def of(cls, numbers: list[float]) -> Tally:
        """numbers: as `numbers` gives them, or sums of such."""
        return cls(*numbers)

    def said(self, settings: Settings, of_pairs: bool) -> dict[str, float]:
        """The fields of an event. nan: no answer of that kind was there."""
        good = _mean(self.reward_chosen, self.chosen)
        bad = _mean(self.reward_rejected, self.rejected)
        counted = self.chosen if of_pairs else self.chosen + self.rejected
        found = {
            "margin": good - bad,
            "accuracy": _mean(self.right, counted),
            "reward_chosen": good,
            "reward_rejected": bad,
        }
        if settings.objective not in WITHOUT_REFERENCE:
            found["drift"] = _mean(self.fallen, self.chosen_tokens)
        return found


def rewards(settings: Settings, log_p: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[A] the reward of each answer. log_p, reference: [A] nats; tokens: [A] supervised ones."""
    if settings.objective in WITHOUT_REFERENCE:
        return settings.beta * log_p / tokens
    return settings.beta * (log_p - reference)


def compares_per_token(settings: Settings) -> bool:
    """Whether the objective compares what each answer gained per token, though its reward is of the whole answer."""
    return settings.objective == "ipo" or settings.length_normalised


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
