"""Quantized layers: the matrices they stand for, and how the CPU multiplies with them.

MLX's CPU kernel for quantized matrices is slow for more than a few rows (20 to 70 times slower than float32 BLAS), so
there a frozen layer builds its float32 matrix, multiplies, and forgets it; the backward pass builds it again. Memory
stays that of the 4-bit base plus one matrix.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

FEW_ROWS = 2  # up to here the quantized kernel wins (measured: 0.6 ms against 1.2 ms for one row of 1536 x 576)

# Every layer of MLX and mlx-lm whose `weight` is packed and stands for a matrix by itself (tests/test_quantized_mla.py
# reads mlx-lm for others). The last holds one matrix for each head, [heads, out, in]: DeepSeek's latent attention.
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)


def dense_weight(layer: Any, dtype: mx.Dtype = mx.float32, after: mx.array | None = None) -> mx.array:
    """The matrix a layer stands for, in `dtype`. float32 from float32-cast scales is exact.

    after: an array that must be computed first. Without it MLX builds the matrices of many layers ahead of their
    use (24 layers: 31 matrices alive at once; with it 4).
    """
    if not isinstance(layer, QUANTIZED):
        weight: mx.array = layer.weight
        return weight.astype(dtype)
    affine = layer.mode == "affine"
    biases: Any = layer.get("biases")
    codes = layer.weight if after is None else mx.depends([layer.weight], [after])[0]
    return mx.dequantize(
        codes,
        layer.scales.astype(dtype) if affine else layer.scales,
        biases.astype(dtype) if affine else None,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
        **({} if layer.get("global_scale") is None else {"global_scale": layer.global_scale}),
    )


def dequantize_model(model: nn.Module) -> nn.Module:
    """The model with every packed layer made dense, rounded to the type that MLX gives (affine: that of the scales).

    mlx-lm's own function of this name leaves the layers with one matrix for each head packed: what follows would take
    their codes for numbers.
    """
    from mlx_lm.utils import dequantize_model as mlx_lm_dequantize_model

    model = mlx_lm_dequantize_model(model)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedMultiLinear):
            weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
            )
            heads, outputs, inputs = weight.shape
            dense = MultiLinear(inputs, outputs, heads)
            dense.weight = weight
            model.update_modules(tree_unflatten([(path, dense)]))
    return model


def _multiply(layer: nn.Module, x: mx.array) -> mx.array:
    """x @ W.T through the dense matrix, which neither pass keeps."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ dense_weight(layer, x.dtype, after=x).T

    @product.vjp
    def product_vjp(primals: Any, cotangent: Any, _: Any) -> mx.array:
        return cotangent @ dense_weight(layer, cotangent.dtype, after=cotangent)

    out: Any = product(x)
    return out


def _many_rows(x: mx.array) -> bool:
    return x.size // x.shape[-1] > FEW_ROWS


class CpuQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if not _many_rows(x):
            return super().__call__(x)
        y = _multiply(self, x)
        return y + self["bias"] if "bias" in self else y


class CpuQuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _multiply(self, x) if _many_rows(x) else super().as_linear(x)


class CpuQuantizedSwitchLinear(QuantizedSwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        @mx.custom_function
        def product(x: mx.array, indices: mx.array) -> mx.array:
            weight = dense_weight(self, x.dtype, after=x).swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

        @product.vjp
        def product_vjp(primals: Any, cotangent: Any, _: Any) -> tuple[mx.array, mx.array]:
            _, indices = primals
            weight = dense_weight(self, cotangent.dtype, after=cotangent)
            back = mx.gather_mm(cotangent, weight, rhs_indices=indices, sorted_indices=sorted_indices)
            return _sum_to(back, primals[0].shape), mx.zeros_like(indices)

        y: Any = product(x, indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def _sum_to(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Undo a broadcast: sum over the axes along which `shape` was repeated."""
    for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
        if want == 1 and have != 1:
            array = array.sum(axis=axis, keepdims=True)
    return array


_ON_CPU = {
    nn.QuantizedLinear: CpuQuantizedLinear,
    nn.QuantizedEmbedding: CpuQuantizedEmbedding,
    QuantizedSwitchLinear: CpuQuantizedSwitchLinear,
}
OWN_WAYS = {better: plain for plain, better in _ON_CPU.items()}  # to the layer that MLX or mlx-lm has


def on_cpu(model: nn.Module) -> None:
    """Give every quantized layer of a frozen base the CPU's way to multiply; the parameters stay as they are."""
    for _, module in model.named_modules():
        better = _ON_CPU.get(type(module))
        if better is not None:
            module.__class__ = better
