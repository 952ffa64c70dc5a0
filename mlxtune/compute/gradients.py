"""Loss and gradients of a micro-batch, computed with as little memory as they need, compiled where that pays.

On Metal and CUDA the whole computation is compiled: MLX fuses its small kernels, and Python builds its graph once for
every signature (shapes of the passes, number of targets). A compiled graph takes some 0.5 MB a block, and
compiling it seven times as long as building it once. So signatures are few: batches have few widths, targets are filled
up with some that weigh nothing, what is used once is not compiled, and of the others the ones used last are kept, as
many as `prediction.kept_signatures` lets. On the CPU, compiling would start a C++ compiler for every kernel.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute import attention, loss, parts, pieces, prefix, stages
from mlxtune.compute.checkpointing import recomputed
from mlxtune.compute.loss import LossInputs, Way
from mlxtune.compute.memory import prediction
from mlxtune.compute.stages import Stages
from mlxtune.compute.trunk_states import RowStates
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.forest import Forest
from mlxtune.machine import backend
from mlxtune.model.linux_cpu import as_powers_of_two

MIN_FILL = 16  # targets: below four times as many, a quarter of a power of two would make too many signatures


class Signature(NamedTuple):
    """What a compiled graph is made for: of a micro-batch, all that is in the graph itself and in no array given to it.

    What is missing here is that of the first micro-batch in all others, without an error.
    """

    passes: tuple[tuple[int, int, int], ...]  # of each pass its rows, the tokens before it, and its tokens of a row
    targets: int  # N, filled up
    # Where states of frozen blocks are fed, (T of these states, the rows of each pass in their order), for the graph
    # itself takes them out of the micro-batch's states. Else (): ids come in the order of the passes.
    fed: tuple[Any, ...]


class Gradients:
    """Call it with a micro-batch, get (loss summed over its supervised tokens, gradients by the path), computed or, on
    a GPU, handed to it.

    What is random in the model must be set before; a compiled way must have nothing random. compiled_from: the first
    use of a signature, counted from 1, that is compiled.
    """

    def __init__(self, model: nn.Module, way: Way, compiled_from: int = 1, states: RowStates | None = None) -> None:
        """states: of the run's rows, where blocks are left out; None: they are computed for each micro-batch."""
        self.model = model
        self.way = way
        self.compiled_from = compiled_from
        self.kept = prediction.kept_signatures(len(model.layers), backend.memory_bytes())
        self._states = states or RowStates(model, way)
        self.traced = 0  # signatures compiled so far, each time they were
        self._uses: Counter[Signature] = Counter()
        # The compiled function of each signature, the one used last at the end; None: to be compiled at its next call.
        self._compiled: dict[Signature, Any] = {}

    def __call__(self, batch: Batch) -> tuple[mx.array, Any]:
        """(a scalar, the tree of gradients, each of its parameter's shape)."""
        to_compute: Stages = []
        states = self._states.of(batch) if self.way.frozen else None
        if self.way.compiled and self.count_use(batch):
            inputs = loss.inputs_of(batch, self.way.prefix, rounded_up(batch.targets), states)
            function = self._compiled_for(self._signature(batch, inputs.passes), inputs.passes)
            arrays = (inputs.ids, inputs.positions, inputs.targets, inputs.weights, inputs.states)
            value, gradients, to_compute = function(self.model.trainable_parameters(), *arrays)
        else:

            def summed() -> mx.array:
                return loss.of_batch(self.model, self.way, batch, to_compute, states)

            value, gradients = self._value_and_grad(summed, to_compute)
        stages.compute(to_compute, value, gradients)
        return value, gradients

    def of_answers(self, batch: Batch, value_of: Callable[[mx.array], mx.array]) -> tuple[mx.array, mx.array, Any]:
        """(the value that `value_of` makes of the answers' sums, these sums [A] as `loss.answer_sums` gives them, the
        tree of gradients of the value).

        value_of: any differentiable function [A] -> scalar of what the batch's answers sum to. Never compiled.
        """
        to_compute: Stages = []
        states = self._states.of(batch) if self.way.frozen else None

        def valued() -> tuple[mx.array, mx.array]:
            sums = loss.answer_sums(self.model, self.way, batch, to_compute, states)
            return value_of(sums), sums

        (value, sums), gradients = self._value_and_grad(valued, to_compute)
        to_compute.append([value, sums])
        stages.compute(to_compute, value, gradients)
        return value, sums, gradients

    def answer_sums(self, batch: Batch) -> mx.array:
        """The sums [A] alone, with the bits that `of_answers` gives and without what only a gradient needs."""
        to_compute: Stages = []
        states = self._states.of(batch) if self.way.frozen else None
        with self._training(to_compute):
            sums = loss.answer_sums(self.model, self.way, batch, to_compute, states, backward=False)
        stages.compute(to_compute, sums, {})
        return sums

    def count_use(self, batch: Batch) -> bool:
        """Count a use of the batch's signature; whether this one is compiled. A forest of many passes never is: its
        shapes hardly come twice.

        A compiled function's last bits may be others than those of the same operations one by one. So whoever goes on
        with a run counts the batches before, and computes each with the function that an uninterrupted run has for it.
        """
        passes = prefix.forest_of_batch(batch, self.way.prefix)
        if not prefix.is_simple(passes):
            return False
        signature = self._signature(batch, passes)
        self._uses[signature] += 1
        if self._uses[signature] < self.compiled_from:
            return False
        self._compiled[signature] = self._compiled.pop(signature, None)
        if len(self._compiled) > self.kept:
            oldest = next(iter(self._compiled))
            del self._compiled[oldest], self._uses[oldest]  # used once more, it may well be for the last time
        return True

    def _signature(self, batch: Batch, passes: Forest) -> Signature:
        """passes: the batch's forest, a simple one."""
        shapes = tuple((len(each.rows), each.start, each.width) for each in passes.passes)
        fed: tuple[Any, ...] = ()
        if self.way.frozen:
            fed = (batch.ids.shape[1] - 1, tuple(each.rows for each in passes.passes))
        return Signature(shapes, rounded_up(batch.targets), fed)

    def _compiled_for(self, signature: Signature, passes: Forest) -> Any:
        """One function for each signature: a function that goes takes its compiled graph with it."""
        if self._compiled[signature] is None:
            self._compiled[signature] = mx.compile(functools.partial(self._compiled_body, passes))
            self.traced += 1
        return self._compiled[signature]

    def _compiled_body(
        self,
        passes: Forest,
        parameters: Any,
        ids: list[mx.array],
        positions: mx.array,
        targets: mx.array,
        weights: mx.array | None,
        states: mx.array | None,
    ) -> tuple[mx.array, Any, Stages]:
        """What is compiled: (loss, gradients, stages) of the trainable parameters and what is in a `LossInputs`."""
        inputs = LossInputs(ids, positions, targets, weights, passes, states)
        to_compute: Stages = []

        def summed() -> mx.array:
            return loss.of_inputs(self.model, self.way, inputs, to_compute)

        before = self.model.trainable_parameters()
        self.model.update(parameters)
        try:
            value, gradients = self._value_and_grad(summed, to_compute)
        finally:
            self.model.update(before)  # while a function is compiled its parameters are stand-ins
        return value, gradients, to_compute

    def _value_and_grad(self, summed: Any, to_compute: Stages) -> tuple[Any, Any]:
        """(what `summed()` gives, the gradients of that scalar, or of the first of several), not yet computed."""
        with self._training(to_compute):
            value, gradients = nn.value_and_grad(self.model, summed)()
        return value, gradients

    @contextmanager
    def _training(self, to_compute: Stages) -> Iterator[None]:
        """Inside, the model computes as in a step, its blocks as the way says."""
        training = self.model.training
        self.model.train()  # mlx-lm's recurrent layers have kernels for generating that know no gradient
        try:
            with as_said(self.model, self.way, to_compute):
                yield
        finally:
            self.model.train(training)


@contextmanager
def as_said(model: nn.Module, way: Way, to_compute: Stages | None = None) -> Iterator[None]:
    """Inside, the model computes its blocks as `way` says. to_compute: as in `checkpointing.recomputed`."""
    with (
        parts.within(model, way.parts),
        as_powers_of_two(way.powers),
        attention.in_chunks(way.queries) as masks,
    ):
        blocks: AbstractContextManager[Any]
        if way.tokens:
            blocks = pieces.recomputed(model, way.tokens, way.nested, masks, to_compute)
        else:
            blocks = recomputed(model, way.recompute, to_compute)
        with blocks:
            yield


def rounded_up(count: int) -> int:
    """A number of targets, rounded up to a multiple of a quarter of the power of two below it.

    1,000 lies above 512, a quarter of which is 128: it becomes 1,024. So a tenth is filled up on average, and there are
    four signatures for each doubling.
    """
    quarter = 1 << max(0, count.bit_length() - 3)
    grain = max(MIN_FILL, quarter)
    return -(-count // grain) * grain
