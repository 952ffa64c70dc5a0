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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlxtune.compute import loss, prefix
from mlxtune.compute.gradients import Gradients, finish
from mlxtune.compute.loss import Way
from mlxtune.compute.precision import blocks_of, in_float32
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate, lengths_of
from mlxtune.data.dataset.beginnings import MIN_GROUP_TOKENS, common, groups
from mlxtune.machine import backend
from mlxtune.model.arrays import dtype_name, named, scalar, to_numpy

NUDGE = 1e-3
MAX_TOKENS = 1024  # of each of the proof's two rows; more only where a sliding window is wider
FEWEST_TOKENS = 32  # their logits take less than a chunk of the head does
PROBE_TOKENS = 16  # on which checkpointing proves itself
LOGITS_SHARE = 0.06  # of the memory, for the plain way's logits: about three float32 copies of them are alive
# (loss, gradient) differences allowed, relative. Other orders of summation reach 3e-7 and 2e-5 in float32; a wrong mask
# shows as 0.1 and more in a gradient.
ALLOWED = (1e-5, 1e-3)
ALLOWED_IN_16_BITS = (1e-2, 0.1)
TIMES = 3  # in 16 bits: what the plain way differs from itself by, times this, is allowed as well,
CHAOS = 0.1  # as long as that difference is no larger than what a wrong mask makes

Sums = tuple[float, dict[str, np.ndarray]]  # a loss, and its gradients by name


@dataclass(frozen=True)
class Room:
    """What the memory leaves to a proof.

    tokens: of a row, at most; checkpointed: blocks are computed again in the backward pass, by the plain way and by the
    fast one, also where the run will not; raised: activations are float32, else of the run's own type.
    """

    tokens: int = MAX_TOKENS
    checkpointed: bool = False
    raised: bool = True


@dataclass(frozen=True)
class Difference:
    """Of two ways to compute one loss: relative, of the loss and of the gradient that differs most."""

    loss: float
    gradient: float
    name: str = ""

    def within(self, of_loss: float, of_gradient: float) -> bool:
        return self.loss <= of_loss and self.gradient <= of_gradient

    def __str__(self) -> str:
        return f"loss off by {self.loss:.1e}, gradient of {self.name} by {self.gradient:.1e}"


@dataclass(frozen=True)
class Verdict:
    """wrong: why a way must not be used, for people, "" when it is proven; hopeless: no other way can be proven
    either; note: what a person must know of a proven way.
    """

    wrong: str = ""
    hopeless: bool = False
    note: str = ""


def of(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, room: Room) -> Verdict:
    """What comparing a way with the plain one says. dtype: of the run's activations. Raises whatever the model does."""
    if room.checkpointed:
        way = replace(way, recompute=way.recompute or 1)
    with nudged(model):
        if room.checkpointed and (wrong := _checkpointing(model, batch, dtype)):
            return Verdict(wrong)
        if not room.raised:
            return _together(model, way, batch, dtype, room.checkpointed)
        with in_float32(model):
            verdict = _one_by_one(model, way, batch, room.checkpointed)
        if verdict.wrong or dtype == mx.float32:
            return verdict
        return _finite(model, way, batch, dtype, room.checkpointed)


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Inside, the trainable tensors are moved by a seeded nudge; after, they are the arrays that they were."""
    before = named(model.trainable_parameters())
    moved = {
        name: array + NUDGE * mx.random.normal(array.shape, array.dtype, key=mx.random.key(index))
        for index, (name, array) in enumerate(before.items())
    }
    model.update(tree_unflatten(list(moved.items())))
    try:
        yield
    finally:
        model.update(tree_unflatten(list(before.items())))


def _one_by_one(model: nn.Module, way: Way, batch: Batch, checkpointed: bool) -> Verdict:
    """The plain way takes most memory: row by row. Its sums then have another order, which float32 forgives."""
    wanted = plainly_by_row(model, batch, checkpointed)
    if bad := _not_finite(wanted):
        return Verdict(f"nothing can be compared, for this model's own {bad} is not finite", hopeless=True)
    found = difference(gradients(model, way, batch), wanted)
    return Verdict("" if found.within(*ALLOWED) else f"it does not reproduce this model ({found})")


def _together(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, checkpointed: bool) -> Verdict:
    """In the run's own type: both ways on the same rows."""
    name = dtype_name(dtype)
    wanted = plainly(model, batch, checkpointed)
    if bad := _not_finite(wanted):
        return Verdict(f"nothing can be compared, for this model's own {bad} is not finite in {name}", hopeless=True)
    found = difference(gradients(model, way, batch), wanted)
    if found.within(*ALLOWED_IN_16_BITS):
        return Verdict()
    floor = difference(plainly_by_row(model, batch, checkpointed), wanted)
    if floor.gradient > CHAOS:
        return Verdict(
            f"it is unproven: float32 does not fit the memory, and in {name} even the plain way, rows together and one "
            f"by one, differs from itself ({floor})"
        )
    allowed = (max(TIMES * floor.loss, ALLOWED_IN_16_BITS[0]), max(TIMES * floor.gradient, ALLOWED_IN_16_BITS[1]))
    return Verdict("" if found.within(*allowed) else f"it does not reproduce this model in {name} ({found})")


def _finite(model: nn.Module, way: Way, batch: Batch, dtype: mx.Dtype, checkpointed: bool) -> Verdict:
    """In the run's own type the numbers of a proven way must be finite, as far as the plain way's are."""
    bad = _not_finite(gradients(model, way, batch))
    if not bad:
        return Verdict()
    name = dtype_name(dtype)
    own = _not_finite(plainly_by_row(model, batch, checkpointed))
    if not own:
        return Verdict(f"its {bad} is not finite in {name}, the plain way's is")
    return Verdict(note=f"this model's {own} is not finite in {name}, in float32 it is: set train.dtype=float32")


