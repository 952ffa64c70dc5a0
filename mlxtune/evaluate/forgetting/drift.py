"""How a tuned model differs from its base on one text, token by token.

Legend: N tokens of the text that count, V vocabulary.

    KL(base || tuned) = sum over the vocabulary of p_base * (log p_base - log p_tuned), nats

0 where both expect the same. It weighs what the base expected: a tuned model that no longer does, pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxtune.adapter.attach import switched_off
from mlxtune.evaluate.forgetting.texts import Text
from mlxtune.model.arrays import scalar
from mlxtune.model.load import Loaded

AT_ONCE = 64  # tokens whose probabilities are computed at once


@dataclass(frozen=True)
class Drift:
    """Sums over the tokens of one text."""

    tokens: int  # that count
    base: float  # loss of the base, nats
    tuned: float  # loss of the tuned model, nats
    kl: float  # KL(base || tuned), nats
    agreed: int  # tokens for which both have the same most likely one


def drift(loaded: Loaded, text: Text) -> Drift:
    """loaded: with the adapter on it."""
    ids = mx.array([text.ids])
    with switched_off(loaded.model):
        base = loaded.model(ids[:, :-1])[0, text.first - 1 :]  # [N, V]
        mx.eval(base)
    tuned = loaded.model(ids[:, :-1])[0, text.first - 1 :]
    mx.eval(tuned)
    targets = ids[0, text.first :]  # [N]
    count = targets.size
    losses = [0.0, 0.0]
    kl, agreed = 0.0, 0
    for start in range(0, count, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        before, after = _log_probabilities(base[part]), _log_probabilities(tuned[part])
        for side, log_p in enumerate((before, after)):
            losses[side] -= scalar(mx.take_along_axis(log_p, targets[part, None], axis=-1).sum())
        kl += scalar((mx.exp(before) * (before - after)).sum())
        agreed += int(scalar((mx.argmax(before, axis=-1) == mx.argmax(after, axis=-1)).sum()))
    return Drift(count, losses[0], losses[1], kl, agreed)


def _log_probabilities(logits: mx.array) -> mx.array:
    """[N, V] -> [N, V]"""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
