"""The predicted and the measured peak of a training step, in one place."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.memory import prediction
from mlxtune.compute.prefix import forest_of_batch
from mlxtune.compute.trunk_states import RowStates
from mlxtune.config import resolve as configuration
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Plan
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.model.linux_cpu import multiply_densely
from mlxtune.model.load import cast
from mlxtune.train import optim
from mlxtune.train.choice import choose
from mlxtune.train.preference.goal import Preference
from mlxtune.train.step import Job, StepFunction


def examples(count: int = 24, vocabulary: int = 4000, longest: int = 200) -> list[Example]:
    """Rows of 100 to 40 + `longest` tokens, 40 of which they share."""
    draw = np.random.default_rng(0)
    start = draw.integers(3, vocabulary, 40).tolist()
    rows = []
    for index in range(count):
        own = [100 + index, *draw.integers(3, vocabulary, int(draw.integers(60, longest))).tolist()]
        rows.append(Example(start + own, [0] * (40 + len(own) // 2) + [1] * (len(own) - len(own) // 2)))
    return rows


def conversation(turns: int = 8, vocabulary: int = 4000, times: int = 1) -> list[Example]:
    """Each turn of one conversation behind its own prompt: the history so far, then tokens of its own. times: longer
    than 60 tokens to begin with, 40 a turn, and 30 of its own.
    """
    draw = np.random.default_rng(0)
    history = draw.integers(3, vocabulary, 60 * times).tolist()
    rows = []
    for _ in range(turns):
        history += draw.integers(3, vocabulary, 40 * times).tolist()
        own = draw.integers(3, vocabulary, 30 * times).tolist()
        rows.append(Example(history + own, [0] * len(history) + [0, 0] + [1] * (len(own) - 2)))
    return rows


def build(sizes: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of a config.json."""
    module = importlib.import_module(f"mlx_lm.models.{sizes['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(sizes))
    return model


GOES = 3  # of the step whose peak is measured


def of_step(
    sizes: dict[str, Any],
    settings: tuple[str, ...],
    rows: Sequence[Example],
    bits: int = 0,
    dtype: mx.Dtype = mx.float32,
    preference: Preference | None = None,
) -> tuple[prediction.Memory, int]:
    """(the plan of a run, bytes that its heaviest step took). preference: what its rows are trained for."""
    gc.collect()  # models of other tests
    mx.clear_cache()
    before = mx.get_active_memory()
    model = build(sizes)
    cast(model, dtype)
    if bits:
        nn.quantize(model, 32, bits)
        multiply_densely(model)
    resolved = configuration.load(None, ("train.epochs=1", *settings))
    keys = attach.attach(model, AdapterPlan.of(model, resolved.lora), 0)
    mx.eval(model.parameters())
    plan = Plan(rows, resolved.train, found_sharing(rows) if preference and resolved.fast.prefix == "auto" else None)
    chosen = choose(Given(model, sizes, dtype), resolved, plan)
    way, predicted = chosen.way, chosen.memory
    assert isinstance(predicted, prediction.Memory), predicted
    assert (way.split is None) == (resolved.fast.head == "off")
    states = RowStates(model, way, chosen.budget)
    job = Job(model, way, keys, plan, resolved.train, None, None, str, None, None, states=states, preference=preference)  # type: ignore[arg-type]
    step = StepFunction(job, optim.build(resolved.train, model.trainable_parameters()))
    if way.frozen:  # what is kept fills up in the first epoch
        for number in range(1, round(plan.steps / plan.passes) + 1):
            step(number)
    mx.clear_cache()
    mx.reset_peak_memory()
    most = [forest_of_batch(plan.step(number)[0], way.prefix).computed for number in range(1, plan.steps + 1)]
    heaviest = 1 + most.index(max(most))
    # A buffer that a thread lets go of early lowers the peak of one go by up to 4%: the peak is the highest of some.
    for _ in range(GOES):
        step(heaviest)
    return predicted, mx.get_peak_memory() - before
