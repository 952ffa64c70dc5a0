"""The step as one compiled function, as on a GPU: same losses, same gradients, few signatures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from rounding import as_a_gpu
from ways import BATCH, COMMON, assert_close, batch, make, rows, steps, ways

from mlxtune.compute import fast_ways, prefix, proof
from mlxtune.compute.gradients import Gradients, rounded_up
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.memory import prediction
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config import resolve as configuration
from mlxtune.machine import backend
from mlxtune.model.arrays import named

NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture
def compilation() -> Iterator[None]:
    """As on a GPU."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@NEEDS_COMPILER
@pytest.mark.parametrize(("kind", "bits"), [("llama tied", 4), ("gemma3_text", 0), ("mixtral", 0)])
def test_every_way_computes_the_same_inside_one_compiled_function(kind: str, bits: int, compilation: None) -> None:
    model = make(kind, bits=bits)
    for label, way in ways(model, BATCH).items():
        if way.split is not None and not way.powers:  # which are of the CPU alone, where nothing is compiled
            assert_close(model, replace(way, compiled=True), BATCH, 1e-6, 3e-5, label)


@NEEDS_COMPILER
def test_a_compiled_way_is_proven_under_a_gpus_rounding(compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    as_a_gpu(monkeypatch, 3e-6)
    monkeypatch.setitem(COMMON, "num_hidden_layers", 1)
    model = make("llama")
    way = Way(Split.of(model, mx.array(BATCH.ids)), compiled=True)
    assert proof.prove(model, way, BATCH, mx.float32, Room()) == Verdict()


@NEEDS_COMPILER
def test_twenty_compiled_steps_have_the_losses_of_the_plain_loop(
    compilation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = steps("llama", 0, 0.0, Way())
    np.testing.assert_allclose(steps("llama", 0, 0.0, None, compiled=True), plain, rtol=1e-5)
    monkeypatch.setattr(prediction, "kept_signatures", lambda count, ram: 1)  # thrown away and compiled again
    np.testing.assert_allclose(steps("llama", 0, 0.0, None, compiled=True), plain, rtol=1e-5)


def test_a_compiled_function_is_of_one_order_of_rows_where_they_are_fed_what_frozen_blocks_give() -> None:
    """Behind one trunk the rows come by their length, so these two have one shape and two orders. No compiler is
    needed: what a function was made for is in it also where MLX runs it as it is.
    """
    model = make("llama", layers=1)
    way = Way(Split.of(model, mx.array(BATCH.ids)), prefix=0, compiled=True, frozen=1)
    batches = [batch(31, [12, 9, 4]), batch(31, [4, 9, 12])]
    orders = [prefix.forest_of_batch(each, 0).passes[-1].rows for each in batches]
    assert orders == [(2, 1, 0), (0, 1, 2)]
    compiled = Gradients(model, way)
    for each in batches:
        wanted, gradients = Gradients(model, Way())(each)
        value, found = compiled(each)
        assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
        for name, gradient in named(gradients).items():
            difference = mx.linalg.norm(named(found)[name] - gradient)
            assert difference.item() <= 3e-5 * mx.linalg.norm(gradient).item(), name
    assert compiled.traced == 2
    assert compiled.count_use(batches[0]) and len(compiled._compiled) == 2  # an order that comes again is not new


@pytest.mark.parametrize("count", [1, 16, 17, 100, 129, 1000, 5000])
def test_targets_are_filled_up_by_less_than_a_quarter_and_to_few_numbers(count: int) -> None:
    assert count <= rounded_up(count) < max(1.25 * count, count + 16)
    assert len({rounded_up(n) for n in range(1, 5001)}) < 32


def test_on_a_gpu_the_step_is_compiled_unless_rows_see_noise_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "kind", lambda: "metal")

    def wanted(*settings: str) -> Way:
        return fast_ways.fastest_way(make("llama"), rows(17, [12, 9]), configuration.load(None, settings))[0]

    assert wanted().compiled and not wanted().powers
    for setting in ("lora.dropout=0.1", "train.neftune_alpha=5", "fast.head=off"):
        assert not wanted(setting).compiled, setting
