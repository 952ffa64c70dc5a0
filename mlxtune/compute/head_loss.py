"""The loss of hidden states, through the head, a chunk of positions at a time.

The logits of all supervised positions [N, V] never exist at once: a chunk's [C, V] do, and go before the next chunk's
come. Of 300 positions, a vocabulary of 150,000 and chunks of 128:

    rows 0 .. 127      logits of 0.077 GB -> 128 losses, 128 gradients of hidden rows
    rows 128 .. 255    the same again
    rows 256 .. 299    0.026 GB

Where the head is frozen, loss and hidden gradient come out of the same pass: two matrix products a chunk; computing the
chunk again in the backward pass would take three. Where it is trained its parameters need gradients, so it is.

Legend: A answers, N supervised positions, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute.checkpointing import checkpointed
from mlxtune.compute.head import Split
from mlxtune.compute.stages import Stages
from mlxtune.machine import backend

if TYPE_CHECKING:
    from mlxtune.compute.loss import LossInputs

CHUNK_BYTES = 64 << 20  # of one chunk's float32 logits, before its rows are rounded to whole tiles
MIN_CHUNK_ROWS = 64  # fewer make a thin matrix product, whatever the vocabulary


def chunk_rows(width: int, vocabulary: int, saving: bool = False) -> int:
    """C: the logits of a chunk [C, V] take about a quarter of the head's own matrix [V, D] in float32, at most; an
    eighth where memory is to be saved.

    On a GPU C is the nearest multiple of the device's tile: a chunk of 110 or 130 rows costs as much as one of 128. The
    nearest, not the one below: 64 rows instead of 110 would read the head nearly twice as often.
    """
    within_bytes = CHUNK_BYTES // (4 * vocabulary)  # 4 bytes a float32
    rows = max(MIN_CHUNK_ROWS, min(width // 4, within_bytes) // (2 if saving else 1))
    tile = backend.policy().tile
    tiles = max(1, (rows + tile // 2) // tile)
    return tiles * tile


def chunks(rows: mx.array, vocabulary: int, saving: bool = False) -> Iterator[slice]:
    """Cut hidden rows [N, D] so that a chunk's logits [C, V] stay small. saving: as in `chunk_rows`."""
    size = chunk_rows(rows.shape[-1], vocabulary, saving)
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def through_frozen(
    split: Split, rows: mx.array, inputs: LossInputs, cut: Sequence[slice], stages: Stages, kernel: bool
) -> mx.array:
    """Loss and gradient of hidden rows [N, D] in one forward pass; the backward pass only scales.

    Nothing in the head may be trainable: gradients to what a custom function closes over are silently zero.
    """

    @mx.custom_function
    def head(rows: mx.array) -> tuple[mx.array, mx.array]:
        """(summed losses, the gradient [N, D] of each position's own loss)."""
        total = _nothing_summed(rows, inputs)
        gradients: list[mx.array] = []
        for chunk in cut:
            part = rows[chunk]
            if gradients:
                # Each chunk waits for the one before: computed ahead, all their logits would be alive at once.
                part = mx.depends([part], [total, gradients[-1]])[0]
            losses, gradient = _with_gradient(_chunk_losses(split, inputs, chunk, kernel, of_sum=True), part)
            total = _added(total, losses, inputs, chunk)
            gradients.append(gradient)
            stages.append([total, gradient])
        return total, mx.concatenate(gradients)

    @head.vjp
    def head_vjp(_: Any, cotangents: Any, outputs: Any) -> mx.array:
        scale = cotangents[0] if inputs.answer_of is None else cotangents[0][inputs.answer_of][:, None]
        return (scale * outputs[1]).astype(rows.dtype)

    out: Any = head(rows)
    return out[0]


def through_trained(
    model: nn.Module, split: Split, rows: mx.array, inputs: LossInputs, cut: Sequence[slice], kernel: bool
) -> mx.array:
    """The loss of hidden rows [N, D]; the chunks' logits are computed again in the backward pass, which gives the
    head's parameters their gradients.
    """
    total = _nothing_summed(rows, inputs)
    for chunk in cut:
        part = mx.depends([rows[chunk]], [total])[0]
        losses = checkpointed(model, _chunk_losses(split, inputs, chunk, kernel))(part)
        total = _added(total, losses, inputs, chunk)
    return total


