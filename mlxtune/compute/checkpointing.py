"""Per-layer checkpointing: a block keeps its input and computes the rest again in the backward pass (Chen et al. 2016,
arXiv:1604.06174).

    forward   x0 -> [block 1] -> x1 -> [block 2] -> x2 -> loss      kept: x0, x1, x2
    backward  [block 2] is run again on x1, then differentiated; then [block 1] on x0

`mx.checkpoint` runs the block's Python again, so everything in it must be a function of its arguments: parameters,
hidden state, what a shared prefix hands on are passed, never closed over (MLX would give no gradient to what is
closed over, and say nothing); random masks are keyed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.compute.stages import Stages
from mlxtune.model.classes import as_classes, calling
from mlxtune.model.prefix_cache import LayerCache


@contextmanager
def recomputed(model: nn.Module, every: int, stages: Stages | None = None) -> Iterator[None]:
    """Inside, every `every`-th block of the model is checkpointed; 0: none. Blocks are themselves again after.

    stages: gets the blocks' outputs, so that they can be computed one by one.
    """
    outputs: Stages = [] if stages is None else stages
    blocks = model.layers[::every] if every else []
    classes = [(block, _recomputing(type(block), outputs)) for block in blocks]
    with as_classes(classes):
        yield


def checkpointed(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, computed again in the backward pass, with gradients to what is trainable in `module`."""

    def run(parameters: Any, *args: Any) -> Any:
        before = module.trainable_parameters()
        module.update(parameters)
        try:
            return function(*args)
        finally:
            module.update(before)  # the second run's parameters are copies that no one else may see

    return lambda *args: mx.checkpoint(run)(module.trainable_parameters(), *args)


def _recomputing(kind: type, stages: Stages) -> type:
    def note(leaf: Any) -> None:
        if flows(leaf):
            stages.append(leaf)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = checkpointed_call(self, kind.__call__, (args, kwargs))
        tree_map(note, out)
        return out

    return calling(kind, call)


def flows(leaf: Any) -> bool:
    """Whether a gradient may flow into an argument; masks of booleans and indices are closed over."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def checkpointed_call(block: nn.Module, call: Callable[..., Any], arguments: Any) -> Any:
    """call(block, *arguments), checkpointed.

    The arguments are any tree. What a gradient flows into is taken out of it and passed as a list: its arrays, and what
    its caches hold. When the block is run, then and again, the tree is filled with what was passed.
    """
    inputs: list[mx.array] = []
    caches: list[LayerCache] = []

    def take_out(leaf: Any) -> None:
        if flows(leaf):
            inputs.append(leaf)
        elif isinstance(leaf, LayerCache):
            caches.append(leaf)

    tree_map(take_out, arguments)

    def run(inputs: list[mx.array], states: list[list[mx.array]]) -> Any:
        inner = [cache.with_state(state) for cache, state in zip(caches, states, strict=True)]
        next_inputs, next_caches = iter(inputs), iter(inner)

        def fill_in(leaf: Any) -> Any:
            if flows(leaf):
                return next(next_inputs)
            if isinstance(leaf, LayerCache):
                return next(next_caches)
            return leaf

        args, kwargs = tree_map(fill_in, arguments)
        out = call(block, *args, **kwargs)
        return out, [[_apart(array) for array in cache.recorded] for cache in inner]

    states = [cache.state for cache in caches]
    out, recorded = checkpointed(block, run)(inputs, states)
    for cache, arrays in zip(caches, recorded, strict=True):
        cache.recorded = arrays
    return out


def _apart(array: mx.array) -> mx.array:
    """The same numbers as an array of its own, not copied.

    A block of Gemma 4 returns the keys and values that its cache records. Of an array that is among a function's
    results twice, `mx.checkpoint` takes one gradient and loses the other.
    """
    return mx.squeeze(mx.expand_dims(array, 0), 0)
