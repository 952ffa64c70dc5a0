"""What a step of preference tuning minimizes: the sum of its pairs' losses (or of its rated answers'), divided once by
their number over the whole step.

Three pairs in micro-batches of two and one, with the losses 0.9, 0.5 and 0.1 and `preference.sft` 0.5, where the chosen
answers have 10, 20 and 30 tokens of 2 nats each:

    first micro-batch     0.9 + 0.5    and 0.5 * (20 + 40) * 3 / 60
    second                0.1          and 0.5 * 60 * 3 / 60
    the step              (1.5 + 3.0) / 3 = 1.5      0.5 a pair, and half of 2 nats a token

The scale 3 / 60 (pairs over tokens of the step) makes of the chosen answers' own losses a mean over tokens, though all
is divided by pairs. Both are known before anything is computed, so however the step is cut, the sum is the same.

Legend: A answers of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtune.compute.gradients import Gradients
from mlxtune.compute.preference.batch_value import Value
from mlxtune.compute.preference.objectives import Settings
from mlxtune.config.preference import WITHOUT_REFERENCE, PreferenceSection
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.rows.sides import Side
from mlxtune.model.arrays import scalar, to_numpy
from mlxtune.train.preference.known import Known
from mlxtune.train.preference.mismatched import Mismatched
from mlxtune.train.preference.tally import Tally
from mlxtune.train.ranks import ALONE, Ranks

Forward = Callable[[Batch], np.ndarray]  # a batch -> [A] float32, the log-probabilities of its answers


@dataclass(frozen=True)
class OfSplit:
    """The answers of one split before the first step."""

    known: Known | None  # under the reference; None: the objective has none
    mismatched: Mismatched | None = None  # kto's examples; None: there is no baseline
    known_mismatched: Known | None = None  # of those, under the reference


@dataclass(frozen=True)
class Preference:
    """What a run on preferences works with beside its rows."""

    settings: Settings  # the objective
    of_pairs: bool  # rows are pairs; else they are rated answers
    train: OfSplit  # the training rows
    valid: OfSplit  # the held-out rows
    rounding: float  # relative: what two computations of one log-probability may differ by
    is_kept: bool = False  # the folder of the run has the reference already


def settings_of(section: PreferenceSection) -> Settings:
    """The objective as it is configured."""
    assert section.loss
    return Settings(
        objective=section.loss,
        beta=section.resolved_beta,
        gamma=section.resolved_gamma,
        label_smoothing=section.label_smoothing,
        length_normalised=section.length_normalised,
        good_weight=section.good_weight,
        bad_weight=section.bad_weight,
        sft=section.sft,
    )


def counted(batches: Sequence[Batch], of_pairs: bool) -> int:
    """What a loss over these batches is divided by: their pairs, or their rated answers."""
    return sum(batch.pairs if of_pairs else batch.answers for batch in batches)


def chosen_tokens(batches: Sequence[Batch]) -> int:
    """Supervised tokens of the chosen answers."""
    return sum(int(batch.answer_tokens[batch.answer_sides == Side.CHOSEN].sum()) for batch in batches)


@dataclass
class Goal:
    """Of the rows of one step, or of all held-out ones: their loss and their numbers."""

    preference: Preference  # of the run
    split: OfSplit  # that the rows are of
    divisor: int  # pairs or rated answers, of all processes
    sft_scale: float  # what makes chosen answers' summed losses a mean over tokens, once divided by `divisor`
    baseline: float = 0.0  # kto's, nats
    # Micro-batches of this process, and [A] what their answers summed to: minus their log-probabilities.
    _computed: list[tuple[Batch, mx.array]] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, preference: Preference, split: OfSplit, batches: Sequence[Batch], ranks: Ranks = ALONE) -> Goal:
        """batches: all of the rows; or of several `ranks`, this process's part."""
        divisor, tokens = ranks.sum_numbers(counted(batches, preference.of_pairs), chosen_tokens(batches))
        scale = divisor / tokens if preference.settings.weight_of_own_loss else 0.0
        return cls(preference, split, round(divisor), scale)

    # The baseline, before anything else.

    @property
    def has_baseline(self) -> bool:
        return self.split.mismatched is not None

    def mismatched(self, batch: Batch) -> Batch:
        """The example of each answer of a batch in which its prompt has another row's answer."""
        assert self.split.mismatched is not None
        return self.split.mismatched.beside(batch)

    def likelier(self, others: Batch, forward: Forward) -> float:
        """Nats by which mismatched answers became likelier than under the reference, summed.

        others: as `mismatched` gives them; forward: computes log-probabilities as the model is now.
        """
        known = self.split.known_mismatched
        assert known is not None
        return float((forward(others).astype(np.float64) - known.of(others)).sum())

    def set_baseline(self, total: float) -> None:
        """total: what `likelier` gives of all rows, of all processes. Never below 0, as the divergence that it stands
        for.
        """
        self.baseline = max(0.0, total / self.divisor)

    # The loss of a micro-batch.

    def value(self, batch: Batch) -> Value:
        """What a micro-batch adds to the loss, as a function of its answers' sums [A]."""
        return Value.of(self.preference.settings, batch, -self._reference(batch), self.baseline, self.sft_scale)

    def gradients(self, gradients: Gradients, batch: Batch) -> tuple[mx.array, Any]:
        """(What a micro-batch adds to the loss, a scalar; the gradients of that, a tree)."""
        value, sums, tree = gradients.of_answers(batch, self.value(batch))
        self._computed.append((batch, sums))
        return value, tree

    def loss_of(self, batch: Batch, log_p: np.ndarray) -> float:
        """What a micro-batch adds to the loss. log_p: [A] nats, of its answers."""
        sums = mx.array(-log_p)
        self._computed.append((batch, sums))
        return scalar(self.value(batch)(sums))

    def _reference(self, batch: Batch) -> np.ndarray:
        """[A] float32; zeros where the objective has none."""
        if self.split.known is None:
            return np.zeros(batch.answers, np.float32)
        return self.split.known.of(batch)

    # The numbers of all rows, after everything else.

    def tally(self, ranks: Ranks) -> Tally:
        """Of the answers of all processes."""
        own = Tally()
        for batch, sums in self._computed:
            preference = self.preference
            reference = self._reference(batch)
            own.add(preference.settings, batch, -to_numpy(sums), reference, self.baseline, preference.rounding)
        return Tally.of(ranks.sum_numbers(*own.numbers()))

    def fields(self, tally: Tally) -> dict[str, float]:
        """The fields of an event. tally: of all processes."""
        found = tally.said(self.preference.settings, self.preference.of_pairs)
        if self.has_baseline:
            found["baseline"] = self.baseline
        return found


def loss_at_start(settings: Settings, of_pairs: bool, tally: Tally) -> float:
    """What the loss is where the model is its own reference: dpo log 2 and so on, and the chosen answers' own loss.

    tally: of the step, of all processes. Of rated answers half of the mean of their weights.
    """
    assert settings.objective not in WITHOUT_REFERENCE
    own = settings.sft * tally.chosen_nats / tally.chosen_tokens if settings.sft else 0.0
    if not of_pairs:
        weighted = settings.good_weight * tally.chosen + settings.bad_weight * tally.rejected
        return weighted / 2 / (tally.chosen + tally.rejected)
    at_start = {"dpo": math.log(2), "ipo": 1 / (4 * settings.beta**2), "apo": 1.0}
    return at_start[settings.objective] + own
