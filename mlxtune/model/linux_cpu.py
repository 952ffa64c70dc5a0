"""Exponentials and attention for MLX's CPU backend on Linux.

There MLX computes one exponential at a time: 9 ns each, 14 ns for a sigmoid, against 0.1 ns for a multiplication, which
made them a third of a training step. A power of two takes 3 ns and rounds the same (1.8e-6 relative at |x| = 30, as
MLX's own). Attention is written out around it: one matrix product serves all query heads of a key head, and the
division by the softmax's sum comes after the values, where rows are short.

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxtune.machine import backend

LOG2_E = math.log2(math.e)
mlx_exp, mlx_sigmoid, mlx_attention = mx.exp, mx.sigmoid, mx.fast.scaled_dot_product_attention


def worth_it() -> bool:
    """Whether this device is the one that they are for."""
    return backend.kind() == "cpu" and sys.platform == "linux"


@contextmanager
def as_powers_of_two(wanted: bool = True) -> Iterator[None]:
    """Inside, whatever calls MLX's exp, sigmoid and attention gets those below."""
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
    return mx.power(2.0, x * LOG2_E, **options) if _is_float32(x) else mlx_exp(x, **options)


def sigmoid(x: mx.array, **options: Any) -> mx.array:
    out: Any = _sigmoid(x) if _is_float32(x) else mlx_sigmoid(x, **options)
    return out


def _is_float32(x: Any) -> bool:
    return isinstance(x, mx.array) and x.dtype == mx.float32  # a number is no array


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return mx.reciprocal(1 + mx.power(2.0, x * -LOG2_E))


@_sigmoid.vjp
def _sigmoid_vjp(_: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (y * (1 - y))


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """softmax(scale * q k^T + mask) v as `mx.fast.scaled_dot_product_attention`: q [B, H, T, D], k and v [B, K, S, D]
    -> [B, H, T, D].

    The backward pass is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, appendix B.2), with p kept unnormalised.
    Sinks and masks of numbers, which may need a gradient, are left to MLX.
    """
    if not is_for(q, mask, sinks):
        return mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    bias = bias_of(mask, q.shape[2], k.shape[2])

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> Any:
        return forward(q, k, v, scale, bias)

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return backward(primals, cotangents[0], outputs, scale)

    out: Any = attend(q, k, v)
    result: mx.array = out[0]
    return result


def is_for(q: mx.array, mask: Any, sinks: Any) -> bool:
    """Whether it is left to this attention."""
    numbers = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    return sinks is None and not numbers and q.dtype == mx.float32


def forward(q: mx.array, k: mx.array, v: mx.array, scale: float, bias: mx.array | None) -> tuple[mx.array, ...]:
    """(attention, what `backward` needs of it besides). bias: added to the scores."""
    grouped, single = _shapes(q, k)
    scores = ((q * (scale * LOG2_E)).reshape(grouped) @ k.swapaxes(-1, -2)).reshape(single)
    scores = scores if bias is None else scores + bias
    p = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    share = mx.reciprocal(p.sum(axis=-1, keepdims=True))
    return (p.reshape(grouped) @ v).reshape(single) * share, p, share


def backward(primals: Any, cotangent: mx.array, outputs: Any, scale: float) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k, v."""
    (q, k, v), (out, p, share) = primals, outputs
    grouped, single = _shapes(q, k)
    given = cotangent * share
    own = (given * out).sum(axis=-1, keepdims=True)
    given = given.reshape(grouped)
    of_scores = (p * ((given @ v.swapaxes(-1, -2)).reshape(single) - own)).reshape(grouped)
    of_q = (of_scores @ k).reshape(single) * scale
    of_k = (of_scores.swapaxes(-1, -2) @ q.reshape(grouped)) * scale
    return of_q, of_k, p.reshape(grouped).swapaxes(-1, -2) @ given


def _shapes(q: mx.array, k: mx.array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of queries: those of one key head together [B, K, H / K * T, D], and each head's [B, H, T, D]."""
    (rows, heads, queries, _), groups = q.shape, k.shape[1]
    return (rows, groups, heads // groups * queries, -1), (rows, heads, queries, -1)


def bias_of(mask: Any, queries: int, keys: int) -> mx.array | None:
    """What is added to the scores."""
    if mask is None:
        return None
    if isinstance(mask, str):
        return _causal(queries, keys)
    # A mask may leave a row of padding without any key: finite, as in MLX.
    return mx.where(mask, 0.0, mx.finfo(mx.float32).min)


@functools.lru_cache(maxsize=2)  # a prefix and its suffixes
def _causal(queries: int, keys: int) -> mx.array:
    """[T, S], aligned bottom right; computed once, for a step's layers all ask for it."""
    reachable = mx.arange(keys)[None] <= mx.arange(keys - queries, keys)[:, None]
    bias = mx.where(reachable, 0.0, -mx.inf)
    mx.eval(bias)
    return bias
