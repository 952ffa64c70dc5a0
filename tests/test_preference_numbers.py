"""The numbers of runs on preferences against formulas written out, and one run on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import on_preferences
import preferences
import pytest
from on_preferences import numbers, of_kind
from test_ranks import Group, two

from mlxtune.adapter import adapter_files
from mlxtune.compute.preference.objectives import Settings
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import collate
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.rows.sides import Side
from mlxtune.model.load import load
from mlxtune.train import events
from mlxtune.train.preference.mismatched import Mismatched
from mlxtune.train.preference.tally import Tally
from mlxtune.train.ranks import Ranks
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder

BETA, SFT, GOOD = 0.1, 0.5, 2.0


def log_probabilities(model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
    """[N] of the supervised tokens of each, one example at a time."""
    found = []
    for example in examples:
        ids = mx.array(np.array(example.ids, np.int32))
        logits = model(ids[None, :-1])[0].astype(mx.float32)
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        of_targets = np.array(mx.take_along_axis(log_p, ids[1:, None], axis=-1))[:, 0]
        found.append(float((of_targets * np.array(example.mask)[1:]).sum()))
    return np.array(found)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def of_dpo(train: Examples, ratio: np.ndarray, policy: np.ndarray) -> dict[str, float]:
    """The fields of a step on all pairs. ratio: [N] log p over that of the reference; policy: [N] log p."""
    chosen = train.sides == Side.CHOSEN
    margin = BETA * (ratio[chosen] - ratio[~chosen])
    tokens = train.targets[chosen].sum()
    return {
        "loss": -np.log(sigmoid(margin)).mean() - SFT * policy[chosen].sum() / tokens,
        "margin": margin.mean(),
        "accuracy": (margin > 0).mean(),
        "reward_chosen": BETA * ratio[chosen].mean(),
        "reward_rejected": BETA * ratio[~chosen].mean(),
        "drift": -ratio[chosen].sum() / tokens,
    }


def of_kto(train: Examples, ratio: np.ndarray, mismatched: np.ndarray) -> dict[str, float]:
    """mismatched: [R] the ratio of each prompt with another row's answer."""
    good = train.sides == Side.GOOD
    baseline = max(0.0, mismatched.mean())
    ahead = BETA * (ratio - baseline) * np.where(good, 1, -1)
    return {
        "loss": (np.where(good, GOOD, 1) * (1 - sigmoid(ahead))).mean(),
        "margin": BETA * (ratio[good].mean() - ratio[~good].mean()),
        "accuracy": (ahead > 0).mean(),
        "reward_chosen": BETA * ratio[good].mean(),
        "reward_rejected": BETA * ratio[~good].mean(),
        "drift": -ratio[good].sum() / train.targets[good].sum(),
        "baseline": baseline,
    }


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_steps_numbers_are_those_of_the_formulas(objective: str, mlx_model: Path, tmp_path: Path) -> None:
    """The third step of a run whose steps take all rows; of its weights before it, and of the base."""
    rows = on_preferences.rated if objective == "kto" else on_preferences.pairs
    own = "good_weight=2" if objective == "kto" else "sft=0.5"
    data, run = on_preferences.write(tmp_path / "data", rows(6), rows(2, 6)), tmp_path / "run"
    settings = (f"preference.loss={objective}", f"preference.{own}", "train.steps=3", "train.save_every=1")
    found = on_preferences.tune(mlx_model, data, run, *settings, "train.batch_rows=3", "train.keep_last=3")
    config = RunFolder(run).config()
    train = read_data(config)[0].train
    base, loaded = load(str(mlx_model), "float32"), load(str(mlx_model), "float32")
    before = run / "checkpoints" / "step-0000002"
    (before / adapter_files.CONFIG_FILE).write_bytes((run / adapter_files.CONFIG_FILE).read_bytes())
    adapter_files.load_adapter(loaded.model, before, loaded.config)

    def ratio(examples: Sequence[Any]) -> np.ndarray:
        return log_probabilities(loaded.model, examples) - log_probabilities(base.model, examples)

    if objective == "kto":
        expected = of_kto(train, ratio(train), ratio(Mismatched(train, config.train.seed)))
        assert expected["baseline"] > 0
    else:
        expected = of_dpo(train, ratio(train), log_probabilities(loaded.model, train))
    step = of_kind(found, "train")[2]
    assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "accuracy"),
    [
        (Settings("dpo", BETA), 0.0),
        (Settings("dpo", BETA, length_normalised=True), 1.0),
        (Settings("ipo", BETA), 1.0),
        (Settings("apo", BETA), 0.0),
    ],
)
def test_a_pair_is_told_apart_by_what_its_objective_compares(settings: Settings, accuracy: float) -> None:
    """The chosen answer gained 3 nats in 10 tokens, the rejected one 4 in 40: more as a whole, and less per token. The
    rewards are TRL's, of whole answers.
    """
    batch = preferences.of_pairs(preferences.examples([(5, 10, 40)]))
    reference = np.array([-20.0, -80.0])
    tally = Tally()
    tally.add(settings, batch, reference + np.array([3.0, 4.0]), reference, baseline=0.0, rounding=1e-3)
    expected = {"accuracy": accuracy, "margin": -0.1, "reward_chosen": 0.3, "reward_rejected": 0.4, "drift": -0.3}
    assert tally.said(settings, of_pairs=True) == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_compute_the_numbers_of_one(objective: str, mlx_model: Path, tmp_path: Path) -> None:
    """Steps of two micro-batches, and of one that is divided between pairs."""
    rows = on_preferences.rated if objective == "kto" else on_preferences.pairs
    data = on_preferences.write(tmp_path / "data", rows(6), rows(3, 6))
    sizes = ("train.batch_rows=3", "train.accumulate=1") if objective == "dpo" else ("train.batch_rows=3",)
    settings = (f"preference.loss={objective}", "train.epochs=2", "train.eval_every=1", *sizes)
    one = on_preferences.tune(mlx_model, data, tmp_path / "one", *settings)
    said = two(tmp_path, *on_preferences.options(mlx_model, data, tmp_path / "two", *settings))
    assert "2 processes" in said and "Traceback" not in said, said
    other = events.read(tmp_path / "two")
    np.testing.assert_allclose(numbers(other), numbers(one), rtol=1e-4, atol=1e-5)
    held_out = [[event["loss"], event["accuracy"], event["margin"]] for event in of_kind(one, "eval")]
    shared = [[event["loss"], event["accuracy"], event["margin"]] for event in of_kind(other, "eval")]
    np.testing.assert_allclose(shared, held_out, rtol=1e-4, atol=1e-5)
    kept = [on_preferences.values(run) for run in (tmp_path / "one", tmp_path / "two")]
    for name, values in kept[0].items():
        np.testing.assert_allclose(kept[1][name], values, rtol=1e-5)


@pytest.mark.parametrize("of_run", [None, 0])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_pair_is_never_divided_between_processes(size: int, of_run: int | None) -> None:
    """Four pairs of one micro-batch, the second with two examples of its chosen answer; some beginnings are shared."""
    chosen, rejected = Side.CHOSEN, Side.REJECTED
    sides = [chosen, rejected, chosen, chosen, rejected, chosen, rejected, chosen, rejected]
    draw = np.random.default_rng(1)
    rows = [[*range(40 * (place // 5), 40), *draw.integers(50, 99, 3 + place)] for place in range(len(sides))]
    examples = ListedExamples([Example(ids, [0] * (len(ids) - 2) + [1, 1]) for ids in rows], sides)
    batch = collate(examples, range(len(sides)))
    dealt = [part for rank in range(size) for part in Ranks(Group(rank, size)).own_batches([batch], of_run)]
    assert sorted(row for part in dealt for row in part.rows.tolist()) == list(range(len(sides)))
    assert sum(part.pairs for part in dealt) == 4 and len(dealt) > 1
    for part in dealt:
        assert part.answer_sides.tolist() == [chosen, rejected] * part.pairs
