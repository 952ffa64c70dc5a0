"""Per-layer checkpointing: a block keeps its input and computes the rest again in the backward pass (Chen et al. 2016,
arXiv:1604.06174).

`mx.checkpoint` runs the block's Python again, so everything in it must be a function of its arguments: parameters,
hidden state, the shared prefix's keys and values are passed, never closed over; random masks are keyed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.compute.prefix import PrefixCache


@contextmanager
def recomputed(model: nn.Module, every: int, stages: list[Any] | None = None) -> Iterator[None]:
    """Inside, every `every`-th block of the model is checkpointed; 0: none. Blocks are themselves again after.

    stages: gets the blocks' outputs, so that they can be computed one by one.
    """
    outputs: list[mx.array] = [] if stages is None else stages
    changed = [(block, type(block)) for block in model.layers[::every]] if every else []
    for block, kind in changed:
        block.__class__ = _recomputing(kind, outputs)
    try:
        yield
    finally:
        for block, kind in changed:
            block.__class__ = kind


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


def _recomputing(kind: type, stages: list[Any]) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = _run(self, kind.__call__, (args, kwargs))
        tree_map(lambda leaf: stages.append(leaf) if _is_input(leaf) else None, out)
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def _is_input(leaf: Any) -> bool:
    """Whether a gradient may flow into an argument; masks of booleans and indices are closed over."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _run(block: nn.Module, call: Callable[..., Any], arguments: Any) -> Any:
    inputs: list[mx.array] = []
    caches: list[PrefixCache] = []

    def collect(leaf: Any) -> None:
        if _is_input(leaf):
            inputs.append(leaf)
        elif isinstance(leaf, PrefixCache):
            caches.append(leaf)

    tree_map(collect, arguments)
    offsets = [cache.offset for cache in caches]  # as they are now: the second run comes after the passes moved them

    def run(inputs: list[mx.array], states: list[list[mx.array]]) -> Any:
        arrays = iter(inputs)
        inner = [PrefixCache(state, offset) for state, offset in zip(states, offsets, strict=True)]
        own = iter(inner)

        def fill(leaf: Any) -> Any:
            if _is_input(leaf):
                return next(arrays)
            return next(own) if isinstance(leaf, PrefixCache) else leaf

        args, kwargs = tree_map(fill, arguments)
        return call(block, *args, **kwargs), [cache.recorded for cache in inner]

    out, recorded = checkpointed(block, run)(inputs, [cache.state for cache in caches])
    for outer, new in zip(caches, recorded, strict=True):
        outer.recorded = new
    return out
