"""What a micro-batch of answers adds to the loss of its step.

Everything is a sum, as in supervised training: the step divides once, by its pairs or rated answers. So micro-batches
add up to the same step whatever they hold. Two pairs of loss 0.7 and 0.5 in one micro-batch, one of 0.3 in another:

    first      0.7 + 0.5
    second     0.3
    step       (1.2 + 0.3) / 3 = 0.5

The chosen answers' own loss (`Settings.sft`) is a mean over all of their tokens in the step. For it to come out of the
same division, what a micro-batch adds is scaled by pairs / tokens of the step, which are known before it is computed:

    step       3 pairs, chosen answers of 10 + 20 + 30 tokens     sft_scale = 3 / 60
    first      a loss of 45 summed over its 30 tokens             + sft * 45 * 3 / 60
    second     of 75 over 30                                      + sft * 75 * 3 / 60
    together   sft * 120 * 3 / 60, and divided by 3               sft * 120 / 60

Legend: A answers of the micro-batch, P pairs, K rated answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxtune.compute.preference.objectives import Answers, Settings, pair_losses, rated_losses
from mlxtune.config.preference import OF_PAIRS, OF_RATED
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.rows.sides import Side


@dataclass(frozen=True)
class Value:
    """Call it with the answers' sums, get what they add to the loss of the step."""

    settings: Settings  # the objective
    sides: np.ndarray  # [A] `Side` of each: pairs one after the other, chosen first; or rated answers
    tokens: np.ndarray  # [A] supervised tokens of each
    reference: np.ndarray  # [A] float32: what `loss.answer_sums` gave for each at step 0; zeros: no reference is needed
    baseline: float = 0.0  # kto: how much likelier answers became, in nats, at least 0
    sft_scale: float = 0.0  # pairs of the step / supervised tokens of its chosen answers; 0: `sft` is 0

    @classmethod
    def of(
        cls,
        settings: Settings,
        batch: Batch,
        reference: np.ndarray | None = None,
        baseline: float = 0.0,
        sft_scale: float = 0.0,
    ) -> Value:
        """Of a micro-batch. reference: [A] as above, None: zeros. Raises ValueError where the objective is not of such
        answers, or where the reference or the scale that it needs is missing.
        """
        sides = batch.answer_sides
        pairs = [Side.CHOSEN, Side.REJECTED] * batch.pairs
        if pairs and sides.tolist() != pairs:
            raise ValueError(f"not chosen and rejected in turn: {sides.tolist()}")
        if settings.objective not in (OF_PAIRS if pairs else OF_RATED):
            raise ValueError(f"{settings.objective} is not of {'pairs' if pairs else 'rated answers'}")
        if reference is None:
            if settings.needs_reference:
                raise ValueError(f"{settings.objective} needs the reference's sums")
            reference = np.zeros(batch.answers, np.float32)
        if pairs and settings.weight_of_own_loss and not sft_scale:
            raise ValueError("the chosen answers' own loss needs its scale")
        return cls(settings, sides, batch.answer_tokens, reference, baseline, sft_scale)

    @property
    def of_pairs(self) -> bool:
        """Whether the answers are pairs, else they are rated."""
        return bool(self.sides[0] == Side.CHOSEN)

    def __call__(self, sums: mx.array) -> mx.array:
        """[A] the answers' summed losses -> a scalar."""
        value = self.losses(sums).sum()
        weight = self.settings.weight_of_own_loss * self.sft_scale
        if self.of_pairs and weight:
            value = value + weight * sums[0::2].sum()
        return value

    def losses(self, sums: mx.array) -> mx.array:
        """[A] -> [P] the loss of each pair, or [K] of each rated answer; without the chosen answers' own loss."""
        answers = Answers(-sums, -_like(sums, self.reference), _like(sums, self.tokens))
        if self.of_pairs:
            return pair_losses(self.settings, _every_second(answers, 0), _every_second(answers, 1))
        return rated_losses(self.settings, mx.array(self.sides == Side.GOOD), answers, self.baseline)


def _like(sums: mx.array, numbers: np.ndarray) -> mx.array:
    """[A] in the type of the sums."""
    return mx.array(numbers, sums.dtype)


def _every_second(answers: Answers, first: int) -> Answers:
    return Answers(answers.policy[first::2], answers.reference[first::2], answers.tokens[first::2])
