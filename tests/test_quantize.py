"""Quantized layers on the CPU: the same products and gradients as the dense matrices they stand for."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtune.model.dense import dense_weight
from mlxtune.model.linux_cpu import CpuQuantizedLinear, multiply_densely

MODES = [("affine", 32, 4), ("affine", 64, 8), ("affine", 64, 3), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
@pytest.mark.parametrize("rows", [1, 7])
def test_a_linear_layer_multiplies_and_differentiates_as_its_dense_matrix(
    mode: str, group: int, bits: int, rows: int
) -> None:
    linear = nn.Linear(64, 48, bias=True)
    linear.bias = mx.random.normal((48,), key=mx.random.key(1))
    holder = Holder(linear.to_quantized(group, bits, mode=mode))
    weight = dense_weight(holder.layer)
    multiply_densely(holder)
    assert type(holder.layer) is CpuQuantizedLinear
    x = mx.random.normal((1, rows, 64), key=mx.random.key(2))
    expected = x @ weight.T + linear.bias
    np.testing.assert_allclose(np.array(holder.layer(x)), np.array(expected), atol=1e-5)
    gradient = mx.grad(lambda v: mx.sin(holder.layer(v)).sum())(x)
    reference = mx.grad(lambda v: mx.sin(v @ weight.T + linear.bias).sum())(x)
    np.testing.assert_allclose(np.array(gradient), np.array(reference), atol=1e-5)


@pytest.mark.parametrize("sort", [False, True])
def test_expert_layers_do_too(sort: bool) -> None:
    """Tokens as SwitchGLU passes them: broadcast over the chosen experts, or sorted by expert."""
    dense = SwitchLinear(64, 32, 4, bias=True)
    holder = Holder(dense.to_quantized(32, 4))
    weight = dense_weight(holder.layer)
    multiply_densely(holder)
    if sort:
        x = mx.random.normal((6, 1, 64), key=mx.random.key(2))
        indices = mx.array([0, 0, 1, 2, 3, 3])
    else:
        x = mx.random.normal((2, 3, 1, 1, 64), key=mx.random.key(2))
        indices = mx.array([[[0, 1], [1, 2], [3, 0]], [[2, 2], [0, 3], [1, 3]]])

    def reference(v: mx.array) -> mx.array:
        chosen = weight[indices]  # [..., 32, 64]
        return v @ chosen.swapaxes(-1, -2) + mx.expand_dims(holder.layer.bias[indices], -2)

    layer = holder.layer
    np.testing.assert_allclose(np.array(layer(x, indices, sort)), np.array(reference(x)), atol=1e-5)
    gradient = mx.grad(lambda v: mx.sin(layer(v, indices, sort)).sum())(x)
    np.testing.assert_allclose(
        np.array(gradient), np.array(mx.grad(lambda v: mx.sin(reference(v)).sum())(x)), atol=1e-5
    )


def test_a_tied_head_does_too() -> None:
    holder = Holder(nn.Embedding(96, 64).to_quantized(32, 8))
    weight = dense_weight(holder.layer)
    multiply_densely(holder)
    x = mx.random.normal((5, 64), key=mx.random.key(0))
    np.testing.assert_allclose(np.array(holder.layer.as_linear(x)), np.array(x @ weight.T), atol=1e-5)
    np.testing.assert_allclose(
        np.array(holder.layer(mx.array([7, 90]))), np.array(weight[mx.array([7, 90])]), atol=1e-6
    )


@pytest.mark.parametrize("depth", [12, 48])
def test_few_dense_matrices_are_alive_at_once_whatever_the_depth(depth: int) -> None:
    """The peak of a gradient over the base, in dense matrices; holding one per layer would give at least `depth`."""
    layers = [nn.Linear(512, 512, bias=False).to_quantized(64, 4) for _ in range(depth)]
    holder = Holder(nn.Sequential(*layers))
    multiply_densely(holder)
    x = mx.random.normal((8, 512))
    mx.eval(holder.parameters(), x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda v: mx.sin(holder.layer(v)).sum())(x))
    assert mx.get_peak_memory() - before < 6 * 512 * 512 * 4
