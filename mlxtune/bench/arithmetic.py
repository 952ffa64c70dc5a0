"""How much arithmetic some batches need, how much of the plain way's is left out, and how much the machine can do.

A token costs 4 operations for each element of a matrix that it meets: multiply and add, on the way forward and on the
way back to the input. Attention's own products, the adapter's and what checkpointing computes again are left out. Two
rows of 100 tokens, 60 of them shared and 30 in all supervised, a trunk of 1,000,000 elements and a head of 500,000:

    plain way    200 tokens * 1,500,000                        = 300 million elements
    ours         140 tokens * 1,000,000 + 30 * 500,000         = 155 million
    left out     by the head 170 * 500,000 / 300 million = 28%, by the prefix 60 * 1,000,000 / 300 million = 20%

Legend: D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapter.layers import LINEAR, SWITCH, dense_shape
from mlxtune.compute import prefix
from mlxtune.compute.loss import Way
from mlxtune.data.dataset.batches import Batch
from mlxtune.machine import backend
from mlxtune.model.arrays import dtype_name, named

OPERATIONS = 4  # of a token, for each element of a matrix
PRODUCT = 2048  # rows and columns of the large matrices whose product is timed
TIMES = 5  # that it is, for the best of them


@dataclass(frozen=True)
class Work:
    """Of some batches. A row's last token predicts nothing, so it counts nowhere."""

    tokens: int  # real ones
    padded: int  # with padding, each row computed whole
    processed: int  # through the trunk: what rows begin with once
    through_head: int  # through the head
    supervised: int  # whose loss is counted
    head_saved: float  # share of the plain way's elements that the head apart from the trunk left out
    prefix_saved: float  # share of them that was left out because rows begin alike
    needed: int  # operations


def of(model: nn.Module, way: Way, batches: Sequence[Batch], whole: Sequence[Batch]) -> Work:
    """What these batches need when they are computed as `way` says. whole: the same rows, in the batches of a plan that
    shares nothing.
    """
    processed = sum(prefix.forest_of_batch(batch, way.prefix).computed for batch in batches)
    padded = sum(batch.ids.size - len(batch.rows) for batch in whole)
    saved = padded - processed  # tokens
    supervised = sum(batch.targets for batch in batches)
    trunk, head = _elements(model, way)
    plain = padded * (trunk + head)
    through_head = supervised if way.split else padded
    return Work(
        tokens=sum(batch.tokens - len(batch.rows) for batch in batches),
        padded=padded,
        processed=processed,
        through_head=through_head,
        supervised=supervised,
        head_saved=(padded - through_head) * head / plain,
        prefix_saved=saved * trunk / plain,
        needed=OPERATIONS * (processed * trunk + through_head * head),
    )


def _elements(model: Any, way: Way) -> tuple[int, int]:
    """(matrix elements that a token meets in the blocks, V * D of the head where it is run apart, else 0)."""
    chosen_experts = int(getattr(model.args, "num_experts_per_tok", None) or 1)
    trunk = 0
    for block in model.layers:
        for _, layer in block.named_modules():
            if not isinstance(layer, LINEAR + SWITCH):
                continue
            *_, outputs, inputs = dense_shape(layer)
            times = chosen_experts if isinstance(layer, SWITCH) else 1
            trunk += outputs * inputs * times
    if way.split is None:
        return trunk, 0
    width = way.split.hidden(mx.array([[0]])).shape[-1]
    return trunk, way.split.vocabulary * width


def matmul_peak(dtype: mx.Dtype) -> float:
    """Operations per second of a product of two large square matrices."""
    a = mx.random.normal((PRODUCT, PRODUCT)).astype(dtype)
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(TIMES):
        began = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - began)
    return 2 * PRODUCT**3 / best


def device(dtype: mx.Dtype) -> str:
    """What computes, for people. dtype: of the activations."""
    return f"{backend.kind()} ({backend.chip()}), {dtype_name(dtype)}, MLX {version('mlx')}"


def nbytes(parameters: Any) -> int:
    """Of a tree of arrays."""
    return sum(array.nbytes for array in named(parameters).values())
