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


def supervised_logits(model: nn.Module, split: Split | None, batch: Batch) -> tuple[mx.array, mx.array]:
    """(logits [N, V] float32, targets [N]) at the positions that predict a supervised token.

    With a split the head runs on these N rows alone; without one it runs on all and N are picked.
    """
    positions, targets = batch.supervised()
    ids = mx.array(batch.ids[:, :-1])
    where = mx.array(positions)
    if split is None:
        logits = model(ids)
        rows = logits.reshape(-1, logits.shape[-1])[where]
    else:
        hidden = split.hidden(ids)
        rows = split.logits(hidden.reshape(-1, hidden.shape[-1])[where])
    return rows.astype(mx.float32), mx.array(targets)


def supervised(model: nn.Module, split: Split | None, batch: Batch) -> mx.array:
    """The same sum as `plain`, computed at supervised positions only. Scalar, float32."""
    logits, targets = supervised_logits(model, split, batch)
    return nn.losses.cross_entropy(logits, targets, reduction="sum")
