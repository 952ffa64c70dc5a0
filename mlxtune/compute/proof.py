"""Proof that a fast way computes what the plain one does, on the user's own model and real rows of the user's data.

It compares loss and gradients. A fresh adapter has B = 0, where every gradient of A is zero and half of a proof cannot
fail: the trainable tensors are moved by a seeded 1e-3 first, and put back bit for bit.

Activations are float32 whatever the run's type, for in 16 bits two right ways differ as much as a right and a wrong
one: on a GPU the order of a sum depends on the number of rows, and layers amplify that (a bfloat16 model of 30 layers:
to a tenth of its gradient; a mixture of experts, whose routing flips at near-ties: to a third). In the run's own type
the numbers must be finite. Where float32 does not fit the memory, ways are compared in the run's type, and a difference
counts against what the plain way differs from itself by, rows together and one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlxtune.compute import loss, stages
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.loss import Way
from mlxtune.compute.precision import blocks_of, in_float32
from mlxtune.compute.stages import Stages
from mlxtune.data.dataset.batches import Batch
from mlxtune.model.arrays import dtype_name, named, scalar, to_numpy
from mlxtune.model.classes import as_classes, calling

NUDGE = 1e-3
MAX_TOKENS = 1024  # of each of the proof's rows; more only where a sliding window is wider
FEWEST_TOKENS = 32  # their logits take less than a chunk of the head does
PROBE_TOKENS = 16  # on which checkpointing proves itself
PARTS = 3  # of each of the rows, where the way computes long ones in parts
# (loss, gradient) differences allowed, relative. Other orders of summation reach 3e-7 and 2e-5 in float32; a wrong mask
# shows as 0.1 and more in a gradient.
ALLOWED = (1e-5, 1e-3)
ALLOWED_IN_16_BITS = (1e-2, 0.1)
TIMES = 3  # in 16 bits: what the plain way differs from itself by, times this, is allowed as well,
CHAOS = 0.1  # as long as that difference is no larger than what a wrong mask makes

TINY = 1e-12  # in place of what is divided by, where that is zero

Sums = tuple[float, dict[str, np.ndarray]]  # a loss, and its gradients, float32, by the parameter's name


@dataclass(frozen=True)
class Room:
    """What the memory leaves to a proof."""

    tokens: int = MAX_TOKENS  # of a row, at most
    # Blocks are computed again in the backward pass, by the plain way and by the fast one, also where the run will not.
    checkpointed: bool = False
    raised: bool = True  # activations are float32, else of the run's own type


@dataclass(frozen=True)
class Difference:
    """How far two ways to compute one loss are apart."""

    loss: float  # relative; infinite where one of them is not finite
    gradient: float  # of the gradient that differs most: the norm of the difference over the norm of the gradient
    name: str = ""  # of that gradient's parameter

    def within(self, of_loss: float, of_gradient: float) -> bool:
        return self.loss <= of_loss and self.gradient <= of_gradient

    def __str__(self) -> str:
        return f"loss off by {self.loss:.1e}, gradient of {self.name} by {self.gradient:.1e}"


@dataclass(frozen=True)
class Verdict:
    """What comparing a way with the plain one says."""

    wrong: str = ""  # why the way must not be used, for people; "": it is proven
    hopeless: bool = False  # no other way can be proven either
    note: str = ""  # what a person must know of a proven way


def prove(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, room: Room) -> Verdict:
    """What comparing a way with the plain one says. dtype: of the run's activations. Raises whatever the model does."""
    way = divided(way, batch)
    if room.checkpointed:
        way = replace(way, recompute=way.recompute or 1)
    with nudged(model):
        if room.checkpointed:
            wrong = _checkpointing(model, batch, dtype)
            if wrong:
                return Verdict(wrong)
        if not room.raised:
            return _together(model, way, batch, dtype, room.checkpointed)
        with in_float32(model):
            verdict = _one_by_one(model, way, batch, room.checkpointed)
        if verdict.wrong or dtype == mx.float32:
            return verdict
        return _finite(model, way, batch, dtype, room.checkpointed)


