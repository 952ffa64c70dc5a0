"""Cross-entropy over supervised tokens, computed the plain way and the fast ones.

A loss is always a *sum* over tokens; whoever reports a mean divides once by the count. `plain` is the reference. The
fast way gathers the supervised rows and takes them through the head in chunks: the [rows, vocabulary] matrix never
exists beyond one chunk. Where the head is frozen, loss and hidden gradient come out of the same pass (two matmuls a
chunk; checkpointing the chunks would take three).

Legend: B rows, T tokens, N supervised positions, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute import prefix
from mlxtune.compute.checkpointing import checkpointed
from mlxtune.compute.head import Split
from mlxtune.data.dataset.batches import Batch
from mlxtune.machine import backend

CHUNK_BYTES = 64 << 20  # of one chunk's float32 logits, before its rows are rounded to whole tiles
MIN_CHUNK_ROWS = 64  # fewer make a thin matrix product, whatever the vocabulary


@dataclass(frozen=True)
class Way:
    """How the loss is computed. The default is the plain way.

    split: run the head on supervised positions only; head_trained: something trainable is reachable from the head;
    prefix: tokens that all rows of the run share, None: computed for every row; recompute: every n-th block keeps its
    input only, 0: none; powers: exponentials are computed as powers of two; compiled: as one compiled function.
    """

    split: Split | None = None
    head_trained: bool = False
    prefix: int | None = None
    recompute: int = 0
    powers: bool = False
    compiled: bool = False


def plain(model: nn.Module, batch: Batch) -> mx.array:
    """The reference: logits of all positions, cross-entropy times mask, summed. Scalar, float32."""
    ids = mx.array(batch.ids)
    logits = _wide(model(ids[:, :-1]))
    losses = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")
    return (losses * mx.array(batch.mask[:, 1:]).astype(losses.dtype)).sum()


@dataclass(frozen=True)
class Placed:
    """A micro-batch as arrays. ids: [B, T]; positions: [N] flat ones, in the trunk's output, that predict a supervised
    token; targets: [N] those tokens; weights: [N, 1] 0 for targets that only fill up, None: there are none; prefix:
    tokens that every row begins with, to be computed once.
    """

    ids: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array | None
    prefix: int


def place(batch: Batch, shared: int | None, count: int = 0) -> Placed:
    """shared: the run's common prefix, None: rows are computed whole; count: fill up to so many targets, 0: do not."""
    positions, targets = batch.supervised()
    length = 0 if shared is None else prefix.usable(batch, shared)
    if length:
        positions = prefix.positions(batch, length)
    weights = None
    if count:
        weights = mx.array((np.arange(count) < len(targets))[:, None].astype(np.float32))
        positions, targets = (np.pad(array, (0, count - len(array)), mode="edge") for array in (positions, targets))
    return Placed(mx.array(batch.ids[:, :-1]), mx.array(positions), mx.array(targets), weights, length)


def along(model: nn.Module, way: Way, batch: Batch, stages: list[Any] | None = None) -> mx.array:
    """The same sum as `plain`, computed as `way` says. Scalar, float32.

    stages: gets the arrays to compute one after the other before the rest.
    """
    if way.split is None and way.prefix is None:
        return plain(model, batch)
    return of_placed(model, way, place(batch, way.prefix), [] if stages is None else stages)


def of_placed(model: nn.Module, way: Way, placed: Placed, stages: list[Any]) -> mx.array:
    """As `along`."""
    rows = supervised_rows(model, way.split, placed)
    if way.split is None:
        assert placed.weights is None
        return nn.losses.cross_entropy(_wide(rows), placed.targets, reduction="sum")
    if way.head_trained:
        return _checkpointed(model, way.split, rows, placed)
    return _frozen(way.split, rows, placed, stages)