def forward_alone(split: Split, rows: mx.array, inputs: LossInputs, cut: Sequence[slice], kernel: bool) -> mx.array:
    """The loss of hidden rows [N, D], all real targets, of which no gradient is wanted."""
    total = _nothing_summed(rows, inputs)
    for chunk in cut:
        part = mx.depends([rows[chunk]], [total])[0]
        logits, targets = split.logits(part), inputs.targets[chunk]
        if kernel:
            losses = mx.fast.cross_entropy(logits, targets)
        else:
            losses, _, _ = _exponentials(as_float32(logits), targets)
        total = _added(total, losses, inputs, chunk)
    return total


def _nothing_summed(rows: mx.array, inputs: LossInputs) -> mx.array:
    """A zero; one for each answer where losses are summed answer by answer."""
    dtype = as_float32(rows[:0]).dtype
    return mx.array(0.0, dtype) if inputs.answer_of is None else mx.zeros((inputs.answers,), dtype)


def _added(total: mx.array, losses: mx.array, inputs: LossInputs, chunk: slice) -> mx.array:
    """losses: [C] of a chunk, added to their sum, or to those of their answers."""
    if inputs.answer_of is None:
        return total + losses.sum()
    # A table [A, C], not a scatter: a GPU adds what is scattered to one place in an order of its own.
    is_of_answer = inputs.answer_of[chunk][None] == mx.arange(inputs.answers)[:, None]
    return total + mx.where(is_of_answer, losses[None], 0).sum(axis=1)


def summed(losses: mx.array, inputs: LossInputs) -> mx.array:
    """losses: [N]."""
    return _added(_nothing_summed(losses, inputs), losses, inputs, slice(None))


def _with_gradient(losses_of: Callable[[mx.array], mx.array], part: mx.array) -> tuple[mx.array, mx.array]:
    """(losses [C] of hidden rows [C, D], the gradient [C, D] of each with regard to its own row)."""

    def of(part: mx.array) -> tuple[mx.array, mx.array]:
        losses = losses_of(part)
        return losses.sum(), losses

    (_, losses), gradient = mx.value_and_grad(of)(part)
    return losses, gradient


def _chunk_losses(
    split: Split, inputs: LossInputs, chunk: slice, kernel: bool, of_sum: bool = False
) -> Callable[[mx.array], mx.array]:
    """[C, D] hidden rows -> [C] their losses.

    For one position, with the logits z and the target t:

        loss      log(sum_i exp(z_i)) - z_t  =  log(sum_i exp(z_i - m)) + m - z_t     m: the largest logit, so that no
        gradient  softmax(z) - one_hot(t)                                             exponential overflows

    kernel: whether MLX's own does it, which on a GPU takes 16-bit logits as they are and keeps nothing beside them.
    of_sum: a gradient will be asked for of the losses' sum alone.
    """
    targets = inputs.targets[chunk]
    weights = None if inputs.weights is None else inputs.weights[chunk, 0]

    @mx.custom_function
    def cross_entropy(logits: mx.array) -> tuple[mx.array, mx.array]:
        """[C, V] -> (losses [C], their gradients [C, V]): one exponential of each logit serves both."""
        losses, exp_logits, sum_exp = _exponentials(logits, targets)
        softmax = exp_logits / sum_exp
        return losses, softmax.at[mx.arange(targets.size), targets].subtract(1)

    @cross_entropy.vjp
    def cross_entropy_vjp(_: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        if of_sum and weights is None:
            return outputs[1]  # times 1, which would be a copy as large as the logits
        return cotangents[0][:, None] * outputs[1]

    def losses_of(rows: mx.array) -> mx.array:
        if kernel:
            losses = mx.fast.cross_entropy(split.logits(rows), targets)
        else:
            out: Any = cross_entropy(as_float32(split.logits(rows)))
            losses = out[0]
        return losses if weights is None else losses * weights

    return losses_of


def _exponentials(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """([C] the losses of logits [C, V], exp(z - m) [C, V], its sum [C, 1]); z, m: as in `_chunk_losses`."""
    max_logit = logits.max(axis=-1, keepdims=True)
    exp_logits = mx.exp(logits - max_logit)
    sum_exp = exp_logits.sum(axis=-1, keepdims=True)
    target_logit = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = mx.log(sum_exp) + max_logit - target_logit
    return losses[:, 0], exp_logits, sum_exp


def as_float32(array: mx.array) -> mx.array:
    """An array of any shape in float32, where softmax and its sums are computed; float64 (a test's oracle) stays."""
    return array if array.dtype == mx.float64 else array.astype(mx.float32)
