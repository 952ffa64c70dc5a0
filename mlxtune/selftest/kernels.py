"""MLX's kernels that training rests on, forward and backward, against float64: where a GPU may be wrong unseen.

Quantized matrices are decoded by our own reading of their bytes, so that MLX's decoding is checked as well.
Legend: M rows of activations, N rows of the matrix, K its columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlxtune_convert.gguf.quant_blocks import Codes, dequantize

from mlxtune.machine import backend
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.convert import MODES
from mlxtune.selftest.model import computing_on_cpu
from mlxtune.selftest.outcome import Check, Found, Workshop

GROUP = "MLX's kernels, forward and backward, against float64"
FLOAT32 = 1e-5  # norm of the difference over the norm, at most; TF32, with 5e-4, would not meet it
# In 16 bits, units of the last place. On a GPU the decoded matrix, the sums of a split product and the result are
# rounded, which makes about half a unit. MLX's CPU kernel rounds every sum (3.5 units over 512 columns).
UNITS, CPU_UNITS = 2, 8
ATTENTION = 4  # units: the scores are rounded before their exponentials are taken
LAST_PLACE = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
TYPES = (mx.float32, mx.float16, mx.bfloat16)
N, K, EXPERTS, WIDTH = 128, 512, 4, 64
# Of each mode, with all of its group sizes; below, with the usual one.
BITS = {"affine": (4, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
MORE_BITS = (2, 3, 5, 6)
MISSING = re.compile("support|implement|NYI", re.IGNORECASE)  # in what MLX raises where it lacks a kernel


def checks() -> list[Check]:
    found = []
    for name, run in (("quantized product", _linear), ("experts' product", _experts), ("attention", _attention)):
        found += [Check(GROUP, f"{name}, {dtype_name(dtype)}", partial(run, dtype)) for dtype in TYPES]
    return found


def _limit(dtype: mx.Dtype) -> float:
    return FLOAT32 if dtype == mx.float32 else LAST_PLACE[dtype] * (CPU_UNITS if backend.kind() == "cpu" else UNITS)


def _few(dtype: mx.Dtype) -> bool:
    """Whether only a few rows are multiplied: MLX's CPU kernels are slow in 16 bits, and a run does not take them."""
    return backend.kind() == "cpu" and dtype != mx.float32


def _linear(dtype: mx.Dtype, shop: Workshop) -> Found:
    """x [M, K] times W' of every kind of codes, the gradient's way back through W, and W itself."""
    worst = Worst(_limit(dtype))
    for mode in BITS:
        with worst.unless_missing(mode):
            for label, codes, matrix, options in _quantized((N, K), dtype, mode):
                decoded = mx.dequantize(codes[0], codes[1], codes[2], dtype=dtype, **options)
                worst.add(f"{label}, decoded", decoded, matrix)
                for rows in (1, 7) if _few(dtype) else (1, 7, 80):
                    x, back = _noise((rows, K), dtype, rows), _noise((rows, N), dtype, rows + 1)
                    (out,), (gradient,) = mx.vjp(partial(_product, codes, options), [x], [back])
                    where = f"{label}, {rows} rows"
                    worst.add(f"{where}, forward", out, _times(_wide(x), matrix.T))
                    worst.add(f"{where}, backward", gradient, _times(_wide(back), matrix))
    return worst.found()


def _product(codes: Any, options: dict[str, Any], x: mx.array) -> mx.array:
    return mx.quantized_matmul(x, codes[0], codes[1], codes[2], transpose=True, **options)


def _experts(dtype: mx.Dtype, shop: Workshop) -> Found:
    """Each token's row times the matrices of its two experts, tokens in any order and sorted by expert."""
    worst = Worst(_limit(dtype))
    for mode in ("affine", "mxfp4"):
        with worst.unless_missing(mode):
            for label, codes, matrices, options in _quantized((EXPERTS, WIDTH, K), dtype, mode):
                for tokens in (3,) if _few(dtype) else (3, 80):
                    _two_experts(worst, f"{label}, {tokens} tokens", codes, matrices, options, dtype, tokens)
    return worst.found()