def _checkpointing(model: nn.Module, batch: Batch, dtype: mx.Dtype) -> str:
    """Why the plain way may not compute its blocks again, judged on a few tokens; "" when it may."""
    ids = batch.ids[:1, :PROBE_TOKENS]
    few = Batch(batch.rows[:1], ids, np.minimum(batch.lengths[:1], PROBE_TOKENS), np.ones_like(ids, np.uint8))
    found = difference(plainly(model, few, checkpointed=True), plainly(model, few))
    if found.within(*(ALLOWED if dtype == mx.float32 else ALLOWED_IN_16_BITS)):
        return ""
    return f"only with its blocks computed again does it fit the memory, and this model's cannot be ({found})"


def gradients(model: nn.Module, way: Way, batch: Batch) -> Sums:
    """The sums of one batch as a run computes them."""
    value, tree = Gradients(model, way)(batch)
    return _read(value, tree)


def plainly(model: nn.Module, batch: Batch, checkpointed: bool = False) -> Sums:
    """The sums of one batch by the reference: nothing of the fast ways but that each stage is computed in its turn."""
    stages: list[mx.array] = []
    training = model.training
    model.train()
    try:
        with _computed_again(model, stages) if checkpointed else nullcontext():
            value, tree = nn.value_and_grad(model, lambda: loss.plain(model, batch))()
    finally:
        model.train(training)
    finish(stages, value, tree)
    return _read(value, tree)


@contextmanager
def _computed_again(model: nn.Module, stages: list[mx.array]) -> Iterator[None]:
    """Inside, `mx.checkpoint` around every block. By itself, not by what runs use: that is to be proven."""
    changed = [(block, type(block)) for block in blocks_of(model)]
    for block, kind in changed:
        block.__class__ = _again(kind, stages)
    try:
        yield
    finally:
        for block, kind in changed:
            block.__class__ = kind


def _again(kind: type, stages: list[mx.array]) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        numbers: list[mx.array] = []  # a gradient may flow into these; masks and the like are closed over

        def out_of(leaf: Any) -> Any:
            if not (isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)):
                return lambda _: leaf
            numbers.append(leaf)
            place = len(numbers) - 1
            return lambda given: given[place]

        places = tree_map(out_of, (args, kwargs))

        def run(parameters: Any, given: list[mx.array]) -> Any:
            before = self.trainable_parameters()
            self.update(parameters)
            try:
                inner, named_ones = tree_map(lambda place: place(given), places)
                return kind.__call__(self, *inner, **named_ones)
            finally:
                self.update(before)

        out = mx.checkpoint(run)(self.trainable_parameters(), numbers)
        tree_map(lambda leaf: stages.append(leaf) if isinstance(leaf, mx.array) else None, out)
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def plainly_by_row(model: nn.Module, batch: Batch, checkpointed: bool = False) -> Sums:
    """As `plainly`, one row after the other."""
    total, summed = plainly(model, batch.part(slice(1)), checkpointed)
    for row in range(1, len(batch.rows)):
        value, tree = plainly(model, batch.part(slice(row, row + 1)), checkpointed)
        total += value
        summed = {name: gradient + tree[name] for name, gradient in summed.items()}
    return total, summed


def _read(value: mx.array, tree: Any) -> Sums:
    return scalar(value), {name: to_numpy(array.astype(mx.float32)) for name, array in named(tree).items()}


def difference(got: Sums, wanted: Sums) -> Difference:
    """How far some sums are from those wanted; not finite counts as infinitely far."""
    worst, name = max((_relative(got[1][name], gradient), name) for name, gradient in wanted[1].items())
    off = abs(got[0] - wanted[0]) / max(abs(wanted[0]), 1e-12)
    return Difference(off if math.isfinite(off) else math.inf, worst, name)


def _relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm of `wanted`."""
    off = float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
    return off if math.isfinite(off) else math.inf


def _not_finite(sums: Sums) -> str:
    """What of the sums is not finite, for people."""
    if not math.isfinite(sums[0]):
        return "loss"
    return next((f"gradient of {name}" for name, array in sums[1].items() if not np.isfinite(array).all()), "")


def rows_for(examples: Sequence[Example], way: Way, grouped: bool, tokens: int = MAX_TOKENS) -> Batch:
    """Two real rows: the longest ones, so that sliding windows are passed where the data passes them, as far as the
    plain way's logits fit the memory. Where rows are grouped, those that share the most.

    tokens: of a row, at most.
    """
    if way.split is not None:
        fit = int(LOGITS_SHARE * backend.memory_bytes() / (24 * max(1, way.split.vocabulary)))
        tokens = min(tokens, max(FEWEST_TOKENS, fit))
    order = np.argsort(-lengths_of(examples), kind="stable").tolist()
    shared = way.prefix
    if grouped:
        pairs = [group[:2] for group in groups(examples, MIN_GROUP_TOKENS)]
        together = {tuple(pair): common(examples[pair[0]].ids, examples[pair[1]].ids) for pair in pairs}
        best = max(together, key=together.__getitem__, default=())
        order = [*best, *order]
        shared = together.get(best, shared)
    if shared:
        tokens = min(tokens, prefix.longest_worth_it(shared, rows=2))
    return collate([_cut(examples[index], tokens) for index in (order * 2)[:2]], [0, 1])


def _cut(example: Example, tokens: int) -> Example:
    """The first tokens of a row; its last quarter is supervised when its own targets were cut off."""
    ids, mask = example.ids[:tokens], example.mask[:tokens]
    if not any(mask[1:]):
        mask = [int(place >= len(ids) * 3 // 4) for place in range(len(ids))]
    return Example(ids, mask)
