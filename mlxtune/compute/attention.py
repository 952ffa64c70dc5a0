"""Attention that keeps no scores: some queries at a time, their scores computed again in the backward pass.

Of H heads, T queries and S keys, the scores are H * T * S numbers, for each block: 32 heads of 8,192 tokens, 8.6 GB in
float32. Where MLX's own kernel goes tile by tile none of them are kept. Elsewhere all are: on the CPU, and on a GPU
where the mask is an array (sliding windows, branches) or there are sinks. There, this takes its place:

    forward    queries 0 .. 255 with keys 0 .. 255, then 256 .. 511 with 0 .. 511, ...   kept: the result, and of each
    backward   the same scores again, in the same order                                   query two numbers

Queries 256 .. 511 of a causal mask see no key after 511, and with a window of 100 none before 157: keys that none of
the queries reaches are left out, which is half of the work and more. What each query reaches is known where mlx-lm made
the mask itself (`Reach`): then the array [T, S], a gigabyte at 32,768 tokens, is never computed. Of any other array of
booleans, rows are taken. A mask of numbers may need a gradient (multi-head latent attention): it is left to MLX.

The backward pass is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, appendix B.2). A sink is one more score in the
sum of a query's softmax, of no value (gpt-oss).

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head, C queries of a chunk.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base, cache

from mlxtune.machine import backend
from mlxtune.model import prefix_cache

LONG = 512  # tokens of a run's longest row; up to here keeping the scores is as fast (on the CPU, 9 heads of 64)
# C, measured on the CPU: of 1,024 tokens, 9 heads, chunks of 128 take 264 ms, of 256 343 ms, MLX's attention 528 ms.
# A GPU has more to do at once, and each operation costs it some microseconds.
QUERIES_ON_CPU, QUERIES_ON_GPU = 128, 256
mlx_lm_mask = base.create_causal_mask


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees: query i stands at place `offset` + i among the keys, and sees itself and those before,
    `window` keys in all at most (None: any number).
    """

    offset: int  # S - T
    window: int | None = None  # keys, the query's own included

    def keys(self, first: int, end: int) -> tuple[int, int]:
        """(the first key, the one after the last) that any of the queries from `first` on, before `end`, sees."""
        if self.window is None:
            return 0, self.offset + end
        return max(0, self.offset + first - self.window + 1), self.offset + end

    def bias(self, first: int, end: int, dtype: mx.Dtype) -> mx.array:
        """[end - first, keys]: 0 where a query sees a key of `keys(first, end)`, else minus infinity."""
        first_key, end_key = self.keys(first, end)
        queries = mx.arange(self.offset + first, self.offset + end)[:, None]
        keys = mx.arange(first_key, end_key)[None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries < keys + self.window)
        return mx.where(seen, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))


class Masks:
    """The masks that mlx-lm made, and what it made them by: an array does not tell."""

    def __init__(self) -> None:
        # By identity. Masks are not held: of a row in pieces there are many, and all at once would be as large as the
        # whole row's. Where one is gone another array may have its number, so what is found is looked at again.
        self._made: dict[int, tuple[weakref.ref[mx.array], Reach]] = {}

    def make(self, N: int, offset: int = 0, window_size: int | None = None, **padding: Any) -> mx.array:
        """As mlx-lm's `create_causal_mask`: [N, offset + N] booleans."""
        mask: mx.array = mlx_lm_mask(N, offset, window_size=window_size, **padding)
        if not padding:
            self.note(mask, Reach(offset, window_size))
        return mask

    def note(self, mask: mx.array, reach: Reach) -> None:
        """Remember what a mask [N, offset + N] was made by."""
        self._made[id(mask)] = weakref.ref(mask), reach

    def reach(self, mask: Any, queries: int, keys: int) -> Reach | None:
        """What a mask lets T queries over S keys see; None where only the array itself says it."""
        if isinstance(mask, str):
            return Reach(keys - queries)
        if id(mask) not in self._made or mask.shape != (queries, keys):
            return None
        made, reach = self._made[id(mask)]
        return reach if made() is mask else None