def _two_experts(
    worst: Worst, where: str, codes: Any, matrices: np.ndarray, options: dict[str, Any], dtype: mx.Dtype, tokens: int
) -> None:
    """matrices [EXPERTS, WIDTH, K]: tokens in the order they come, then their (token, expert) pairs sorted by expert,
    as mlx-lm sorts them for many tokens.
    """
    transposed = matrices.swapaxes(1, 2)  # [EXPERTS, K, WIDTH]
    chosen = np.random.default_rng(tokens).integers(0, EXPERTS, (tokens, 2))
    pairs = chosen.reshape(-1)  # [2 * tokens] the expert of each (token, expert) pair

    x = _noise((tokens, 1, 1, K), dtype, 1)
    back = _noise((tokens, 2, 1, WIDTH), dtype, 2)
    (out,), (gradient,) = mx.vjp(partial(_gathered, codes, options, chosen, False), [x], [back])
    row_of_each_pair = np.repeat(_wide(x), 2, axis=0)
    worst.add(f"{where}, forward", out, _by_expert(row_of_each_pair, pairs, transposed))
    gradient_of_each_pair = _by_expert(_wide(back), pairs, matrices).reshape(tokens, 2, K)
    worst.add(f"{where}, backward", gradient, gradient_of_each_pair.sum(axis=1))

    ordered = np.sort(pairs)
    x = _noise((2 * tokens, 1, K), dtype, 3)
    back = _noise((2 * tokens, 1, WIDTH), dtype, 4)
    (out,), (gradient,) = mx.vjp(partial(_gathered, codes, options, ordered, True), [x], [back])
    worst.add(f"{where} sorted, forward", out, _by_expert(_wide(x), ordered, transposed))
    worst.add(f"{where} sorted, backward", gradient, _by_expert(_wide(back), ordered, matrices))


def _gathered(codes: Any, options: dict[str, Any], chosen: np.ndarray, ordered: bool, x: mx.array) -> mx.array:
    indices = mx.array(chosen.astype(np.uint32))
    options = {**options, "rhs_indices": indices, "sorted_indices": ordered}
    return mx.gather_qmm(x, codes[0], codes[1], codes[2], transpose=True, **options)


