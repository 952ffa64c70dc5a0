"""A prefix that all rows of a batch share, computed once (system prompt, tool definitions).

    row 1   S S S S S S u u u a a a       S: the prefix, P = 6 tokens that every row begins with
    row 2   S S S S S S v v a a a .       u, v: what else is asked; a: supervised; .: padding

    1st pass    [1, P]       S S S S S S              every layer records its keys and values: [1, heads, P, width]
                                  |
                                  v  state of the layer's PrefixCache
    2nd pass    [B, T - P]   u u u a a a              attends to the recorded keys and values, which are repeated for
                             v v a a a .              every row, and then to its own; positions count on from P

Of B * T tokens P + B * (T - P) are computed. The recorded keys and values stay in the graph, so gradients flow through
the prefix exactly: each row adds its part. The last token of the prefix is never the one that predicts a target, for
the first pass gives no output.

The second pass goes through the `cache` argument that mlx-lm's models take. Rejected: packing all rows into one
sequence with a block mask, which no model's own forward takes.

May a prefix be shared at all? `fast_ways.shared_prefix` decides that for a run, `length_for_batch` for one batch.

Legend: B rows, T tokens, P prefix tokens, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxtune.compute.trunk import Feed
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.beginnings import common, first_target
from mlxtune.model.prefix_cache import PrefixCache

# Up to 8 queries MLX's attention on Metal has kernels of its own, for generation. A gradient takes none of them (in
# MLX's source `is_training` turns them off), so nothing is known to fail below 9; staying above costs a few tokens.
MIN_SUFFIX = 9
GRAIN = 16  # a batch may share more than the run does: in multiples of so many tokens, so that shapes stay few
MIN_SAVED = 0.04  # share of a batch's tokens; below, the second pass costs what it saves
WORTH_SAYING = 8  # tokens: any chat template begins its rows with some


def caches_for(model: nn.Module) -> list[PrefixCache] | None:
    """As many as the model makes for itself (layers may share one); None when it keeps anything but keys and
    values.
    """
    own = make_prompt_cache(model)
    for cache in own:
        if type(cache) not in (KVCache, RotatingKVCache):
            return None
    return [PrefixCache() for _ in own]


def shared_by_batch(batch: Batch) -> int:
    """Tokens that begin every row of a batch and lie before the position that predicts the first target."""
    if len(batch.rows) < 2:
        return 0
    same = (batch.ids == batch.ids[:1]).all(axis=0)  # [T]: whether all rows have the same token there
    alike = len(same) if same.all() else int(same.argmin())
    first_target = 1 + int(batch.mask[:, 1:].argmax(axis=1).min())  # rows without a target do not reach a batch
    shortest = int(batch.lengths.min())
    # A row's last token predicts nothing, and at least one token that predicts must follow the prefix.
    return max(0, min(alike, first_target - 1, shortest - 2))


def shared_by_run(examples: Sequence[Example]) -> int:
    """Tokens that begin every row of a run and lie before the first target's predictor."""
    first = list(examples[0].ids)
    length = len(first) - 2
    for example in examples:
        length = min(length, first_target(example) - 1)
        length = min(length, common(example.ids[:length], first[:length]))
    return max(0, length)


def widest_that_gains(length: int, rows: int) -> int:
    """The widest batch, in tokens of a row, for which a shared prefix of `length` tokens saves enough.

    It saves length * (rows - 1) of rows * width tokens, and that must be MIN_SAVED of them.
    """
    return int(length * (rows - 1) / (MIN_SAVED * rows))


def if_it_gains(length: int, rows: int, width: int) -> int:
    """The length of a prefix that [rows, width] tokens share, or 0 where computing it once gains nothing."""
    return length if width <= widest_that_gains(length, rows) else 0


def length_for_batch(batch: Batch, of_run: int) -> int:
    """The prefix length for a batch: at least what the whole run shares, and more in steps of GRAIN; 0 where the gain
    is nil.
    """
    length = shared_by_batch(batch)
    if length > of_run:
        length -= (length - of_run) % GRAIN
    rows, width = batch.ids.shape
    return if_it_gains(length, rows, width)


def positions_of_targets(batch: Batch, length: int) -> np.ndarray:
    """[N] flat positions, in what `in_two_passes` returns, of what predicts a supervised token."""
    row, column = np.nonzero(batch.mask[:, 1:])
    width = max(MIN_SUFFIX, batch.ids.shape[1] - 1 - length)  # of a suffix, as `in_two_passes` pads it
    return (row * width + column - length).astype(np.int32)


def in_two_passes(forward: Any, model: nn.Module, ids: mx.array, length: int, feed: Feed | None = None) -> mx.array:
    """[B, T] tokens -> output [B, T - P, D] of the suffixes, padded to MIN_SUFFIX tokens at least.

    forward: the trunk or the model, called as forward(ids, cache=...); length: P; feed: told of each pass.
    """
    layers = caches_for(model)
    assert layers is not None
    suffix = ids[:, length:]
    missing = MIN_SUFFIX - suffix.shape[1]
    if missing > 0:
        suffix = mx.pad(suffix, [(0, 0), (0, missing)])
    if feed is not None:
        feed.take([0], 0, length)
    forward(ids[:1, :length], cache=layers)
    for cache in layers:
        cache.state, cache.offset, cache.recorded = cache.recorded, length, []
    if feed is not None:
        feed.take(range(len(suffix)), length, suffix.shape[1])
    out: mx.array = forward(suffix, cache=layers)
    return out