@dataclass(frozen=True)
class Chunked:
    """The attention of one context."""

    queries: int  # C
    kind: str  # of the device, as backend.kind() says it
    masks: Masks  # that were made inside
    exp: Callable[[mx.array], mx.array] = mx.exp  # the exponential that the device is fast with

    def is_for(self, q: mx.array, mask: Any, sinks: Any) -> bool:
        """Whether attention of queries q [B, H, T, D] is computed here."""
        if q.shape[2] <= self.queries:
            return False
        if isinstance(mask, mx.array):
            return mask.dtype == mx.bool_
        return self.kind == "cpu" or sinks is not None

    def forward(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> tuple[mx.array, ...]:
        """(attention [B, H, T, D], the largest score of each query and one over the sum of its softmax, both
        [B, H, T, 1]).
        """
        outs: list[mx.array] = []
        largest, inverse = [], []
        for first, end in self._chunks(q):
            queries = q[:, :, first:end]
            if outs:
                # Each chunk waits for the one before: computed ahead, all their scores would be alive at once.
                queries = mx.depends([queries], [outs[-1]])[0]
            seen = self._seen(mask, q, k, first, end)
            scores = _scores(queries, k[:, :, seen.first : seen.end], scale, seen)
            highest = scores.max(axis=-1, keepdims=True)
            if sinks is not None:
                highest = mx.maximum(highest, _of_heads(sinks, scores.dtype))
            weights = self.exp(scores - highest)
            total = weights.sum(axis=-1, keepdims=True)
            if sinks is not None:
                total = total + self.exp(_of_heads(sinks, scores.dtype) - highest)
            one_over = mx.reciprocal(total)
            outs.append(_product((weights * one_over).astype(v.dtype), v[:, :, seen.first : seen.end]))
            largest.append(highest)
            inverse.append(one_over)
        return mx.concatenate(outs, axis=2), mx.concatenate(largest, axis=2), mx.concatenate(inverse, axis=2)

    def backward(
        self, primals: Any, cotangent: mx.array, outputs: Any, scale: float, mask: Any
    ) -> tuple[mx.array, ...]:
        """Gradients of q [B, H, T, D], k and v [B, K, S, D], and of the sinks [H] where there are any.

        primals: (q, k, v) or (q, k, v, sinks); cotangent: of the attention, [B, H, T, D]; outputs: what `forward` gave.
        """
        q, k, v, *sinks = primals
        out, largest, inverse = outputs
        wide = largest.dtype
        # Of each query, what the softmax takes from all of its scores alike: D of FlashAttention's appendix.
        common = (cotangent.astype(wide) * out.astype(wide)).sum(axis=-1, keepdims=True)
        d_q: list[mx.array] = []
        d_k, d_v = mx.zeros(k.shape, wide), mx.zeros(v.shape, wide)
        for first, end in self._chunks(q):
            queries = q[:, :, first:end]
            if d_q:
                queries = mx.depends([queries], [d_k, d_v])[0]
            seen = self._seen(mask, q, k, first, end)
            keys, values = k[:, :, seen.first : seen.end], v[:, :, seen.first : seen.end]
            part = slice(first, end)
            scores = _scores(queries, keys, scale, seen)
            weights = self.exp(scores - largest[:, :, part]) * inverse[:, :, part]
            d_out = cotangent[:, :, part]
            d_weights = _product(d_out, values.swapaxes(-1, -2)).astype(wide)
            d_scores = (weights * (d_weights - common[:, :, part])).astype(q.dtype)
            if seen.rows is not None:  # a row of padding that sees no key has weights all the same
                d_scores = mx.where(seen.rows, d_scores, mx.array(0.0, q.dtype))
            d_q.append(_product(d_scores, keys) * scale)
            of_keys = _summed_over_queries(d_scores, queries, k) * scale
            of_values = _summed_over_queries(weights.astype(v.dtype), d_out, v)
            d_k[:, :, seen.first : seen.end] = d_k[:, :, seen.first : seen.end] + of_keys.astype(wide)
            d_v[:, :, seen.first : seen.end] = d_v[:, :, seen.first : seen.end] + of_values.astype(wide)
        gradients = mx.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype)
        if not sinks:
            return gradients
        of_sink = self.exp(_of_heads(sinks[0], wide) - largest) * inverse
        d_sinks = -(of_sink * common).sum(axis=(0, 2, 3))
        return *gradients, d_sinks.astype(sinks[0].dtype)

    def _chunks(self, q: mx.array) -> Iterator[tuple[int, int]]:
        """(first, end) of each chunk of the queries."""
        count = q.shape[2]
        for first in range(0, count, self.queries):
            yield first, min(count, first + self.queries)

    def _seen(self, mask: Any, q: mx.array, k: mx.array, first: int, end: int) -> _Seen:
        """What some queries see. mask: None, "causal", or booleans of a shape that broadcasts to [B, H, T, S]."""
        count = k.shape[2]
        if mask is None:
            return _Seen(0, count)
        reach = self.masks.reach(mask, q.shape[2], count)
        if reach is not None:
            return _Seen(*reach.keys(first, end), bias=reach.bias(first, end, _wide(q.dtype)))
        return _Seen(0, count, rows=mask if mask.shape[-2] == 1 else mask[..., first:end, :])


