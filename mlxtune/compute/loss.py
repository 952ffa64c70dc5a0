"""Cross-entropy over supervised tokens, computed the plain way and the fast ones.

A loss is always a *sum* over tokens; whoever reports a mean divides once, by the count. Two micro-batches of one step:

    row 1   9 supervised tokens, of a loss of 2.0 each     sum 18.0
    row 2   1 supervised token, of a loss of 4.0           sum  4.0
    mean of the step       (18.0 + 4.0) / (9 + 1) = 2.2
    mean of the means      (2.0 + 4.0) / 2        = 3.0    the one token would weigh as much as the other nine together

`plain` is the reference: the logits of all positions, each position's loss times its mask, summed. That is what the
fast ways save: of a batch of 4 rows of 512 tokens with 300 supervised ones and a vocabulary of 150,000,

    plain           4 * 511 = 2,044 rows through the head, float32 logits of 1.2 GB
    split           300 rows through the head: a seventh of its work, 0.18 GB
    and in chunks   128 rows at a time: 0.077 GB, and never more, whatever the number of targets

So the fast way gathers the hidden states of the supervised positions and takes them through the head in chunks
(`head_loss`): the [rows, vocabulary] matrix never exists beyond one chunk.

Preferences need the loss of each answer by itself (`answer_sums`): what is made of these A numbers is a function that
can be asked only when all of them are known. The backward pass scales each token's gradient by that of its answer, so
it is exact whatever the function is. Two answers, with the loss f = log(1 + exp(a - b)) of their sums a and b:

    forward    a = 18.0, b = 20.0, and the gradient of each token's own loss, [N, D]
    backward   df/da = 0.12, df/db = -0.12: the rows of the first answer times 0.12, those of the second times -0.12

The loss of supervised training is the case of one sum.

Legend: B rows, A answers, T tokens, N supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute import head_loss, last_block, prefix
from mlxtune.compute.head import Split
from mlxtune.compute.stages import Stages
from mlxtune.compute.trunk import Feed, left_out
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.forest import Forest
from mlxtune.model.corrections import extent


@dataclass(frozen=True)
class Way:
    """How the loss is computed. With nothing set it is the plain way."""

    split: Split | None = None  # runs the head apart from the trunk, on supervised positions only; None: on all
    head_trained: bool = False  # something trainable is reachable from the head, so it needs gradients as well
    # Tokens that all rows of the run share and that are computed once (a batch may share more); None: every row is
    # computed whole. 0 is not None: nothing is shared by all, but what a batch shares is computed once.
    prefix: int | None = None
    recompute: int = 0  # every n-th block keeps its input only, and computes the rest again going back; 0: none does
    powers: bool = False  # exponentials are computed as powers of two, on Linux's CPU (`linux_cpu`)
    compiled: bool = False  # as one compiled function, on a GPU (`gradients`)
    queries: int = 0  # of attention, whose scores are computed at once and not kept (`attention`); 0: MLX's attention
    tokens: int = 0  # of a piece in which every checkpointed block is computed (`pieces`); 0: rows as a whole
    nested: int = 0  # checkpointed blocks that keep one input together (`pieces`); 0: each keeps its own
    parts: tuple[str, ...] = ()  # what of the model is computed otherwise, by its names in `parts.PARTS`
    small_chunks: bool = False  # the head takes half as many positions at a time, where memory comes before time
    frozen: int = 0  # the outputs of so many first blocks are computed once for each row (`trunk`); 0: of none
    beside: int = 0  # results that each of those blocks gives beside its hidden states


def plain(model: nn.Module, batch: Batch) -> mx.array:
    """The reference: logits [B, T, V] of all positions, cross-entropy times mask, summed. Scalar, float32.

    It stays apart from the code of the fast ways, though a way with nothing set would give the same sum: what is
    compared with it must not share its faults.
    """
    ids = mx.array(batch.ids)
    logits = head_loss.as_float32(model(ids[:, :-1]))
    losses = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")
    return (losses * mx.array(batch.mask[:, 1:]).astype(losses.dtype)).sum()


def plain_answer_sums(model: nn.Module, batch: Batch) -> mx.array:
    """The reference of `answer_sums`, as `plain` is that of one sum: [A], float32."""
    ids = mx.array(batch.ids)
    losses = nn.losses.cross_entropy(head_loss.as_float32(model(ids[:, :-1])), ids[:, 1:], reduction="none")
    of_rows = (losses * mx.array(batch.mask[:, 1:]).astype(losses.dtype)).sum(axis=1)
    is_of_answer = mx.array(batch.answer_of[None] == np.arange(batch.answers)[:, None])  # [A, B]
    return mx.where(is_of_answer, of_rows[None], 0).sum(axis=1)


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch as what a fast way takes: arrays, and what they are of."""

    ids: list[mx.array]  # of each pass, [rows, width] int32; a row's last token is in none, for it predicts nothing
    positions: mx.array  # [N] int32: which of the trunk's outputs, all passes' in one list, predict a supervised token
    targets: mx.array  # [N] int32: those tokens
    weights: mx.array | None  # [N, 1] float32: 0 for targets that only fill up, else 1; None: none of them does
    passes: Forest  # which rows each of the passes is of
    states: mx.array | None = None  # [B, T, D]: what the frozen blocks give; None: no block is left out
    answer_of: mx.array | None = None  # [N] int32: the answer of each target; None: all losses are one sum
    answers: int = 1  # A, where losses are summed answer by answer