def _by_expert(rows: np.ndarray, chosen: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """[rows, width of the rows] times each row's own matrix of [EXPERTS, width of the rows, N] -> [rows, N]."""
    rows = rows.reshape(len(chosen), -1)
    out = np.empty((len(rows), matrices.shape[-1]))
    for expert, matrix in enumerate(matrices):
        out[chosen == expert] = _times(rows[chosen == expert], matrix)
    return out


def _attention(dtype: mx.Dtype, shop: Workshop) -> Found:
    """Two query heads on one key head; causal, without a mask, and with a mask over a prefix."""
    worst = Worst(FLOAT32 if dtype == mx.float32 else ATTENTION * LAST_PLACE[dtype])
    before, queries = 21, 60
    keys = before + queries
    after = np.arange(keys)[None] <= np.arange(before, keys)[:, None]
    window = after & (np.arange(keys)[None] > np.arange(before, keys)[:, None] - 32)
    masks: dict[str, tuple[Any, np.ndarray]] = {
        "causal": ("causal", after),
        "no mask": (None, np.ones_like(after)),
        "windows": (mx.array(window), window),
    }
    for width in (64, 128):
        q, back = (_noise((2, 2, queries, width), dtype, seed) for seed in (1, 2))
        k, v = (_noise((2, 1, keys, width), dtype, seed) for seed in (3, 4))
        for name, (mask, allowed) in masks.items():
            scale = width**-0.5

            def attend(q: mx.array, k: mx.array, v: mx.array, scale: float = scale, mask: Any = mask) -> mx.array:
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

            (out,), gradients = mx.vjp(attend, [q, k, v], [back])
            parts = dict(zip(("forward", "queries", "keys", "values"), (out, *gradients), strict=True))
            wanted = _attended(_wide(q), _wide(k), _wide(v), _wide(back), scale, allowed)
            for part, expected in zip(parts, wanted, strict=True):
                worst.add(f"{name}, heads {width} wide, {part}", parts[part], expected)
    return worst.found()


def _attended(q: Any, k: Any, v: Any, back: Any, scale: float, allowed: np.ndarray) -> Iterator[np.ndarray]:
    """softmax(scale q k') v over the allowed keys, then its gradients to q, k and v."""
    each = q.shape[1] // k.shape[1]
    k, v = (np.repeat(array, each, axis=1) for array in (k, v))
    scores = np.where(allowed, scale * _times(q, k.swapaxes(-1, -2)), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = _times(p, v)
    of_scores = scale * p * (_times(back, v.swapaxes(-1, -2)) - (back * out).sum(axis=-1, keepdims=True))

    def of_group(array: np.ndarray) -> np.ndarray:
        rows, heads, *shape = array.shape
        return array.reshape(rows, heads // each, each, *shape).sum(axis=2)

    yield out
    yield _times(of_scores, k)
    yield of_group(_times(of_scores.swapaxes(-1, -2), q))
    yield of_group(_times(p.swapaxes(-1, -2), back))


def _quantized(
    shape: tuple[int, ...], dtype: mx.Dtype, mode: str
) -> Iterator[tuple[str, Any, np.ndarray, dict[str, Any]]]:
    """(label, [codes, scales, biases or None], the matrices they stand for, how to read them) of a mode's bits and
    groups.
    """
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    more = MORE_BITS if mode == "affine" and len(shape) == 2 else ()
    for bits in (*BITS[mode], *more):
        for group in MODES[mode][1][: 1 if bits in more else None]:
            options: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
            with computing_on_cpu():
                codes = list(mx.quantize(mx.array(weight).astype(dtype), **options))
                mx.eval(codes)
            flat = [to_numpy(part).reshape(-1, part.shape[-1]) for part in codes]
            read = Codes(flat[0], flat[1], flat[2] if len(flat) > 2 else None, bits, group, mode)
            matrix = dequantize(read).astype(np.float64).reshape(shape)
            yield f"{mode} {bits} bits, groups of {group}", [*codes, None][:3], matrix, options


def _noise(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def _wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product, by numpy itself: not by the BLAS that MLX may use, whose threads would wait for each other on
    a busy machine.
    """
    product: np.ndarray = np.einsum("...ij,...jk->...ik", a, b)
    return product


class Worst:
    """The largest relative difference of many, what was beyond the limit, and the modes that this device lacks."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.value, self.where = 0.0, ""
        self.beyond: list[str] = []
        self.missing: list[str] = []

    @contextmanager
    def unless_missing(self, mode: str) -> Iterator[None]:
        """Around a mode that MLX may not have on every device; affine it has."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if mode == "affine" or not MISSING.search(str(error)):
                raise
            self.missing.append(mode)

    def add(self, where: str, got: mx.array, wanted: np.ndarray) -> None:
        """Count an array against the one that was wanted; of any shape, the same for both."""
        off = float(np.linalg.norm(_wide(got).reshape(wanted.shape) - wanted) / np.linalg.norm(wanted))
        if not off <= self.limit:
            self.beyond.append(where)
        if not off <= self.value:
            self.value, self.where = off, where

    def found(self) -> Found:
        more = f" (and {len(self.beyond) - 1} more)" if len(self.beyond) > 1 else ""
        missing = f"; not on this device: {', '.join(self.missing)}" if self.missing else ""
        return Found(self.value, self.limit, said=f"{self.where}{more}{missing}")