def supervised_rows(model: nn.Module, split: Split | None, placed: Placed) -> mx.array:
    """Hidden states [N, D] at the positions, for the head still to run on; without a split the logits themselves,
    [N, V].
    """
    forward: Any = model if split is None else split.hidden
    out = prefix.run(forward, model, placed.ids, placed.prefix) if placed.prefix else forward(placed.ids)
    rows: mx.array = out.reshape(-1, out.shape[-1])[placed.positions]
    return rows


def chunk_rows(width: int, vocabulary: int) -> int:
    """C: the logits of a chunk [C, V] take about a quarter of the head's own matrix [V, D] in float32, at most.

    On a GPU C is the nearest multiple of the device's tile: a chunk of 110 or 130 rows costs as much as one of 128. The
    nearest, not the one below: 64 rows instead of 110 would read the head nearly twice as often.
    """
    rows = max(MIN_CHUNK_ROWS, min(width // 4, CHUNK_BYTES // (4 * vocabulary)))
    tile = backend.policy().tile
    return max(1, (rows + tile // 2) // tile) * tile


def chunks(rows: mx.array, vocabulary: int) -> Iterator[slice]:
    """Cut hidden rows [N, D] so that a chunk's logits [C, V] stay small."""
    size = chunk_rows(rows.shape[-1], vocabulary)
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


def _frozen(split: Split, rows: mx.array, placed: Placed, stages: list[Any]) -> mx.array:
    """Loss and gradient in one forward pass; the backward pass only scales. Nothing in the head may be trainable:
    gradients to what a custom function closes over are silently zero.
    """

    @mx.custom_function
    def head(rows: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0, _wide(rows[:0]).dtype)
        parts: list[mx.array] = []
        for chunk in chunks(rows, split.vocabulary):
            # Each chunk waits for the one before: computed ahead, all their logits would be alive at once.
            part = mx.depends([rows[chunk]], [total, *parts[-1:]])[0] if parts else rows[chunk]
            loss, gradient = mx.value_and_grad(_chunk_loss(split, placed, chunk))(part)
            total = total + loss
            parts.append(gradient)
            stages.append([total, gradient])
        return total, mx.concatenate(parts)

    @head.vjp
    def head_vjp(_: Any, cotangents: Any, outputs: Any) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(rows.dtype)

    out: Any = head(rows)
    return out[0]


def _checkpointed(model: nn.Module, split: Split, rows: mx.array, placed: Placed) -> mx.array:
    """The chunks' logits computed again in the backward pass, with gradients to the head's parameters."""
    total = mx.array(0.0, _wide(rows[:0]).dtype)
    for chunk in chunks(rows, split.vocabulary):
        part = mx.depends([rows[chunk]], [total])[0]
        total = total + checkpointed(model, _chunk_loss(split, placed, chunk))(part)
    return total


def _chunk_loss(split: Split, placed: Placed, chunk: slice) -> Callable[[mx.array], mx.array]:
    """[C, D] hidden rows -> the sum of their losses."""
    targets = placed.targets[chunk]
    weights = None if placed.weights is None else placed.weights[chunk]

    @mx.custom_function
    def cross_entropy(logits: mx.array) -> tuple[mx.array, mx.array]:
        """(summed loss, softmax): one exponential of each logit serves both."""
        highest = logits.max(axis=-1, keepdims=True)
        powers = mx.exp(logits - highest)
        total = powers.sum(axis=-1, keepdims=True)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
        losses = mx.log(total) + highest - picked
        return (losses if weights is None else losses * weights).sum(), powers / total

    @cross_entropy.vjp
    def softmax_minus_one_hot(_: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        scale = cotangents[0] if weights is None else cotangents[0] * weights
        return scale * outputs[1].at[mx.arange(targets.size), targets].subtract(1)

    def loss(rows: mx.array) -> mx.array:
        out: Any = cross_entropy(_wide(split.logits(rows)))
        return out[0]

    return loss


def _wide(array: mx.array) -> mx.array:
    """In float32, where softmax and its sums are computed; float64 (a test's oracle) stays."""
    return array if array.dtype == mx.float64 else array.astype(mx.float32)