def inputs_of(batch: Batch, shared: int | None, count: int = 0, states: mx.array | None = None) -> LossInputs:
    """The arrays of a micro-batch: `LossInputs` has their shapes.

    shared: the run's common prefix, None: rows are computed whole; count: N is filled up to so many, 0: it is not.
    """
    passes = prefix.forest_of_batch(batch, shared)
    positions = prefix.positions_of_targets(batch, passes)
    _, targets = batch.supervised()
    weights = None
    if count:
        is_real = np.arange(count) < len(targets)
        weights = mx.array(is_real[:, None].astype(np.float32))
        missing = count - len(targets)
        positions = np.pad(positions, (0, missing), mode="edge")
        targets = np.pad(targets, (0, missing), mode="edge")
    ids = [mx.array(prefix.tokens_of(batch, each)) for each in passes.passes]
    return LossInputs(ids, mx.array(positions), mx.array(targets), weights, passes, states)


def answer_sums(
    model: nn.Module,
    way: Way,
    batch: Batch,
    stages: Stages | None = None,
    states: mx.array | None = None,
    backward: bool = True,
) -> mx.array:
    """[A] the loss of each answer, summed over its supervised tokens, float32: minus its log-probability.

    Rows that the model rotates otherwise (`extent`) are computed apart, in the same graph. stages, states: as in
    `of_batch`; backward: whether a gradient will be asked for. Without it the head takes half the time, and the sums
    have the same bits.
    """
    stages = [] if stages is None else stages
    parts = extent.alike(batch, extent.longest_alike(model))
    if len(parts) > 1:  # a block that is computed again would be told the positions of the last part
        way = replace(way, parts=tuple(name for name in way.parts if name != "last_block"))
    sums = []
    for rows, part in parts:
        own = states
        if states is not None and len(parts) > 1:
            own = states[mx.array(rows), : part.ids.shape[1] - 1]
        part = replace(part, answer_of=batch.answer_of[rows])
        sums.append(_answer_sums_of_part(model, way, part, batch.answers, stages, own, backward))
    return sum(sums[1:], sums[0])


def _answer_sums_of_part(
    model: nn.Module,
    way: Way,
    part: Batch,
    answers: int,
    stages: Stages,
    states: mx.array | None,
    backward: bool,
) -> mx.array:
    """[answers] what rows that are rotated alike add to the sum of each answer; 0 of answers of other rows."""
    if way.split is None and way.prefix is None and states is None:
        found = plain_answer_sums(model, part)
        return found if answers == part.answers else mx.pad(found, (0, answers - part.answers))
    row_of, _ = np.nonzero(part.mask[:, 1:])
    inputs = inputs_of(part, way.prefix, states=states)
    inputs = replace(inputs, answer_of=mx.array(part.answer_of[row_of]), answers=answers)
    return of_inputs(model, way, inputs, stages, backward)


def of_batch(
    model: nn.Module, way: Way, batch: Batch, stages: Stages | None = None, states: mx.array | None = None
) -> mx.array:
    """The same sum as `plain`, computed as `way` says. Scalar, float32.

    stages: gets the arrays that are to be computed one after the other before the rest; None: they are not asked for.
    states: as in `LossInputs`.
    """
    if way.split is None and way.prefix is None and states is None:
        return plain(model, batch)
    return of_inputs(model, way, inputs_of(batch, way.prefix, states=states), [] if stages is None else stages)


def of_inputs(model: nn.Module, way: Way, inputs: LossInputs, stages: Stages, backward: bool = True) -> mx.array:
    """As `of_batch`, of a batch that is arrays already: a scalar, float32; or [A], where losses are summed answer by
    answer. backward: as in `answer_sums`.
    """
    by_last_block = "last_block" in way.parts
    if inputs.states is None:
        outputs = supervised_outputs(model, way.split, inputs, by_last_block)
    else:
        feed = Feed(inputs.states)
        with left_out(model, way.frozen, feed, way.beside):
            outputs = supervised_outputs(model, way.split, inputs, by_last_block, feed)
    if way.split is None:
        assert inputs.weights is None
        return head_loss.summed(
            nn.losses.cross_entropy(head_loss.as_float32(outputs), inputs.targets, reduction="none"), inputs
        )
    kernel = "kernels" in way.parts
    cut = list(head_loss.chunks(outputs, way.split.vocabulary, way.small_chunks))
    if not backward and inputs.weights is None:
        return head_loss.forward_alone(way.split, outputs, inputs, cut, kernel)
    if way.head_trained:
        return head_loss.through_trained(model, way.split, outputs, inputs, cut, kernel)
    return head_loss.through_frozen(way.split, outputs, inputs, cut, stages, kernel)


def supervised_outputs(
    model: nn.Module,
    split: Split | None,
    inputs: LossInputs,
    by_last_block: bool = False,
    feed: Feed | None = None,
) -> mx.array:
    """Hidden states [N, D] at the positions, for the head still to run on; without a split the logits themselves,
    [N, V].

    by_last_block: whether the trunk itself may give the positions alone (`last_block`); it does where all of them are
    in one pass. feed: of blocks that are left out, which is told of each pass.
    """
    by_last_block = by_last_block and prefix.is_simple(inputs.passes)
    if by_last_block:
        last_block.give(inputs.positions)
    forward: Any = model if split is None else split.hidden
    outputs = prefix.through(forward, model, inputs.passes, inputs.ids, feed)
    return outputs if by_last_block else outputs[inputs.positions]
