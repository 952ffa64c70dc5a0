"""Per-layer checkpointing: a block keeps its input and computes the rest again in the backward pass (Chen et al. 2016,
arXiv:1604.06174).

    forward   x0 -> [block 1] -> x1 -> [block 2] -> x2 -> loss      kept: x0, x1, x2
    backward  [block 2] is run again on x1, then differentiated; then [block 1] on x0

The block's Python is run again, so everything in it must be a function of its arguments: parameters, hidden state, what
a shared prefix hands on are passed, never closed over (MLX would give no gradient to what is closed over, and say
nothing); random masks are keyed.

Where rows share what they begin with, a block is called once for each pass: a trunk, branch 1, branch 2.
`mx.checkpoint` would let all of them go back at once, for nothing tells MLX that one should wait for the other, and a
block would need the memory of three. So they take `Turns`:

    as MLX orders it    branch 1 again, branch 2 again, trunk again, then gradients of all    3 passes at a time
    in turns            branch 1 again, its gradients; branch 2 ...; trunk ...                1 pass at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.compute.stages import Stages
from mlxtune.model.arrays import named
from mlxtune.model.classes import as_classes, calling
from mlxtune.model.prefix_cache import LayerCache


@contextmanager
def recomputed(model: nn.Module, every: int, stages: Stages | None = None) -> Iterator[None]:
    """Inside, every `every`-th block of the model is checkpointed; 0: none. Blocks are themselves again after.

    stages: gets the blocks' outputs, so that they can be computed one by one.
    """
    outputs: Stages = [] if stages is None else stages
    classes: list[tuple[nn.Module, type]] = []
    turns: list[Turns] = []
    something_trains_before = False
    for place, block in enumerate(model.layers if every else []):
        if place % every == 0:
            turns.append(Turns(something_trains_before))
            classes.append((block, _recomputing(type(block), outputs, turns[-1])))
        something_trains_before = something_trains_before or bool(named(block.trainable_parameters()))
    try:
        with as_classes(classes):
            yield
    finally:
        for each in turns:  # classes are freed late, and with them what they know
            each.newest.clear()


@dataclass
class Turns:
    """Has the calls of one block go back one after the other, in the order in which their gradients are asked for."""

    # Whether a gradient of the block's input is wanted as well. Without it, nothing trains before the block.
    into: bool
    newest: list[mx.array] = field(default_factory=list)  # the gradients of the call that went back last


def checkpointed(module: nn.Module, function: Callable[..., Any], turns: Turns | None = None) -> Callable[..., Any]:
    """`function` of arrays, computed again in the backward pass, with gradients to what is trainable in `module`.

    turns: of the calls that wait for each other, as (inputs of a block, states that it is given); None: none does.
    """

    def run(parameters: Any, *args: Any) -> Any:
        before = module.trainable_parameters()
        module.update(parameters)
        try:
            return function(*args)
        finally:
            module.update(before)  # the second run's parameters are copies that no one else may see

    if turns is None:
        return lambda *args: mx.checkpoint(run)(module.trainable_parameters(), *args)
    return lambda *args: _in_turn(run, turns)(module.trainable_parameters(), *args)


def _in_turn(run: Callable[..., Any], turns: Turns) -> Callable[..., Any]:
    """run(parameters, inputs, states), computed again in the backward pass when it is its turn."""

    @mx.custom_function
    def once(*given: Any) -> Any:
        return run(*given)

    @once.vjp
    def again(given: Any, cotangents: Any, _: Any) -> Any:
        flowing = arrays_in(cotangents)
        when_it_is_its_turn = mx.depends(arrays_in(given), [*flowing, *turns.newest])
        found = gradients_of(lambda now: arrays_in(run(*now)), filled(given, when_it_is_its_turn), flowing)
        parameters, inputs, states = found
        # What is asked for is computed together. Else MLX would come back for some of it later, and until then all that
        # it is made of would wait.
        asked = (parameters, inputs if turns.into else [], states)
        if arrays := arrays_in(asked):
            turns.newest = mx.depends(arrays, arrays)
            parameters, bound, states = filled(asked, turns.newest)
            inputs = bound if turns.into else inputs
        return parameters, inputs, states

    return once


def gradients_of(function: Callable[[Any], list[mx.array]], given: Any, cotangents: list[mx.array]) -> Any:
    """mx.vjp of a function of a tree: a gradient for each of its arrays, of its shape, in a tree of the same form."""

    def of_arrays(*arrays: mx.array) -> list[mx.array]:
        return function(filled(given, arrays))

    _, found = mx.vjp(of_arrays, arrays_in(given), cotangents)
    return filled(given, found)


def arrays_in(tree: Any) -> list[mx.array]:
    """The arrays of a tree, of any shape."""
    found: list[mx.array] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, mx.array) else None, tree)
    return found


def filled(tree: Any, arrays: Any) -> Any:
    """The tree with other arrays in it, in the order of `arrays_in`."""
    following = iter(arrays)
    return tree_map(lambda leaf: next(following) if isinstance(leaf, mx.array) else leaf, tree)


def _recomputing(kind: type, stages: Stages, turns: Turns) -> type:
    def note(leaf: Any) -> None:
        if flows(leaf):
            stages.append(leaf)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = checkpointed_call(self, kind.__call__, (args, kwargs), turns)
        tree_map(note, out)
        return out

    return calling(kind, call)


def flows(leaf: Any) -> bool:
    """Whether a gradient may flow into an argument; masks of booleans and indices are closed over."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def checkpointed_call(block: nn.Module, call: Callable[..., Any], arguments: Any, turns: Turns | None = None) -> Any:
    """call(block, *arguments), checkpointed. turns: of the block's calls; None: it has one.

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
    out, recorded = checkpointed(block, run, turns)(inputs, states)
    for cache, arrays in zip(caches, recorded, strict=True):
        cache.recorded = arrays
    return out


def _apart(array: mx.array) -> mx.array:
    """The same numbers as an array of its own, not copied.

    A block of Gemma 4 returns the keys and values that its cache records. Of an array that is among a function's
    results twice, `mx.checkpoint` takes one gradient and loses the other.
    """
    return mx.squeeze(mx.expand_dims(array, 0), 0)
