"""What a step costs beside its arithmetic, in the GPU's way forced on the CPU: operations outside compiled functions,
waits, memory taken ahead, graphs compiled. And that it computes the same.
"""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama
from test_compiled import NEEDS_COMPILER
from test_memory import SIZES, examples
from training import scale_losses
from ways import make, rows

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.bench.waits import waits
from mlxtune.compute import fit_memory, head_loss
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.memory import prediction
from mlxtune.compute.prefix import forest_of_batch
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.data.dataset.batches import Plan
from mlxtune.machine import backend
from mlxtune.model.arrays import named
from mlxtune.train import optim, preparation
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import AHEAD, WRONG, Job, NonFinite, StepFunction

ON_A_GPU = backend.Policy(compiled=True, queued=True, tile=64)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions run as they are: where MLX's compiling is off, its compile gives back what it is given."""
    monkeypatch.setattr(backend, "policy", lambda: ON_A_GPU)


def deep(**changes: Any) -> nn.Module:
    model: nn.Module = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **SIZES, **changes}))
    model.dropout_keys = attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)
    mx.eval(model.parameters())
    return model


def stepping(model: nn.Module, found: list[Any], *settings: str, **options: Any) -> StepFunction:
    """Steps of two micro-batches with the split head, every block checkpointed."""
    chosen = ("train.batch_rows=2", "train.accumulate=2", "train.lr=3e-3", "data.path=x", *settings)
    config = configuration.load(None, chosen)
    compiled = backend.policy().compiled
    way = Way(Split.of(model, mx.array([found[0].ids[:8]])), recompute=1, compiled=compiled)
    place, identity = "row {}".format, SimpleNamespace(config={"train.dtype": "float32"})
    plan = Plan(found, config.train)
    job = Job(model, way, model.dropout_keys, plan, config.train, Path(), None, place, identity, None, **options)  # type: ignore[arg-type]
    return StepFunction(job, optim.build(config.train, model.trainable_parameters()))


def small(*settings: str, **options: Any) -> StepFunction:
    return stepping(make("llama"), rows(0, [12, 9, 4, 15, 7, 11, 5, 8]), *settings, **options)


def operations(trees: Any) -> int:
    """How many are pending."""
    text = io.StringIO()
    mx.export_to_dot(text, *[array for _, array in tree_flatten(trees) if isinstance(array, mx.array)])
    return text.getvalue().count("shape=rectangle")


