"""Loss, perplexity and token accuracy on held-out rows, every row counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute.head import Split
from mlxtune.compute.loss import chunks, inputs_of, supervised_outputs
from mlxtune.data.dataset.batches import Batch
from mlxtune.model.arrays import scalar
from mlxtune.model.corrections import extent


@dataclass(frozen=True)
class Score:
    """Sums over supervised tokens: of the loss (nats), of the tokens, of those whose most likely token was right."""

    loss_sum: float
    tokens: int
    correct: int

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def score(
    model: nn.Module,
    split: Split | None,
    batches: Sequence[Batch],
    shared: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Score a model on batches. Legend: N supervised positions, D width, V vocabulary.

    shared: as in `inputs_of`; between: called before each batch, and may raise to break off.
    """
    loss_sum, tokens, correct = 0.0, 0, 0
    limit = extent.longest_alike(model)
    for alike in (part for batch in batches for part in extent.parts(batch, limit)):
        between()
        inputs = inputs_of(alike, shared)
        rows, targets = supervised_outputs(model, split, inputs), inputs.targets
        mx.eval(rows)  # else every chunk below would hold the whole trunk's graph
        for chunk in chunks(rows, rows.shape[-1] if split is None else split.vocabulary):
            part, wanted = rows[chunk], targets[chunk]
            logits = (part if split is None else split.logits(part)).astype(mx.float32)
            loss = nn.losses.cross_entropy(logits, wanted, reduction="sum")
            right = (mx.argmax(logits, axis=-1) == wanted).sum()
            loss_sum += scalar(loss)
            correct += int(scalar(right))
        tokens += targets.size
    return Score(loss_sum, tokens, correct)
