"""A prefix that all rows of a batch share, computed once (system prompt, tool definitions).

The prefix runs with batch 1; each layer's keys and values stay in the graph, and the suffixes (batch B) run against
them through the `cache` argument that mlx-lm's models take. Gradients flow through the prefix exactly. Rejected:
packing all rows into one sequence with a block mask, which no model's own forward takes.

Legend: B rows, T tokens, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.beginnings import common, first_target
from mlxtune.model.prefix_cache import PrefixCache

# Up to 8 queries MLX's attention on Metal has kernels of its own, for generation. A gradient takes none of them (in
# MLX's source `is_training` turns them off), so nothing is known to fail below 9; staying above costs a few tokens.
MIN_SUFFIX = 9
GRAIN = 16  # a batch may share more than the run does: by multiples of this, so that shapes stay few
MIN_SAVED = 0.04  # share of a batch's tokens; below, the second pass costs what it saves
WORTH_SAYING = 8  # tokens: any chat template begins its rows with some


def caches(model: nn.Module) -> list[PrefixCache] | None:
    """As many as the model makes for itself (layers may share one); None when it keeps anything but keys and
    values.
    """
    made = make_prompt_cache(model)
    return [PrefixCache() for _ in made] if all(type(cache) in (KVCache, RotatingKVCache) for cache in made) else None


def shared(batch: Batch) -> int:
    """Tokens that begin every row of a batch and lie before the position that predicts the first target."""
    if len(batch.rows) < 2:
        return 0
    same = (batch.ids == batch.ids[:1]).all(axis=0)
    common = int(same.argmin()) if not same.all() else len(same)
    first = 1 + int(batch.mask[:, 1:].argmax(axis=1).min())  # rows without a target do not reach a batch
    return max(0, min(common, first - 1, int(batch.lengths.min()) - 2))


def of_run(examples: Sequence[Example]) -> int:
    """Tokens that begin every row of a run and lie before the first target's predictor."""
    first = list(examples[0].ids)
    length = len(first) - 2
    for example in examples:
        length = min(length, first_target(example) - 1)
        length = min(length, common(example.ids[:length], first[:length]))
    return max(0, length)


def longest_worth_it(length: int, rows: int) -> int:
    """The widest batch, in tokens, for which a shared prefix saves enough."""
    return int(length * (rows - 1) / (MIN_SAVED * rows))


def usable(batch: Batch, of_run: int) -> int:
    """The prefix length for a batch: at least what the whole run shares, and more in steps of GRAIN; 0 where the gain
    is nil.
    """
    length = shared(batch)
    if length > of_run:
        length -= (length - of_run) % GRAIN
    rows, width = batch.ids.shape
    return length if width <= longest_worth_it(length, rows) else 0


def positions(batch: Batch, length: int) -> np.ndarray:
    """[N] flat positions, in what `run` returns, of what predicts a supervised token."""
    row, column = np.nonzero(batch.mask[:, 1:])
    width = max(MIN_SUFFIX, batch.ids.shape[1] - 1 - length)
    return (row * width + column - length).astype(np.int32)


def run(forward: Any, model: nn.Module, ids: mx.array, length: int) -> mx.array:
    """[B, T] tokens -> output [B, T - P, D] of the suffixes; `forward(ids, cache=...)` is the trunk or the model."""
    layers = caches(model)
    assert layers is not None
    suffix = ids[:, length:]
    if suffix.shape[1] < MIN_SUFFIX:
        suffix = mx.pad(suffix, [(0, 0), (0, MIN_SUFFIX - suffix.shape[1])])
    forward(ids[:1, :length], cache=layers)
    for cache in layers:
        cache.state, cache.offset, cache.recorded = cache.recorded, length, []
    out: mx.array = forward(suffix, cache=layers)
    return out
