"""Loss, perplexity and token accuracy on held-out rows, every row counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute.head import Split
from mlxtune.compute.head_loss import chunks
from mlxtune.compute.loss import inputs_of, supervised_outputs
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Batch, in_order
from mlxtune.data.dataset.examples import Examples
from mlxtune.model.arrays import scalar
from mlxtune.model.corrections import extent
from mlxtune.model.load import Loaded

SPLIT_TOKENS = 64  # of a row: on them the head apart from the trunk must give the logits of the model itself
MOST_LOSS = 700.0  # nats a token: the perplexity of more is not a float (e to the 709.8 is the largest)


@dataclass(frozen=True)
class Score:
    """Sums over supervised tokens."""

    loss_sum: float  # nats
    tokens: int  # how many were scored
    correct: int  # of which so many were the most likely token

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MOST_LOSS))

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def score_examples(loaded: Loaded, config: Config, examples: Examples) -> Score:
    """Score a loaded model on examples. Raises UserError for a token that the model has no embedding for."""
    loaded.check_ids([[examples.highest]])
    batches = in_order(examples)
    return score(loaded.model, split_for(loaded, config, batches[-1]), batches)


def split_for(loaded: Loaded, config: Config, batch: Batch) -> Split | None:
    """The proven head split, or None when `fast.head` is off or the model's own logits are not reproduced.

    batch: its first row is what the proof is made on.
    """
    if config.fast.head == "off":
        return None
    tokens = min(SPLIT_TOKENS, batch.ids.shape[1])
    return Split.of(loaded.model, mx.array(batch.ids[:1, :tokens]))


def score(
    model: nn.Module,
    split: Split | None,
    batches: Sequence[Batch],
    shared: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Score a model on batches. Legend: N supervised positions, D width, V vocabulary.

    split: the head apart from the trunk, so that logits are computed for supervised positions alone; None: the model
    gives its logits for every token. shared: as in `inputs_of`; between: called before each batch, and may raise to
    break off.
    """
    loss_sum, tokens, correct = 0.0, 0, 0
    for batch in _alike(model, batches):
        between()
        for loss, right in _of_targets(model, split, batch, shared):
            loss_sum += scalar(loss.sum())
            correct += int(scalar(right.sum()))
        tokens += batch.targets
    return Score(loss_sum, tokens, correct)


def losses_of_each(
    model: nn.Module, split: Split | None, batches: Sequence[Batch], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """([count] the summed loss of each example in nats, [count] how many tokens of it that is of); 0 for those that are
    in no batch. count: of the examples that the batches' `rows` number; model, split: as in `score`.
    """
    sums = np.zeros(count)
    tokens = np.zeros(count, np.int64)
    for batch in _alike(model, batches):
        losses = np.concatenate([np.array(loss) for loss, _ in _of_targets(model, split, batch, None)])  # [N]
        positions, _ = batch.supervised()
        examples = batch.rows[positions // (batch.ids.shape[1] - 1)]  # [N] whose each supervised token is
        np.add.at(sums, examples, losses)
        np.add.at(tokens, examples, 1)
    return sums, tokens


def _of_targets(
    model: nn.Module, split: Split | None, batch: Batch, shared: int | None
) -> Iterator[tuple[mx.array, mx.array]]:
    """(Loss in nats, whether it was the most likely token), [C] each, of a batch's supervised tokens, a chunk of C at a
    time: no more logits than those of a chunk are there at once.
    """
    inputs = inputs_of(batch, shared)
    rows = supervised_outputs(model, split, inputs)  # [N, D] hidden states; without a split [N, V] logits
    targets = inputs.targets  # [N]
    mx.eval(rows)  # else every chunk below would hold the whole trunk's graph
    width = rows.shape[-1] if split is None else split.vocabulary
    for chunk in chunks(rows, width):
        logits = rows[chunk] if split is None else split.logits(rows[chunk])
        logits = logits.astype(mx.float32)
        yield nn.losses.cross_entropy(logits, targets[chunk]), mx.argmax(logits, axis=-1) == targets[chunk]


def _alike(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches, divided where the model computes long rows otherwise than short ones (`extent`)."""
    limit = extent.longest_alike(model)
    for batch in batches:
        yield from extent.parts(batch, limit)
