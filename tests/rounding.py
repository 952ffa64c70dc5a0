"""A GPU's arithmetic on the CPU: 16-bit products are summed in float32 and rounded, in an order that depends on the
number of rows.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.model import linux_cpu
from mlxtune.model.dense import dense_weight

_gather_mm = mx.gather_mm


def as_a_gpu(patch: pytest.MonkeyPatch, relative: float) -> None:
    """Every product with a frozen matrix, forward and backward, is off by `relative` of its mean size: by other numbers
    for every shape, by the same for the same.
    """

    def summed(y: mx.array, dtype: mx.Dtype) -> mx.array:
        noise = mx.random.normal(y.shape, key=mx.random.key(hash(y.shape[:-1]) % (1 << 31)))
        return (y + mx.stop_gradient(relative * mx.abs(y).mean() * noise)).astype(dtype)

    def product(layer: Any, x: mx.array) -> Any:
        @mx.custom_function
        def forward(x: mx.array) -> mx.array:
            return summed(x.astype(mx.float32) @ dense_weight(layer).T, x.dtype)

        @forward.vjp
        def backward(_: Any, cotangent: mx.array, __: Any) -> mx.array:
            return summed(cotangent.astype(mx.float32) @ dense_weight(layer), cotangent.dtype)

        return forward(x)

    def linear(self: Any, x: mx.array) -> mx.array:
        y: mx.array = product(self, x)
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def gather(a: mx.array, b: mx.array, **options: Any) -> mx.array:
        return summed(_gather_mm(a.astype(mx.float32), b.astype(mx.float32), **options), a.dtype)

    patch.setattr(nn.Linear, "__call__", linear)
    patch.setattr(nn.Embedding, "as_linear", product)
    patch.setattr(linux_cpu, "_dense_product", product)
    patch.setattr(mx, "gather_mm", gather)
