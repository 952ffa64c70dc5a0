"""What objectives make of the answers' sums: at step 0, at their ends, in parts of a step, and what they refuse."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from preferences import examples, of_pairs, of_rated
from ways import make

from mlxtune.compute import proof
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.preference.batch_value import Value
from mlxtune.compute.preference.objectives import Objective, Settings, _log_odds
from mlxtune.config.preference import OF_PAIRS, OF_RATED
from mlxtune.data.dataset.batches import Batch

PAIRS = of_pairs(examples([(20, 5, 9), (31, 12, 7), (25, 3, 4), (18, 9, 9)]))
RATED = of_rated(examples([(20, 5, 9), (31, 12, 7)]), [True, False, False, True])
SETTINGS = {
    "dpo": Settings("dpo", 0.3),
    "dpo smoothed": Settings("dpo", 0.3, label_smoothing=0.1),
    "dpo normalised": Settings("dpo", 0.3, length_normalised=True),
    "dpo with the chosen answers' own loss": Settings("dpo", 0.3, sft=0.7),
    "ipo": Settings("ipo", 0.3),
    "apo": Settings("apo", 0.3),
    "simpo": Settings("simpo", 2.0, gamma=1.0),
    "orpo": Settings("orpo", 0.3),
}


def sft_scale(batch: Batch) -> float:
    """Of a step that is this batch."""
    return batch.pairs / int(batch.answer_tokens[0::2].sum())


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        (Settings("dpo", 0.3), math.log(2)),
        (Settings("dpo", 0.3, label_smoothing=0.2, length_normalised=True), math.log(2)),
        (Settings("ipo", 0.3), 1 / (4 * 0.3**2)),
        (Settings("apo", 0.3), 1.0),
    ],
)
def test_pairs_begin_with_a_loss_that_is_known(settings: Settings, each: float) -> None:
    """The model is the reference: every margin is 0, whatever the sums are."""
    sums = np.linspace(3, 40, PAIRS.answers).astype(np.float32)
    losses = Value.of(settings, PAIRS, sums).losses(mx.array(sums))
    np.testing.assert_allclose(np.array(losses), each, rtol=1e-6)


@pytest.mark.parametrize("objective", OF_RATED)
def test_rated_answers_begin_with_half_their_weight(objective: Objective) -> None:
    sums = np.linspace(3, 40, RATED.answers).astype(np.float32)
    value = Value.of(Settings(objective, 0.3, good_weight=1.5, bad_weight=0.5), RATED, sums)
    np.testing.assert_allclose(np.array(value.losses(mx.array(sums))), [0.75, 0.25, 0.25, 0.75], rtol=1e-6)


def test_odds_are_exact_near_both_ends() -> None:
    """Of probabilities p: log(p / (1 - p)), its derivative by log p is 1 / (1 - p). Against float64."""
    log_p = np.array([-1e-6, -1e-3, -0.1, -0.6931, -0.6932, -3, -20, -80.0])
    odds, gradient = mx.value_and_grad(lambda x: _log_odds(x).sum())(mx.array(log_p.astype(np.float32)))
    rest = -np.expm1(log_p)
    np.testing.assert_allclose(
        np.array(_log_odds(mx.array(log_p.astype(np.float32)))), log_p - np.log(rest), rtol=2e-6, atol=2e-7
    )
    np.testing.assert_allclose(np.array(gradient), 1 / rest, rtol=2e-6)
    assert np.isfinite(odds.item())


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_add_up_to_the_same_step(name: str) -> None:
    """Four of one pair, two of two, one of four: value and gradients of the whole step."""
    settings, model = SETTINGS[name], make("llama")
    gradients = Gradients(model, Way(Split.of(model, mx.array(PAIRS.ids)), prefix=0))
    reference = np.array(gradients.answer_sums(PAIRS)) + np.linspace(-3, 4, PAIRS.answers).astype(np.float32)

    def step(pairs: int) -> proof.Sums:
        total, summed = 0.0, dict[str, np.ndarray]()
        for first in range(0, PAIRS.answers, 2 * pairs):
            rows = slice(first, first + 2 * pairs)
            value_of = Value.of(settings, PAIRS.part(rows), reference[rows], sft_scale=sft_scale(PAIRS))
            value, _, tree = gradients.of_answers(PAIRS.part(rows), value_of)
            loss, of_part = proof._read(value, tree)
            total += loss
            summed = {key: summed.get(key, 0) + array for key, array in of_part.items()}
        return total, summed

    whole = step(4)
    for pairs in (2, 1):
        difference = proof.difference(step(pairs), whole)
        assert difference.loss <= 1e-6 and difference.gradient <= 3e-6, difference


def test_the_chosen_answers_own_loss_is_a_mean_over_the_tokens_of_the_step() -> None:
    """The example of `batch_value`: 120 nats over 60 tokens and three pairs."""
    batch = of_pairs(examples([(5, 10, 4), (5, 20, 4), (5, 30, 4)]))
    settings = Settings("dpo", 0.1, sft=0.5)
    sums = np.array([20, 9, 25, 9, 75, 9], np.float32)
    scale = sft_scale(batch)
    assert scale == pytest.approx(3 / 60)
    total = 0.0
    for rows in (slice(0, 4), slice(4, 6)):
        total += Value.of(settings, batch.part(rows), sums[rows], sft_scale=scale)(mx.array(sums[rows])).item()
    assert total / 3 == pytest.approx(math.log(2) + 0.5 * 120 / 60, rel=1e-6)


@pytest.mark.parametrize("objective", [*OF_PAIRS, "kto"])
def test_an_objective_refuses_answers_that_it_is_not_of(objective: Objective) -> None:
    sums = np.zeros(PAIRS.answers, np.float32)
    if objective == "kto":
        with pytest.raises(ValueError, match="kto is not of pairs"):
            Value.of(Settings("kto", 0.1), PAIRS, sums)
    elif objective != "apo":
        with pytest.raises(ValueError, match=f"{objective} is not of rated answers"):
            Value.of(Settings(objective, 0.1), RATED, sums[: RATED.answers])


def test_a_reference_or_scale_that_is_missing_is_said() -> None:
    """Without them the loss would be another one, and would look as well."""
    with pytest.raises(ValueError, match="dpo needs the reference"):
        Value.of(Settings("dpo", 0.1), PAIRS)
    for settings in (Settings("orpo", 0.1), Settings("simpo", 2.0, sft=1.0)):
        with pytest.raises(ValueError, match="own loss needs its scale"):
            Value.of(settings, PAIRS)
    Value.of(Settings("simpo", 2.0), PAIRS)