def divided(way: Way, batch: Batch) -> Way:
    """The way with pieces that are short enough for the proof's rows to have several, of several chunks each."""
    rows, width = batch.ids.shape
    piece = max(2, width // PARTS)
    return replace(way, queries=min(way.queries, piece // 2), tokens=min(way.tokens, rows * piece))


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Inside, the trainable tensors are moved by a seeded nudge; after, they are the arrays that they were."""
    before = named(model.trainable_parameters())
    moved = {}
    for index, (name, array) in enumerate(before.items()):
        noise = mx.random.normal(array.shape, array.dtype, key=mx.random.key(index))
        moved[name] = array + NUDGE * noise
    model.update(tree_unflatten(list(moved.items())))
    try:
        yield
    finally:
        model.update(tree_unflatten(list(before.items())))


def _one_by_one(model: nn.Module, way: Way, batch: Batch, checkpointed: bool) -> Verdict:
    """The plain way takes most memory: row by row. Its sums then have another order, which float32 forgives."""
    wanted = plain_sums_by_row(model, batch, checkpointed)
    bad = _not_finite(wanted)
    if bad:
        return Verdict(f"nothing can be compared, for this model's own {bad} is not finite", hopeless=True)
    found = difference(sums_of(model, way, batch), wanted)
    if found.within(*ALLOWED):
        return Verdict()
    return Verdict(f"it does not reproduce this model ({found})")


def _together(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, checkpointed: bool) -> Verdict:
    """In the run's own type: both ways on the same rows."""
    name = dtype_name(dtype)
    wanted = plain_sums(model, batch, checkpointed)
    bad = _not_finite(wanted)
    if bad:
        return Verdict(f"nothing can be compared, for this model's own {bad} is not finite in {name}", hopeless=True)
    found = difference(sums_of(model, way, batch), wanted)
    if found.within(*ALLOWED_IN_16_BITS):
        return Verdict()
    floor = difference(plain_sums_by_row(model, batch, checkpointed), wanted)
    if floor.gradient > CHAOS:
        return Verdict(
            f"it is unproven: float32 does not fit the memory, and in {name} even the plain way, rows together and one "
            f"by one, differs from itself ({floor})"
        )
    of_loss = max(TIMES * floor.loss, ALLOWED_IN_16_BITS[0])
    of_gradient = max(TIMES * floor.gradient, ALLOWED_IN_16_BITS[1])
    if found.within(of_loss, of_gradient):
        return Verdict()
    return Verdict(f"it does not reproduce this model in {name} ({found})")


def _finite(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, checkpointed: bool) -> Verdict:
    """In the run's own type the numbers of a proven way must be finite, as far as the plain way's are."""
    bad = _not_finite(sums_of(model, way, batch))
    if not bad:
        return Verdict()
    name = dtype_name(dtype)
    own = _not_finite(plain_sums_by_row(model, batch, checkpointed))
    if not own:
        return Verdict(f"its {bad} is not finite in {name}, the plain way's is")
    return Verdict(note=f"this model's {own} is not finite in {name}, in float32 it is: set train.dtype=float32")


def _checkpointing(model: nn.Module, batch: Batch, dtype: mx.Dtype) -> str:
    """Why the plain way may not compute its blocks again, judged on a few tokens; "" when it may."""
    ids = batch.ids[:1, :PROBE_TOKENS]
    lengths = np.minimum(batch.lengths[:1], PROBE_TOKENS)
    few = replace(batch.part(slice(1)), ids=ids, lengths=lengths, mask=np.ones_like(ids, np.uint8))
    found = difference(plain_sums(model, few, checkpointed=True), plain_sums(model, few))
    allowed = ALLOWED if dtype == mx.float32 else ALLOWED_IN_16_BITS
    if found.within(*allowed):
        return ""
    return f"only with its blocks computed again does it fit the memory, and this model's cannot be ({found})"


def sums_of(model: nn.Module, way: Way, batch: Batch) -> Sums:
    """The sums of one batch as a run computes them. Of answers (of preferences) each weighs otherwise, so that one that
    was taken for another is seen.
    """
    gradients = Gradients(model, way)
    if not batch.sides.any():
        return _read(*gradients(batch))
    weights = mx.array(_weights(batch))
    value, _, tree = gradients.of_answers(batch, lambda sums: (weights.astype(sums.dtype) * sums).sum())
    return _read(value, tree)


def _weights(batch: Batch) -> np.ndarray:
    """[A] of the sums of a batch's answers."""
    return 1.0 + np.arange(batch.answers, dtype=np.float32)


def plain_sums(model: nn.Module, batch: Batch, checkpointed: bool = False) -> Sums:
    """The sums of one batch by the reference: nothing of the fast ways but that each stage is computed in its turn."""
    to_compute: Stages = []
    again = [(block, _computed_again(type(block), to_compute)) for block in blocks_of(model) if checkpointed]
    training = model.training
    model.train()
    try:
        with as_classes(again):
            value, tree = nn.value_and_grad(model, lambda: _plain(model, batch))()
    finally:
        model.train(training)
    stages.compute(to_compute, value, tree)
    return _read(value, tree)


def _plain(model: nn.Module, batch: Batch) -> mx.array:
    """What `sums_of` takes the gradient of, by the reference."""
    if not batch.sides.any():
        return loss.plain(model, batch)
    sums = loss.plain_answer_sums(model, batch)
    return (mx.array(_weights(batch)).astype(sums.dtype) * sums).sum()


def _computed_again(kind: type, to_compute: Stages) -> type:
    """`kind` with `mx.checkpoint` around its call. By itself, not by what runs use: that is to be proven.

    As in `checkpointing`, what a gradient flows into is passed. But there each number is found again by the order in
    which the tree is walked; here each place in the tree holds a function that finds it:

        args     (x, mask, cache)
        places   (take the 1st of the numbers, mask itself, cache itself)
        numbers  [x]
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        numbers: list[mx.array] = []  # a gradient may flow into these; masks and the like are closed over

        def place_of(leaf: Any) -> Any:
            if not (isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)):
                return lambda _: leaf
            numbers.append(leaf)
            index = len(numbers) - 1
            return lambda given: given[index]

        places = tree_map(place_of, (args, kwargs))

        def run(parameters: Any, given: list[mx.array]) -> Any:
            before = self.trainable_parameters()
            self.update(parameters)
            try:
                inner_args, inner_kwargs = tree_map(lambda place: place(given), places)
                return kind.__call__(self, *inner_args, **inner_kwargs)
            finally:
                self.update(before)

        def note(leaf: Any) -> None:
            if isinstance(leaf, mx.array):
                to_compute.append(leaf)

        out = mx.checkpoint(run)(self.trainable_parameters(), numbers)
        tree_map(note, out)
        return out

    return calling(kind, call)


def plain_sums_by_row(model: nn.Module, batch: Batch, checkpointed: bool = False) -> Sums:
    """As `plain_sums`, one row after the other."""
    total, summed = plain_sums(model, batch.part(slice(1)), checkpointed)
    for row in range(1, len(batch.rows)):
        value, tree = plain_sums(model, batch.part(slice(row, row + 1)), checkpointed)
        weight = float(_weights(batch)[batch.answer_of[row]]) if batch.sides.any() else 1.0
        total += weight * value
        summed = {name: gradient + weight * tree[name] for name, gradient in summed.items()}
    return total, summed


def _read(value: mx.array, tree: Any) -> Sums:
    return scalar(value), {name: to_numpy(array.astype(mx.float32)) for name, array in named(tree).items()}


def difference(got: Sums, wanted: Sums) -> Difference:
    """How far some sums are from those wanted; not finite counts as infinitely far."""
    got_loss, got_gradients = got
    wanted_loss, wanted_gradients = wanted
    of_gradients = [(_relative(got_gradients[name], gradient), name) for name, gradient in wanted_gradients.items()]
    worst, name = max(of_gradients)
    of_loss = abs(got_loss - wanted_loss) / max(abs(wanted_loss), TINY)
    if not math.isfinite(of_loss):
        of_loss = math.inf
    return Difference(of_loss, worst, name)


def _relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm of `wanted`; both are of one parameter's shape."""
    off = float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), TINY))
    return off if math.isfinite(off) else math.inf


def _not_finite(sums: Sums) -> str:
    """What of the sums is not finite, for people."""
    value, gradients = sums
    if not math.isfinite(value):
        return "loss"
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            return f"gradient of {name}"
    return ""
