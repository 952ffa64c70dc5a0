"""What rows of a micro-batch begin with in common, computed once: system prompts, the history of a conversation.

    row 1   S S S S S S u u u a a a       S: the prefix, P = 6 tokens that both rows begin with
    row 2   S S S S S S v v a a a .       u, v: what else is asked; a: supervised; .: padding

    1st pass    [1, P]       S S S S S S              every layer records its keys and values: [1, heads, P, width]
                                  |
                                  v  state of the layer's cache (`LayerCache`)
    2nd pass    [B, T - P]   u u u a a a              attends to the recorded keys and values, which are repeated for
                             v v a a a .              every row, and then to its own; positions count on from P

Of B * T tokens P + B * (T - P) are computed. The recorded keys and values stay in the graph, so gradients flow through
the prefix exactly: each row adds its part. The last token of the prefix is never the one that predicts a target, for
the first pass gives no output.

In general there are several trunks, which rows leave at several depths: `data/dataset/forest.py` says which passes
there are (begin with its picture). A pass takes the first tokens of what its trunk recorded, as many as lie before it;
so one number says where its positions begin, and masks are those of any cache.

Gated delta layers hand on the state that they are in at the trunk's end, in place of keys and values. A state is of one
depth, so there a trunk is cut wherever rows leave it (`forest.left_at_ends`): no more tokens, but more passes.

A pass goes through the `cache` argument that mlx-lm's models take. Rejected: packing all rows into one sequence with a
block mask, which no model's own forward takes.

May anything be shared at all? `fast_ways.shared_prefix` decides that for a run, `forest_of_batch` for one micro-batch.

Legend: B rows, T tokens, P prefix tokens, N supervised positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlxtune.compute.trunk import Feed
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.beginnings import common, first_target
from mlxtune.data.dataset.forest import Forest, Pass
from mlxtune.model import gated_delta
from mlxtune.model.prefix_cache import LayerCache, PrefixCache, StateCache

GRAIN = 16  # a batch may share more than the run does: in multiples of so many tokens, so that shapes stay few
WORTH_SAYING = 8  # tokens: any chat template begins its rows with some
# Of one trunk that all rows leave at its end a GPU compiles the few shapes, and there are two passes. Any other forest
# must save this share of what that one computes.
WORTH_A_FOREST = 0.1


def caches_for(model: nn.Module) -> list[LayerCache] | None:
    """As many as the model makes for itself (layers may share one); None when it keeps anything but keys and values,
    and lists of arrays.
    """
    found: list[LayerCache] = []
    for own in make_prompt_cache(model):
        if type(own) in (KVCache, RotatingKVCache):
            found.append(PrefixCache())
        elif type(own) is ArraysCache:
            states = StateCache()
            states.places = len(own.cache)
            found.append(states)
        else:
            return None
    return found


def keeps_keys_alone(model: nn.Module) -> bool:
    """Whether a model keeps of earlier tokens nothing but keys and values."""
    found = caches_for(model)
    return found is not None and not _have_states(found)


def can_branch(model: nn.Module) -> bool:
    """Whether a model's layers keep what can be handed on: keys and values, and the states of gated delta layers."""
    found = caches_for(model)
    return found is not None and (not _have_states(found) or gated_delta.is_in(model))


def _have_states(layers: Sequence[LayerCache]) -> bool:
    return any(isinstance(layer, StateCache) for layer in layers)


def as_computed(model: nn.Module, passes: Forest) -> Forest:
    """The passes that a forest is computed in: where layers hand on a state, trunks are left at their ends alone."""
    if not passes.shares or keeps_keys_alone(model):
        return passes
    return forest.left_at_ends(passes)


def may_share(batch: Batch) -> np.ndarray:
    """[B] how many leading tokens of each row may lie in a trunk: those before the position that predicts its first
    target.
    """
    first_targets = 1 + batch.mask[:, 1:].argmax(axis=1)  # rows without a target do not reach a batch
    # A row's last token predicts nothing, and at least one token that predicts must follow the trunk.
    return np.maximum(0, np.minimum(first_targets - 1, batch.lengths - 2))


def shared_by_batch(batch: Batch) -> int:
    """Tokens that begin every row of a batch and lie before the position that predicts the first target."""
    if len(batch.rows) < 2:
        return 0
    same = (batch.ids == batch.ids[:1]).all(axis=0)  # [T]: whether all rows have the same token there
    alike = len(same) if same.all() else int(same.argmin())
    return min(alike, int(may_share(batch).min()))


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
    return int(length * (rows - 1) / (forest.MIN_SAVED * rows))


