"""What is computed in another way on the CPU alone, for those who develop on Linux. A Mac never comes here.

It has two entrances, and everything else is private to them:

- `multiply_densely(model)`, from `load`: quantized layers multiply with the dense matrix that they stand for.
- `as_powers_of_two(wanted)`, around a training step: exponentials and attention by functions that are fast there.
  `worth_it` says whether they are wanted; a run keeps the answer in `Way.powers`.

(`compute/memory/own_attention.py` takes down the graph of this attention, to predict its memory.)

Quantized layers. MLX's CPU kernel for quantized matrices is slow for more than a few rows (20 to 70 times slower than
float32 BLAS), so there a frozen layer builds its float32 matrix, multiplies, and forgets it; the backward pass builds
it again. Memory stays that of the 4-bit base plus one matrix.

Exponentials. MLX computes one at a time there: 9 ns each, 14 ns for a sigmoid, against 0.1 ns for a multiplication,
which made them a third of a training step. A power of two takes 3 ns and rounds the same (1.8e-6 relative at
|x| = 30, as MLX's own): e^x = 2^(x log2 e).

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head; I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlxtune.machine import backend
from mlxtune.model.dense import dense_weight

SQUARE = 512  # keys up to which a causal mask is a corner of one that is kept, of a megabyte at most
FEW_ROWS = 2  # up to here the quantized kernel wins (measured: 0.6 ms against 1.2 ms for one row of 1536 x 576)
LOG2_E = math.log2(math.e)
mlx_exp, mlx_sigmoid, mlx_attention = mx.exp, mx.sigmoid, mx.fast.scaled_dot_product_attention


# Quantized layers.


def multiply_densely(model: nn.Module) -> None:
    """Give every quantized layer of a frozen base the CPU's way to multiply; the parameters stay as they are."""
    for _, module in model.named_modules():
        faster = _FASTER.get(type(module))
        if faster is not None:
            module.__class__ = faster


def _dense_product(layer: nn.Module, x: mx.array) -> mx.array:
    """x [..., I] @ W.T -> [..., O] through the dense matrix W [O, I], which neither pass keeps."""

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
        """[..., I] -> [..., O]."""
        if not _many_rows(x):
            return super().__call__(x)
        y = _dense_product(self, x)
        return y + self["bias"] if "bias" in self else y


class CpuQuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        """A tied head: [..., D] -> [..., V]."""
        return _dense_product(self, x) if _many_rows(x) else super().as_linear(x)


class CpuQuantizedSwitchLinear(QuantizedSwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, I], the expert of each row [...] -> [..., 1, O]; x may have axes of length 1 that indices repeat.

        sorted_indices: whether the experts are in ascending order.
        """

        @mx.custom_function
        def product(x: mx.array, indices: mx.array) -> mx.array:
            weight = dense_weight(self, x.dtype, after=x).swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

        @product.vjp
        def product_vjp(primals: Any, cotangent: Any, _: Any) -> tuple[mx.array, mx.array]:
            x, indices = primals
            weight = dense_weight(self, cotangent.dtype, after=cotangent)
            of_x = mx.gather_mm(cotangent, weight, rhs_indices=indices, sorted_indices=sorted_indices)
            return _sum_to(of_x, x.shape), mx.zeros_like(indices)

        y: Any = product(x, indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def _sum_to(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Undo a broadcast: sum over the axes along which `shape` was repeated."""
    for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
        if want == 1 and have != 1:
            array = array.sum(axis=axis, keepdims=True)
    return array


_FASTER = {
    nn.QuantizedLinear: CpuQuantizedLinear,
    nn.QuantizedEmbedding: CpuQuantizedEmbedding,
    QuantizedSwitchLinear: CpuQuantizedSwitchLinear,
}
ORIGINALS = {faster: original for original, faster in _FASTER.items()}  # to the class that MLX or mlx-lm has


# Exponentials.


def worth_it() -> bool:
    """Whether this device is the one that fast exponentials are for."""
    return backend.kind() == "cpu" and sys.platform == "linux"


@contextmanager
def as_powers_of_two(wanted: bool = True) -> Iterator[None]:
    """Inside, whatever calls MLX's exp, sigmoid and attention gets those below; not wanted: nothing changes."""
    if not wanted:
        yield
        return
    fast: Any = mx.fast  # the names below are read-only to the type checker alone
    functions: Any = mx
    functions.exp, functions.sigmoid, fast.scaled_dot_product_attention = exp, sigmoid, attention
    try:
        yield
    finally:
        functions.exp, functions.sigmoid, fast.scaled_dot_product_attention = mlx_exp, mlx_sigmoid, mlx_attention


def exp(x: mx.array, **options: Any) -> mx.array:
    """e^x, of any shape."""
    if not _is_float32(x):
        return mlx_exp(x, **options)
    return mx.power(2.0, x * LOG2_E, **options)


def sigmoid(x: mx.array, **options: Any) -> mx.array:
    """1 / (1 + e^-x), of any shape."""
    if not _is_float32(x):
        return mlx_sigmoid(x, **options)
    out: Any = _sigmoid(x)
    return out


