"""A model's activations in float32 for a while: the same model, and afterwards the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from ways import BATCH, SHAPES, make

from mlxtune.adapter.layers import trained_in_full
from mlxtune.compute import proof
from mlxtune.compute.loss import Way
from mlxtune.compute.precision import copies, in_float32
from mlxtune.model.arrays import named


def base_in(dtype: mx.Dtype, kind: str, bits: int = 0) -> nn.Module:
    model = make(kind, dtype, bits)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(
    ("kind", "dtype", "bits"),
    [("llama", mx.bfloat16, 0), ("gemma3_text", mx.float16, 4), ("qwen2", mx.float16, 0), ("gpt_oss", mx.bfloat16, 0)],
    ids=str,
)
def test_the_model_computes_as_if_it_had_been_cast(kind: str, dtype: mx.Dtype, bits: int, recompute: int) -> None:
    model = base_in(dtype, kind, bits)
    with in_float32(model):
        assert model(mx.array(BATCH.ids)).dtype == mx.float32
        value, gradients = proof.sums_of(model, Way(recompute=recompute), BATCH)
    model.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    expected, wanted = proof.sums_of(model, Way(recompute=recompute), BATCH)
    assert value == expected
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


def test_every_parameter_is_the_same_array_after_also_when_the_work_failed() -> None:
    model = base_in(mx.bfloat16, "llama")
    model.model.embed_tokens = trained_in_full(model.model.embed_tokens, mx.bfloat16)
    before = {name: id(array) for name, array in named(model.parameters()).items()}
    kinds = [type(block) for block in model.layers]
    with pytest.raises(ZeroDivisionError), in_float32(model):
        assert model.model.embed_tokens(mx.array([3])).dtype == mx.float32
        assert [type(block) for block in model.layers] != kinds
        mx.eval(model(mx.array(BATCH.ids)))
        raise ZeroDivisionError
    assert {name: id(array) for name, array in named(model.parameters()).items()} == before
    assert [type(block) for block in model.layers] == kinds
    assert model.model.embed_tokens(mx.array([3])).dtype == mx.bfloat16


def test_the_copies_are_those_of_frozen_16_bit_numbers() -> None:
    model = base_in(mx.bfloat16, "llama")
    outside, blocks = copies(model)
    assert outside == 4 * (2 * 320 * 64 + 64)
    assert blocks == 2 * [4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)]
    assert copies(make("llama")) == (0, [0, 0])


def test_the_copies_of_one_block_exist_at_a_time_where_none_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "llama wide", {"num_hidden_layers": 8, "intermediate_size": 1024})
    model = base_in(mx.bfloat16, "llama wide")
    _, blocks = copies(model)

    def peak(work: Callable[[], Any]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with in_float32(model):
            work()
        return mx.get_peak_memory() - before

    row = BATCH.part(slice(1))
    assert peak(lambda: proof.plain_sums(model, row)) > sum(blocks)
    for work in (lambda: proof.plain_sums(model, row, checkpointed=True), lambda: mx.eval(model(mx.array(row.ids)))):
        assert peak(work) < sum(blocks) / 2  # activations take more than the copies of one of eight
