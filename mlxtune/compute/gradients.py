"""Loss and gradients of a micro-batch, computed with as little memory as they need, compiled where that pays.

On Metal and CUDA the whole computation is compiled: MLX fuses its small kernels, and Python builds its graph once for
every signature (shapes of ids and targets, length of the prefix). A compiled graph takes some 0.5 MB a block, and
compiling it seven times as long as building it once. So signatures are few: batches have few widths, targets are filled
up with some that weigh nothing, what is used once is not compiled, and of the others the ones used last are kept, as
many as `memory.kept_signatures` lets. On the CPU, compiling would start a C++ compiler for every kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute import loss, prefix
from mlxtune.compute.checkpointing import recomputed
from mlxtune.compute.loss import Placed, Way
from mlxtune.compute.memory import prediction
from mlxtune.data.dataset.batches import Batch
from mlxtune.machine import backend
from mlxtune.model.arrays import named
from mlxtune.model.linux_cpu import as_powers_of_two

MIN_FILL = 16

Signature = tuple[int, int, int, int]


class Gradients:
    """Call it with a micro-batch, get (loss summed over its supervised tokens, gradients by the path), computed or, on
    a GPU, handed to it.

    What is random in the model must be set before; a compiled way must have nothing random. compiled_from: the first
    use of a signature, counted from 1, that is compiled.
    """

    def __init__(self, model: nn.Module, way: Way, compiled_from: int = 1) -> None:
        self.model = model
        self.way = way
        self.compiled_from = compiled_from
        self.kept = prediction.kept_signatures(len(model.layers), backend.memory_bytes())
        self.traced = 0  # signatures compiled so far, each time they were
        self._uses: Counter[Signature] = Counter()
        self._compiled: dict[Signature, Any] = {}  # the one used last at the end

    def __call__(self, batch: Batch) -> tuple[mx.array, Any]:
        stages: list[mx.array] = []
        if self.way.compiled and self.note(batch):
            placed = loss.place(batch, self.way.prefix, filled(batch.targets))
            function = self._function(self._signature(batch))
            value, gradients, stages = function(self.model.trainable_parameters(), *vars(placed).values())
        else:
            value, gradients = self._asked(lambda: loss.along(self.model, self.way, batch, stages), stages)
        finish(stages, value, gradients)
        return value, gradients

    def note(self, batch: Batch) -> bool:
        """Count a use of the batch's signature; whether this one is compiled.

        A compiled function's last bits may be others than those of the same operations one by one. So whoever goes on
        with a run notes the batches before, and computes each with the function that an uninterrupted run has for it.
        """
        signature = self._signature(batch)
        self._uses[signature] += 1
        if self._uses[signature] < self.compiled_from:
            return False
        self._compiled[signature] = self._compiled.pop(signature, None)
        if len(self._compiled) > self.kept:
            oldest = next(iter(self._compiled))
            del self._compiled[oldest], self._uses[oldest]  # used once more, it may well be for the last time
        return True

    def _signature(self, batch: Batch) -> Signature:
        """What a compiled graph is made for: rows, width, targets, length of the prefix."""
        rows, width = batch.ids.shape
        length = 0 if self.way.prefix is None else prefix.usable(batch, self.way.prefix)
        return rows, width, filled(batch.targets), length

    def _function(self, signature: Signature) -> Any:
        """One function for each signature: a function that goes takes its compiled graph with it."""
        if self._compiled[signature] is None:
            self._compiled[signature] = mx.compile(self._traced)
            self.traced += 1
        return self._compiled[signature]

    def _traced(self, parameters: Any, *placed: Any) -> tuple[mx.array, Any, list[mx.array]]:
        before, stages = self.model.trainable_parameters(), list[mx.array]()
        self.model.update(parameters)
        try:
            wanted = Placed(*placed)
            value, gradients = self._asked(lambda: loss.of_placed(self.model, self.way, wanted, stages), stages)
        finally:
            self.model.update(before)  # while a function is compiled its parameters are stand-ins
        return value, gradients, stages

    def _asked(self, summed: Any, stages: list[mx.array]) -> tuple[mx.array, Any]:
        training = self.model.training
        self.model.train()  # mlx-lm's recurrent layers have kernels for generating that know no gradient
        try:
            with recomputed(self.model, self.way.recompute, stages), as_powers_of_two(self.way.powers):
                value, gradients = nn.value_and_grad(self.model, summed)()
        finally:
            self.model.train(training)
        return value, gradients


def filled(count: int) -> int:
    """The number of targets filled up to a multiple of a quarter of the power of two below it: a tenth more on average,
    for four signatures an octave.
    """
    grain = max(MIN_FILL, 1 << max(0, count.bit_length() - 3))
    return -(-count // grain) * grain


def finish(stages: list[mx.array], value: mx.array, gradients: Any) -> None:
    """Compute a loss and its gradients, or, on a GPU, hand them to it: the caller waits once.

    MLX allocates ahead of what it computes, in an order of its own. So the graph goes in stages: first `stages`, in the
    order in which the forward pass made them (checkpointed blocks, chunks of the head), then the gradients, last layer
    first. Waiting for each would leave a GPU idle between them.
    """
    take = mx.async_eval if backend.policy().queued else mx.eval
    while stages:
        take(stages.pop(0))
    for layer in sorted(by_layer := _by_layer(gradients), reverse=True):
        take(by_layer[layer])
    take(value, gradients)


def _by_layer(gradients: Any) -> dict[int, list[mx.array]]:
    found: dict[int, list[mx.array]] = {}
    for name, array in named(gradients).items():
        layer = re.search(r"\.(\d+)\.", name)  # model.layers.3.mlp..., transformer.h.3.mlp...
        found.setdefault(int(layer[1]) if layer else -1, []).append(array)
    return found