@dataclass(frozen=True)
class _Seen:
    """The keys that a chunk of queries sees."""

    first: int  # of them
    end: int  # the one after the last
    bias: mx.array | None = None  # [C, keys], what is added to the scores; None: nothing
    rows: mx.array | None = None  # booleans that broadcast to the scores, true where a key is seen; None: all are


def queries_at_once() -> int:
    """C for this device."""
    return QUERIES_ON_CPU if backend.kind() == "cpu" else QUERIES_ON_GPU


@contextmanager
def in_chunks(queries: int) -> Iterator[Masks]:
    """Inside, whatever calls `mx.fast.scaled_dot_product_attention` gets `Chunked` where that is for it; queries: C,
    0: nothing changes. Yields the masks that are made inside, which only where something changes are known.
    """
    if not queries:
        yield Masks()
        return
    other = mx.fast.scaled_dot_product_attention
    chunked = Chunked(queries, backend.kind(), Masks(), mx.exp)

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
    ) -> mx.array:
        if not chunked.is_for(q, mask, sinks):
            return other(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        return _with_gradients(chunked, q, k, v, scale, mask, sinks)

    with standing_in(attention, chunked.masks):
        yield chunked.masks


@contextmanager
def standing_in(attention: Any, masks: Masks) -> Iterator[None]:
    """Inside, `attention` is MLX's, and masks are noted as they are made."""
    fast: Any = mx.fast
    before = fast.scaled_dot_product_attention
    makers: list[Any] = [base, cache, prefix_cache]  # modules that call mlx-lm's function by their own name
    noted = [module for module in makers if module.create_causal_mask is mlx_lm_mask]
    fast.scaled_dot_product_attention = attention
    for module in noted:
        module.create_causal_mask = masks.make
    try:
        yield
    finally:
        fast.scaled_dot_product_attention = before
        for module in noted:
            module.create_causal_mask = mlx_lm_mask


def _with_gradients(
    chunked: Chunked, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array:
    """softmax(scale * q k^T + mask) v, [B, H, T, D], with gradients to q, k, v and sinks."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> Any:
        return chunked.forward(q, k, v, scale, mask, sinks[0] if sinks else None)

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return chunked.backward(primals, cotangents[0], outputs, scale, mask)

    given = (q, k, v) if sinks is None else (q, k, v, sinks)
    out: Any = attend(*given)
    result: mx.array = out[0]
    return result


def _scores(q: mx.array, k: mx.array, scale: float, seen: _Seen) -> mx.array:
    """[B, H, C, keys] in float32 (a test's float64 stays)."""
    scores = _product(q * scale, k.swapaxes(-1, -2)).astype(_wide(q.dtype))
    if seen.bias is not None:
        return scores + seen.bias
    if seen.rows is not None:  # finite, as in MLX: a row of padding may see no key at all
        return mx.where(seen.rows, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    return scores


def _product(x: mx.array, matrix: mx.array) -> mx.array:
    """x [B, H, C, I] times a matrix of each key head [B, K, I, O] -> [B, H, C, O]: one product serves all query heads
    of a key head.
    """
    rows, heads, count, inner = x.shape
    key_heads = matrix.shape[1]
    by_key_head = x.reshape(rows, key_heads, heads // key_heads * count, inner)
    return (by_key_head @ matrix).reshape(rows, heads, count, -1)


def _summed_over_queries(x: mx.array, y: mx.array, like: mx.array) -> mx.array:
    """x [B, H, C, keys] and y [B, H, C, D] -> [B, K, keys, D], summed over the queries of all heads of a key head.
    like: the keys or values, whose K is taken.
    """
    rows, heads, count, _ = x.shape
    key_heads = like.shape[1]
    each = heads // key_heads * count
    of_x, of_y = x.reshape(rows, key_heads, each, -1), y.reshape(rows, key_heads, each, -1)
    return of_x.swapaxes(-1, -2) @ of_y


def _of_heads(sinks: mx.array, dtype: mx.Dtype) -> mx.array:
    """[H] -> [1, H, 1, 1]."""
    return sinks.astype(dtype)[None, :, None, None]


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    """The type of scores and sums."""
    return mx.float64 if dtype == mx.float64 else mx.float32