def _is_float32(x: Any) -> bool:
    return isinstance(x, mx.array) and x.dtype == mx.float32  # a number is no array


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return mx.reciprocal(1 + mx.power(2.0, x * -LOG2_E))


@_sigmoid.vjp
def _sigmoid_vjp(_: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (y * (1 - y))


# Attention, written out around the exponentials.


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """softmax(scale * q k^T + mask) v as `mx.fast.scaled_dot_product_attention`: q [B, H, T, D], k and v [B, K, S, D]
    -> [B, H, T, D].

    One matrix product serves all query heads of a key head, and the division by the softmax's sum comes after the
    product with the values, where rows are short: D numbers instead of S. The backward pass is FlashAttention's (Dao
    et al. 2022, arXiv:2205.14135, appendix B.2), with the weights kept unnormalised. Sinks and masks of numbers, which
    may need a gradient, are left to MLX.
    """
    if not is_for(q, mask, sinks):
        return mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> Any:
        # The bias is made in here: from outside, the function would keep it until the backward pass.
        return forward(q, k, v, scale, bias_of(mask, q.shape[2], k.shape[2]))

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return backward(primals, cotangents[0], outputs, scale)

    out: Any = attend(q, k, v)
    result: mx.array = out[0]
    return result


def is_for(q: mx.array, mask: Any, sinks: Any) -> bool:
    """Whether attention with queries q [B, H, T, D] is computed here, not by MLX."""
    of_numbers = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    return sinks is None and not of_numbers and q.dtype == mx.float32


def forward(q: mx.array, k: mx.array, v: mx.array, scale: float, bias: mx.array | None) -> tuple[mx.array, ...]:
    """(attention [B, H, T, D], unnormalised weights [B, H, T, S], one over their sums [B, H, T, 1]).

    q [B, H, T, D], k and v [B, K, S, D]; bias: added to the scores, [T, S] or what broadcasts to [B, H, T, S]; None:
    nothing is.
    """
    by_key_head, by_head = _shapes(q, k)
    scores = ((q * (scale * LOG2_E)).reshape(by_key_head) @ k.swapaxes(-1, -2)).reshape(by_head)
    if bias is not None:
        scores = scores + bias
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    one_over_sum = mx.reciprocal(weights.sum(axis=-1, keepdims=True))
    unnormalised = (weights.reshape(by_key_head) @ v).reshape(by_head)
    return unnormalised * one_over_sum, weights, one_over_sum


def backward(primals: Any, cotangent: mx.array, outputs: Any, scale: float) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q [B, H, T, D], k and v [B, K, S, D].

    primals: (q, k, v); cotangent: of the attention, [B, H, T, D]; outputs: what `forward` gave.
    """
    q, k, v = primals
    out, weights, one_over_sum = outputs
    by_key_head, by_head = _shapes(q, k)
    d_out = cotangent * one_over_sum
    # Of each query, what the softmax takes from all of its scores alike: D of FlashAttention's appendix.
    common = (d_out * out).sum(axis=-1, keepdims=True)
    d_out = d_out.reshape(by_key_head)
    d_weights = (d_out @ v.swapaxes(-1, -2)).reshape(by_head)
    d_scores = (weights * (d_weights - common)).reshape(by_key_head)
    d_q = (d_scores @ k).reshape(by_head) * scale
    d_k = (d_scores.swapaxes(-1, -2) @ q.reshape(by_key_head)) * scale
    d_v = weights.reshape(by_key_head).swapaxes(-1, -2) @ d_out
    return d_q, d_k, d_v


def _shapes(q: mx.array, k: mx.array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of queries [B, H, T, D]: those of one key head together, [B, K, H / K * T, D], and each head's, [B, H, T, D].

    The last length is left open (-1), for scores have S numbers there.
    """
    rows, heads, queries, _ = q.shape
    key_heads = k.shape[1]
    return (rows, key_heads, heads // key_heads * queries, -1), (rows, heads, queries, -1)


def bias_of(mask: Any, queries: int, keys: int) -> mx.array | None:
    """What is added to the scores, [T, S] or what the mask broadcasts to. mask: None, "causal" or an array of booleans,
    true where a key is seen.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        return _causal(queries, keys)
    # A mask may leave a row of padding without any key: finite, as in MLX.
    return mx.where(mask, 0.0, mx.finfo(mx.float32).min)


_squares: list[mx.array] = []  # the largest causal mask so far, [N, N]


def _causal(queries: int, keys: int) -> mx.array:
    """[T, S], aligned bottom right: a corner of one mask, for the layers and passes of a step all ask for some.

    Of many keys only the rows that are asked for: a branch of 20 tokens behind 32,768 needs 2.6 MB, the square 4.3 GB.
    """
    if keys > SQUARE:
        query = mx.arange(keys - queries, keys)[:, None]
        return mx.where(mx.arange(keys)[None] <= query, 0.0, -mx.inf)
    if not _squares or _squares[0].shape[0] < keys:
        place = mx.arange(keys)
        square = mx.where(place[None] <= place[:, None], 0.0, -mx.inf)
        mx.eval(square)
        _squares[:] = [square]
    return _squares[0][keys - queries : keys, :keys]