def test_a_step_of_thirty_blocks_has_under_a_hundred_operations_outside_compiled_functions(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes into a compiled function or an evaluation is counted; what comes out of one is computed."""
    pending: list[int] = []
    evaluate = mx.eval

    def counted(*trees: Any) -> None:
        pending.append(operations(trees))
        evaluate(*trees)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted(*args)
            found = function(*args)
            evaluate(found)
            return found

        return call

    monkeypatch.setattr(mx, "compile", compiled)
    step = stepping(deep(num_hidden_layers=30, hidden_size=32, head_dim=8, intermediate_size=32), rows(0, [9, 6, 9, 6]))
    step(1)
    step(1)  # signatures are compiled at their second use
    monkeypatch.setattr(mx, "eval", counted)
    monkeypatch.setattr(mx, "async_eval", counted)
    pending.clear()
    step(1)
    assert 0 < sum(pending) <= 100
    assert len(named(step.job.model.trainable_parameters())) == 30 * 7 * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_micro_batch_waits_for_the_device_three_times_at_most(accumulate: int, as_on_a_gpu: None) -> None:
    """Of three blocks, each checkpointed, and four chunks of the head."""
    settings = ("train.batch_rows=4", f"train.accumulate={accumulate}", "train.steps=2")
    step = stepping(deep(num_hidden_layers=3), [example for example in examples() if sum(example.mask) > 64], *settings)
    batches = step.job.plan.step(1)
    assert len(batches) == accumulate and batches[0].targets > 3 * 64
    with waits() as waited:
        step(1)
    assert 0 < len(waited) <= 3 * accumulate, waited


def test_reading_an_array_in_any_way_counts_as_a_wait() -> None:
    import numpy as np

    array = mx.array([1.5])
    with waits() as waited:
        mx.eval(array)
        found = [array.item(), array.tolist()[0], float(array), bool(array), np.array(array)[0], np.asarray(array)[0]]
        np.array([1.0])
    assert waited == ["eval", "item", "tolist", "__float__", "__bool__", "array", "asarray"]
    assert found == [1.5, 1.5, 1.5, True, 1.5, 1.5]


def peak_of(step: StepFunction) -> int:
    """Bytes, of the step with the largest micro-batch."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory() - sum(array.nbytes for array in named(step.job.model.parameters()).values())
    before -= sum(array.nbytes for array in named(step.optimizer.state).values())
    mx.reset_peak_memory()
    step(max(range(1, step.job.plan.steps + 1), key=lambda number: step.job.plan.step(number)[0].ids.size))
    return mx.get_peak_memory() - before


def test_queued_work_takes_no_more_memory_than_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide head, whose chunks would be allocated ahead of each other. Within what predictions are tested to."""
    sizes = {**SIZES, "vocab_size": 16384, "num_hidden_layers": 2}
    model = deep(**sizes)
    settings = ("train.batch_rows=4", "train.epochs=1", "train.checkpoint_layers=all", "fast.prefix=off")
    config = configuration.load(None, settings)
    plan = Plan(examples(), config.train)
    way = Way(Split.of(model, mx.array([plan.examples[0].ids[:8]])), recompute=1)
    predicted = fit_memory.predict_run(
        fit_memory.Given(model, {"model_type": "llama", **sizes}, mx.float32), way, config, plan
    )
    assert predicted is not None
    monkeypatch.setattr(backend, "policy", lambda: backend.Policy(compiled=False, queued=True, tile=1))
    limit = mx.set_memory_limit(1 << 40)
    mx.set_memory_limit(limit)
    queued = peak_of(stepping(model, examples(), *settings, predicted=predicted.total))
    assert queued == pytest.approx(predicted.total, rel=0.15)
    assert mx.set_memory_limit(limit) == limit


def test_a_run_holds_its_queue_to_what_is_predicted_for_it(mlx_model: Path, data: Path) -> None:
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    found, settings = read_data(configuration.load(None, ("train.batch_rows=2",), flags))
    prepared = preparation.prepare(settings, found, RunFolder(Path()))
    planned = preparation.plan(prepared.config, found)
    assert planned.memory is not None and prepared.job.predicted == planned.memory.total > 0


def test_a_prediction_that_was_far_too_low_holds_nothing_up(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 10_000)
    near, far = small(predicted=10_000), small(predicted=int(10_000 / WRONG) - 1)
    for step in (near, far):
        step._judge_prediction(before=10_000)  # an evaluation or a proof raised it, not the step
        assert step._queued_bytes() is not None
        step._judge_prediction(before=9_999)
    assert near._queued_bytes() == AHEAD * 10_000 and far._queued_bytes() is None
    assert small()._queued_bytes() is None


def test_steps_queued_as_on_a_gpu_have_the_bits_of_steps_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled up targets and other chunks aside, which are of compiled functions and of tiles."""
    waiting = small()
    found = [waiting(number)["loss"] for number in (1, 2, 3)]
    monkeypatch.setattr(backend, "policy", lambda: backend.Policy(compiled=False, queued=True, tile=1))
    queued = small()
    assert [queued(number)["loss"] for number in (1, 2, 3)] == found
    same(named(queued.optimizer.state), named(waiting.optimizer.state))


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and mx.array_equal(array, other[name]), name


def test_nothing_is_updated_by_a_step_that_is_not_finite_and_its_rows_are_named(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two micro-batches; the optimizer's state is that of the step before, to the bit."""
    scale_losses(monkeypatch, lambda count: math.nan if count == 4 else 1.0)
    step = small()
    step(1)
    model, state = (named(tree) for tree in (step.job.model.trainable_parameters(), step.optimizer.state))
    with pytest.raises(NonFinite, match=r"is not finite in float32 \(nan\)") as refused:
        step(2)
    rows_of = [", ".join(f"row {row}" for row in batch.rows) for batch in step.job.plan.step(2)]
    assert str(refused.value).endswith(f"rows in the step: {rows_of[1]}")
    same(named(step.job.model.trainable_parameters()), model)
    same(named(step.optimizer.state), state)


def test_the_norm_is_that_of_all_gradients_and_0_never_scales() -> None:
    """3-4-12-13: the length of (3, 4, 12) is 13."""
    gradients = {"a": mx.array([[3.0], [4.0]]), "b": [mx.array([12.0])]}
    for limit, scale in ((0, 1), (6.5, 0.5), (13.1, 1), (1e9, 1)):
        clipped, norm = optim.clip(gradients, limit)
        assert norm.item() == 13
        assert named(clipped)["b.0"].item() == pytest.approx(12 * scale, rel=1e-6)
        assert named(clipped)["a"].tolist() == [[pytest.approx(3 * scale)], [pytest.approx(4 * scale)]]
    broken = {"a": mx.array([3.0, float("inf")])}
    assert [optim.clip(broken, limit)[1].item() for limit in (0, 1)] == [float("inf")] * 2


@pytest.mark.parametrize("clip", ["0", "0.01"])
def test_the_update_is_that_of_mlx_optimizers_and_changes_nothing_in_place(clip: str) -> None:
    """Three steps against AdamW's own `update`, in float32 and, for a trained layer, in bfloat16."""
    model = make("llama")
    model.model.norm.weight = model.model.norm.weight.astype(mx.bfloat16)
    model.model.norm.unfreeze()
    section = configuration.load(None, ("train.weight_decay=0.1", f"train.clip_norm={clip}", "data.path=x")).train
    theirs = make("llama")
    theirs.update(model.parameters())
    theirs.model.norm.unfreeze()
    ours = optim.build(section, model.trainable_parameters())
    own = optimizers.AdamW(section.lr, weight_decay=section.weight_decay, bias_correction=True)
    update = optim.Update(ours, section.clip_norm)
    for number in (1, 2, 3):
        size = 100 * number
        gradients = tree_map(lambda p, size=size: (size * (p + 1)).astype(p.dtype), model.trainable_parameters())
        held = lambda: {**named(model.trainable_parameters()), **named(ours.state)}  # noqa: E731
        before = held()
        copies = {name: mx.array(array) for name, array in before.items()}
        parameters, state, norm = update(gradients, model.trainable_parameters(), 77, number * 1e-3)
        mx.eval(parameters, state)
        same(before, copies)
        assert all(held()[name] is array for name, array in before.items())
        model.update(parameters)
        ours.state = state
        divided, expected = optim.clip(tree_map(lambda g: g / 77, gradients), section.clip_norm)
        own.learning_rate = number * 1e-3
        own.update(theirs, divided)
        assert norm.item() == expected.item()
        same(named(model.trainable_parameters()), named(theirs.trainable_parameters()))
        same(named(ours.state), named(own.state))


@NEEDS_COMPILER
def test_a_compiled_update_is_traced_once_and_a_resumed_run_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Really compiled. Rates, norms and numbers of targets differ; a checkpoint's tensors come in another order."""
    plain = small("train.clip_norm=0.1", "train.weight_decay=0.1")
    expected = [plain(number)["loss"] for number in range(1, 5)]
    traced: list[float] = []
    clip = optim.clip
    monkeypatch.setattr(optim, "clip", lambda tree, limit: traced.append(limit) or clip(tree, limit))
    monkeypatch.setattr(backend, "policy", lambda: backend.Policy(compiled=True, queued=True, tile=64))
    monkeypatch.setattr(Way, "compiled", False)
    mx.enable_compile()
    try:
        whole = small("train.clip_norm=0.1", "train.weight_decay=0.1")
        found = [whole(number)["loss"] for number in (1, 2)]
        resumed = small("train.clip_norm=0.1", "train.weight_decay=0.1")
        resumed.job.model.update(tree_unflatten(list(named(whole.job.model.trainable_parameters()).items())))
        resumed.optimizer.state = tree_unflatten(sorted(named(whole.optimizer.state).items()))
        found += [whole(number)["loss"] for number in (3, 4)]
        again = [resumed(number)["loss"] for number in (3, 4)]
    finally:
        mx.disable_compile()
    assert found == pytest.approx(expected, rel=1e-6)
    assert again == found[2:]
    same(named(resumed.optimizer.state), named(whole.optimizer.state))
    assert len(traced) == 2  # of two functions, one each


def test_a_signature_is_compiled_at_its_second_use_and_a_resumed_run_compiles_what_the_whole_one_did(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that every step of a resumed run is computed by the function that computed it in the whole run."""
    # of three signatures in turn, each thrown away again and again
    monkeypatch.setattr(prediction, "kept_signatures", lambda count, ram: 2)
    settings = ("train.epochs=4", "train.batch_rows=2")

    def decided(first: int) -> dict[int, int]:
        """Graphs compiled in each step from `first` on, and how many micro-batches ran compiled."""
        step = small(*settings)
        function, found = step._gradients._compiled_for, {}
        ran: list[Any] = []
        monkeypatch.setattr(
            step._gradients,
            "_compiled_for",
            lambda signature, passes: ran.append(signature) or function(signature, passes),
        )
        for number in range(first, step.job.plan.steps + 1):
            ran.clear()
            step(number)
            found[number] = len(ran)
        if first == 1:
            micro = [batch for number in found for batch in step.job.plan.step(number)]
            passes = [forest_of_batch(batch, step.job.way.prefix) for batch in micro]
            uses = [step._gradients._signature(*known) for known in zip(micro, passes, strict=True)]
            assert len(set(uses)) < step.traced < sum(found.values()) < len(uses)
        return found

    whole = decided(1)
    assert whole[1] == 0 and sum(whole.values()) > 0
    for first in (2, 5, 7):
        assert decided(first) == {number: count for number, count in whole.items() if number >= first}


@pytest.mark.parametrize(
    ("width", "vocabulary", "on_cpu", "on_gpu", "saving"),
    [
        (4096, 128256, 130, 128, 65),
        (2560, 151936, 110, 128, 64),
        (576, 49152, 144, 128, 72),
        (256, 320, 64, 64, 64),
        (4096, 32000, 524, 512, 262),
    ],
    ids=["Llama-3.1", "Qwen3", "SmolLM2", "tiny", "Mistral"],
)
def test_chunks_of_the_head_are_whole_tiles_on_a_gpu(
    width: int, vocabulary: int, on_cpu: int, on_gpu: int, saving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest number of them: at most a third more memory than asked for; half where memory is to be saved."""
    assert head_loss.chunk_rows(width, vocabulary) == on_cpu
    assert head_loss.chunk_rows(width, vocabulary, saving=True) == saving
    monkeypatch.setattr(backend, "policy", lambda: ON_A_GPU)
    assert head_loss.chunk_rows(width, vocabulary) == on_gpu
    for size in range(1000, 300_000, 997):
        assert head_loss.chunk_rows(8192, size) % 64 == 0
        assert head_loss.chunk_rows(8192, size) * size * 4 <= max(64 * size * 4, head_loss.CHUNK_BYTES * 4 / 3)
