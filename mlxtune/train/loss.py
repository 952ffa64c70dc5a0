"""Cross-entropy over supervised tokens.

A loss is always a *sum* over tokens; whoever reports a mean divides once by the count. Legend: B rows, T tokens, N
supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtune.data.batches import Batch
from mlxtune.model.head import Split


def plain(model: nn.Module, batch: Batch) -> mx.array:
    """The reference: logits of all positions, cross-entropy times mask, summed. Scalar, float32."""
    ids = mx.array(batch.ids)
    logits = model(ids[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")
    return (losses * mx.array(batch.mask[:, 1:]).astype(mx.float32)).sum()


def supervised_rows(model: nn.Module, split: Split | None, batch: Batch) -> tuple[mx.array, mx.array]:
    """(rows, targets [N]) at the positions that predict a supervised token.

    rows: hidden states [N, D] for the head still to run on; without a split the logits themselves, [N, V].
    """
    positions, targets = batch.supervised()
    ids = mx.array(batch.ids[:, :-1])
    out = model(ids) if split is None else split.hidden(ids)
    return out.reshape(-1, out.shape[-1])[mx.array(positions)], mx.array(targets)


def supervised(model: nn.Module, split: Split, batch: Batch) -> mx.array:
    """The same sum as `plain`, with the head run at supervised positions only. Scalar, float32."""
    rows, targets = supervised_rows(model, split, batch)
    return nn.losses.cross_entropy(split.logits(rows).astype(mx.float32), targets, reduction="sum")
