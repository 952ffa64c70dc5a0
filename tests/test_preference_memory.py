"""The memory and the way of a run on preferences: what is predicted, what is chosen, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import on_preferences
import peaks
import pytest
from broken import fail_gradients
from preferences import examples
from test_memory import SIZES
from ways import make

from mlxtune.compute import fast_ways, fit_memory, loss
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.preference.objectives import Settings
from mlxtune.config import resolve as configuration
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.data.rows.sides import Side
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.train.choice import choose
from mlxtune.train.preference.goal import OfSplit, Preference

SIMPO = Preference(Settings("simpo", 2.0), True, OfSplit(None), OfSplit(None), 1e-3)  # without a reference


def pairs(shapes: list[tuple[int, int, int]]) -> ListedExamples:
    return ListedExamples(examples(shapes), [Side.CHOSEN, Side.REJECTED] * len(shapes))


SHAPES = [(130 + 9 * number, 50 + 11 * number, 90 - 7 * number) for number in range(8)]


@pytest.mark.parametrize(
    "settings",
    [
        ("train.batch_rows=1",),
        ("train.batch_rows=4", "train.checkpoint_layers=all"),
        ("train.batch_rows=2", "fast.prefix=off"),
    ],
    ids=str,
)
def test_the_peak_of_pairs_is_within_15_percent_of_the_measured_one(settings: tuple[str, ...]) -> None:
    """The head keeps the gradient of each token's own loss until the answers' weights are known."""
    predicted, measured = peaks.of_step({"model_type": "llama", **SIZES}, settings, pairs(SHAPES), preference=SIMPO)
    assert predicted.total == pytest.approx(measured, rel=0.15)


def test_pairs_are_proven_on_a_pair_and_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(SHAPES[:3])
    config = configuration.load(None, ("data.path=x", "train.batch_rows=2"))
    model = make("llama")
    run = choose(Given(model, {}, mx.float32), config, Plan(rows, config.train, found_sharing(rows)))
    assert run.way.split is not None and run.way.prefix == 0
    assert fast_ways.HEAD_ON_FEW in fast_ways.describe(run.way)

    # A proof of sums that are all one would not see this.
    real = loss.of_inputs
    monkeypatch.setattr(
        loss,
        "of_inputs",
        lambda model, way, inputs, *given: real(model, way, replace(inputs, answer_of=inputs.answer_of * 0), *given),
    )
    run = choose(Given(model, {}, mx.float32), config, Plan(rows, config.train, found_sharing(rows)))
    assert run.way == loss.Way()
    assert any("does not reproduce this model" in note for note in run.notes)


def test_on_a_gpu_answers_are_not_compiled_and_nobody_says_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(backend.policy(), compiled=True)
    monkeypatch.setattr(backend, "policy", lambda: policy)
    config, model = configuration.load(None, ("data.path=x",)), make("llama")
    supervised, _ = fast_ways.fastest_way(model, examples(SHAPES[:2]), config)
    of_answers, _ = fast_ways.fastest_way(model, pairs(SHAPES[:2]), config)
    assert supervised.compiled and not of_answers.compiled
    assert "compiled" not in fast_ways.describe(of_answers)


def test_a_pair_that_fits_in_no_way_is_named_and_half_of_it_would_not_do() -> None:
    rows = pairs([(100, 60, 60), (90, 50, 60)])
    config = configuration.load(None, ("data.path=x", "train.batch_rows=2"))
    sizes = {"model_type": "llama", **SIZES}
    model = peaks.build(sizes)
    plan = Plan(rows, config.train)
    with pytest.raises(UserError, match="even with one pair at a time"):
        fit_memory.fit(Given(model, sizes, mx.float32, limit=1_000_000), loss.Way(prefix=0), config, plan)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_steps_that_do_not_fit_are_divided_between_pairs(checkpointed: bool, mlx_model: Path, tmp_path: Path) -> None:
    """Down to one pair at a time, and where that is too much, with its blocks computed again."""

    def fits(batch: Batch, way: loss.Way) -> bool:
        return len(batch.rows) == 2 and (not checkpointed or way.recompute == 1)

    data = on_preferences.write(tmp_path / "data", on_preferences.pairs(9), on_preferences.pairs(2, first=50))
    settings = ("preference.loss=dpo", "train.steps=3", "train.batch_rows=3", "train.accumulate=1")
    settings += ("train.on_oom=smaller", "preference.sft=0.5")
    enough = on_preferences.tune(mlx_model, data, tmp_path / "enough", *settings)
    with pytest.MonkeyPatch.context() as patch:
        sizes = fail_gradients(patch, 2, fits=fits)  # the first step fits
        divided = on_preferences.tune(mlx_model, data, tmp_path / "divided", *settings)
    assert sizes == [6, *[2] * 6]
    assert len(on_preferences.numbers(enough)) == 3
    for one, other in zip(on_preferences.numbers(divided), on_preferences.numbers(enough), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