def if_it_gains(length: int, rows: int, width: int) -> int:
    """The length of a prefix that [rows, width] tokens share, or 0 where computing it once gains nothing."""
    return length if width <= widest_that_gains(length, rows) else 0


def length_for_batch(batch: Batch, of_run: int) -> int:
    """The length of the prefix that all rows of a batch share: at least what the whole run shares, and more in steps of
    GRAIN; 0 where the gain is nil.
    """
    length = shared_by_batch(batch)
    if length > of_run:
        length -= (length - of_run) % GRAIN
    rows, width = batch.ids.shape
    return if_it_gains(length, rows, width)


def forest_of_batch(batch: Batch, of_run: int | None) -> Forest:
    """The passes of a micro-batch.

    of_run: tokens that all rows of the run begin with; None: rows are computed whole.
    """
    rows, width = batch.ids.shape
    if of_run is None or rows < 2:
        return forest.whole(rows, width - 1)
    simple = forest.behind_one_trunk(rows, width - 1, length_for_batch(batch, of_run))
    ids = [batch.ids[row, :length] for row, length in enumerate(batch.lengths)]
    best = forest.forest_of(ids, may_share(batch).tolist())
    return best if best.shares and best.computed <= (1 - WORTH_A_FOREST) * simple.computed else simple


def is_simple(passes: Forest) -> bool:
    """Whether a forest is whole rows, or rows that leave one trunk at its end, all in one pass."""
    return len(passes.passes) - passes.shares == 1


def tokens_of(batch: Batch, each: Pass) -> np.ndarray:
    """[rows, width] int32: what goes through the model in one pass."""
    ids = batch.ids[list(each.rows), each.start : each.start + each.width]
    missing = each.width - ids.shape[1]
    return np.pad(ids, [(0, 0), (0, missing)])


def positions_of_targets(batch: Batch, passes: Forest) -> np.ndarray:
    """[N] flat positions, in what `through` returns, of what predicts a supervised token."""
    begin = np.zeros(len(batch.rows), np.int64)  # [B]: where position 0 of each row would be
    before = 0  # positions of the passes before
    for each in passes.passes:
        if not each.is_trunk:
            begin[list(each.rows)] = before + each.width * np.arange(len(each.rows)) - each.start
            before += each.computed
    row, column = np.nonzero(batch.mask[:, 1:])
    return (begin[row] + column).astype(np.int32)


def through(
    forward: Any, model: nn.Module, passes: Forest, ids: Sequence[mx.array], feed: Feed | None = None
) -> mx.array:
    """The output of all rows, pass after pass, [positions, D]; a trunk gives none.

    forward: the trunk or the model, called as forward(ids, cache=...); ids: of each pass, as `tokens_of` gives them;
    feed: told of each pass.
    """
    if not passes.shares:
        return _flat(forward(ids[0]))
    computed = as_computed(model, passes)
    kept: list[list[LayerCache]] = []  # of each pass, one for every layer
    outputs: list[mx.array] = []
    for each, tokens in zip(computed.passes, _cut(passes, computed, ids), strict=True):
        layers = _caches(model, each, [] if each.leaves is None else kept[each.leaves])
        kept.append(layers)
        if feed is not None:
            feed.take(each.rows, each.start, each.width)
        output = forward(tokens, cache=layers)
        if not each.is_trunk:
            outputs.append(_flat(output))
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _cut(passes: Forest, computed: Forest, ids: Sequence[mx.array]) -> list[mx.array]:
    """The tokens [rows, width] of the passes that are computed. ids: of the passes that these are pieces of."""
    tokens: list[mx.array] = []
    for whole, array in zip(passes.passes, ids, strict=True):
        begin = 0
        while begin < whole.width:
            piece = computed.passes[len(tokens)]
            tokens.append(array[:, begin : begin + piece.width])
            begin += piece.width
    return tokens


def _caches(model: nn.Module, each: Pass, trunk: list[LayerCache]) -> list[LayerCache]:
    """The caches of a pass. trunk: those of the pass that it leaves; []: it begins at the rows' beginning."""
    layers = caches_for(model)
    assert layers is not None
    for place, layer in enumerate(layers):
        layer.offset, layer.records = each.start, each.is_trunk
        if isinstance(layer, StateCache):
            layer.rows = len(each.rows)
        if trunk:
            layer.state = trunk[place].before(each.start)
    return layers


def _flat(output: mx.array) -> mx.array:
    """[B, T, D] -> [B * T, D]."""
    return output.reshape(-1, output.shape[-1])
