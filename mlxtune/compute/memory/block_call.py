"""What one call of a block keeps for the backward pass, and needs on the way: from the graph of the call.

A block is made a function of arrays alone (`_AsFunction`), its graph is taken down with its gradients, and a ledger
goes through that graph twice:

    forward, then backward   what stays alive between the two is what the block keeps
    backward from the input  as where the block is checkpointed: everything is computed again

Nothing is computed, and calls that are alike are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxtune.compute import last_block
from mlxtune.compute.checkpointing import flows
from mlxtune.compute.memory.graph import Graph, Node, traced
from mlxtune.compute.memory.kernels import Device, standing_in, tiled_attention
from mlxtune.compute.memory.ledger import Ledger
from mlxtune.compute.memory.own_attention import OwnAttention, attention_is
from mlxtune.model.arrays import named
from mlxtune.model.prefix_cache import LayerCache

QUEUED = 105  # operations ahead of the oldest unfinished one, on the CPU (ten tasks of ten: scheduler.h, encoder.h)
JOINED = 0.95  # of what the written-out attention keeps, ours keeps at least


@dataclass(frozen=True)
class Cost:
    """Bytes of one call of a block."""

    given: int  # its result, and the arrays that its caches record
    recorded: int  # those alone
    kept: int  # what stays for the backward pass, the result included
    forward: int  # the most that is alive on the way forward
    back: int  # the most that is alive on the way back, beside what is kept
    again: int  # the most that is alive going back from the input alone
    slices: int  # the gradients of all slices together, each as large as the array that was sliced
    operations: int  # not bytes: how many its graph has


@dataclass(frozen=True)
class Blank:
    """In place of an array whose numbers do not matter."""

    shape: tuple[int, ...]  # lengths of its axes
    dtype: mx.Dtype  # of its numbers

    def zeros(self) -> mx.array:
        """An array of that shape; it is never computed."""
        return mx.zeros(self.shape, self.dtype)


@dataclass(frozen=True)
class Called:
    """What is known of a block's call."""

    cost: Cost  # in bytes
    out: Any  # what it gave, with a Blank for each array
    recorded: list[list[Blank]]  # arrays that each of its caches recorded


_known: dict[Any, Called] = {}  # by what decides a call's graph, and the device


def cost_of(
    block: nn.Module, call: Any, args: Any, kwargs: Any, into: bool, device: Device, output: bool = True
) -> Called:
    """What call(block, *args, **kwargs) costs.

    into: whether a gradient is wanted for what the block is given; output: whether its own result is needed, and not
    only the arrays that its cache records.
    """
    key = (_signature(block, args, kwargs, into), device, output)
    if key in _known:
        return _known[key]
    called = _traced(block, call, args, kwargs, into, device, output)
    # Our own attention is taken down in several passes, which MLX makes one of by joining what is equal. Where it
    # joins too little, a part of what is kept would be missing: then an attention that keeps as much stands for ours.
    # Where no result is needed attention is not computed, but ours is taken down with its backward pass.
    if device.queries:
        with attention_is(tiled_attention, after=mx.fast.scaled_dot_product_attention):
            other = _traced(block, call, args, kwargs, into, device, output)
        if not output:
            called = other
        elif called.cost.kept < JOINED * other.cost.kept:
            called = replace(called, cost=replace(called.cost, kept=other.cost.kept))
    elif device.powers:
        with standing_in(replace(device, powers=False)):
            other = _traced(block, call, args, kwargs, into, device, output)
        if not output or called.cost.kept < JOINED * other.cost.kept:
            called = other
    _known[key] = called
    return called


def _traced(block: nn.Module, call: Any, args: Any, kwargs: Any, into: bool, device: Device, output: bool) -> Called:
    function = _AsFunction(block, call, args, kwargs, into, output)
    before = block.parameters()
    try:
        graph = traced(function.with_gradients, function.arguments())
    finally:
        block.update(before)
    cost = _cost(graph, function, device)
    return Called(cost, function.out, function.recorded)


class _AsFunction:
    """A block's call as a function of arrays: of its inputs, its trainable parameters and its frozen ones."""

    def __init__(self, block: nn.Module, call: Any, args: Any, kwargs: Any, into: bool, output: bool) -> None:
        self.block, self.call, self.args, self.kwargs, self.into = block, call, args, kwargs, into
        self.output = output
        self.caches = caches_in((args, kwargs))
        self.inputs = [leaf for leaf in _leaves((args, kwargs)) if flows(leaf)]
        self.states = [array for cache in self.caches for array in cache.state]
        self.trainable = named(block.trainable_parameters())
        self.frozen = {}
        for path, array in named(block.parameters()).items():
            if path not in self.trainable:
                self.frozen[path] = array
        # Of the run before, as in `Called`.
        self.out: Any = None
        self.recorded: list[list[Blank]] = []
        self.results = 0  # of what `with_gradients` gives, how many arrays at the beginning are no gradients
        self.outputs = 0  # of those, how many are the call's own result

    def arguments(self) -> list[mx.array]:
        """What `with_gradients` is to be called with: arrays of any shape."""
        return [*self.given, *self.trainable.values(), *self.frozen.values()]

    @property
    def given(self) -> list[mx.array]:
        """What the call is given: its inputs, and what its caches hold of the tokens before."""
        return [*self.inputs, *self.states]

    def with_gradients(self, *arrays: mx.array) -> list[mx.array]:
        """[the call's results, then the gradients that are wanted: of what it is given, then of what trains].

        The block itself made the states that it is given, from its own parameters: where these train, gradients of the
        states are wanted, though nothing trains before the block.
        """
        flowing, frozen = list(arrays[: len(arrays) - len(self.frozen)]), arrays[len(arrays) - len(self.frozen) :]
        self.block.update(tree_unflatten(list(zip(self.frozen, frozen, strict=True))))
        first = 0 if self.into else len(self.inputs)  # of those with a gradient
        if not self.into and not self.trainable:
            first = len(flowing)
        fixed, wanted = flowing[:first], flowing[first:]

        def forward(*wanted: mx.array) -> list[mx.array]:
            return self._forward([*fixed, *wanted])

        if not wanted:
            results = forward()
            self.results = len(results)
            return results
        cotangents = [mx.ones(leaf.shape, leaf.dtype) for leaf in forward(*wanted)]
        results, gradients = _vjp()(forward, wanted, cotangents)
        self.results = len(results)
        return [*results, *gradients]

    def _forward(self, flowing: list[mx.array]) -> list[mx.array]:
        """The call's results that a gradient flows from: its own, and the arrays that it recorded. flowing: what it is
        given, then what trains.
        """
        trainable = flowing[len(self.given) :]
        self.block.update(tree_unflatten(list(zip(self.trainable, trainable, strict=True))))
        next_inputs: Iterator[mx.array] = iter(flowing)
        caches: list[LayerCache] = []

        def fill_in(leaf: Any) -> Any:
            if isinstance(leaf, LayerCache):
                caches.append(leaf.with_state([]))
                return caches[-1]
            return next(next_inputs) if flows(leaf) else leaf

        args, kwargs = each_leaf(self.args, fill_in), each_leaf(self.kwargs, fill_in)
        for cache, new in zip(self.caches, caches, strict=True):
            new.state = [next(next_inputs) for _ in cache.state]
        out = self.call(self.block, *args, **kwargs)
        self.out = each_leaf(out, _blank)
        self.recorded = [[_blank(array) for array in cache.recorded] for cache in caches]
        results = [leaf for leaf in _leaves(out) if flows(leaf) and self.output]
        self.outputs = len(results)
        for cache in caches:
            results += cache.recorded
        return results


def _vjp() -> Callable[..., Any]:
    """mx.vjp, or where our own attention stands in for MLX's, the one that goes around it."""
    attention = mx.fast.scaled_dot_product_attention
    return attention.gradients if isinstance(attention, OwnAttention) else mx.vjp


def _cost(graph: Graph, function: _AsFunction, device: Device) -> Cost:
    results, gradients = graph.outputs[: function.results], graph.outputs[function.results :]
    counted = graph.inputs[: len(function.given)]
    ahead = QUEUED if device.kind == "cpu" else 0

    def ledger() -> Ledger:
        new = Ledger(graph, counted, ahead)
        of_trainable = gradients[len(gradients) - len(function.trainable) :]
        new.depends.difference_update(of_trainable)  # counted with the adapter
        return new

    given = sum(graph.sizes[array] for array in results)
    recorded = sum(graph.sizes[array] for array in results[function.outputs :])
    as_it_is = ledger()
    forward = as_it_is.compute(results)
    kept = as_it_is.held
    back = max(0, as_it_is.compute(gradients) - kept) + given
    count = len(gradients) - len(function.trainable)
    in_turn = [*gradients[count:], *gradients[:count]]  # the order in which `checkpointing` asks for them
    again = ledger().compute(in_turn) + given
    if not gradients:
        kept, back = given, 0
    slices = sum(graph.sizes[node.outputs[0]] for node in graph.nodes if _is_of_slice(graph, node))
    return Cost(given, recorded, kept, forward, back, again, slices, len(graph.nodes))


def _is_of_slice(graph: Graph, node: Node) -> bool:
    """Whether a node makes the gradient of a slice: zeros, in which a part is set."""
    if node.name != "SliceUpdate":
        return False
    before = graph.made.get(node.inputs[0])
    return before is None or graph.nodes[before].name in ("Full", "Broadcast")


def each_leaf(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with every leaf changed; a cache is a leaf."""
    return tree_map(change, tree, is_leaf=lambda leaf: isinstance(leaf, LayerCache))


def caches_in(tree: Any) -> list[LayerCache]:
    """In the order in which `each_leaf` comes to them."""
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, LayerCache)]


def _leaves(tree: Any) -> list[Any]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _blank(leaf: Any) -> Any:
    return Blank(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, mx.array) else leaf


def _signature(block: nn.Module, args: Any, kwargs: Any, into: bool) -> Any:
    """What decides a call's graph: the block's parameters, what its modules say of themselves, what it is given."""
    trainable = set(named(block.trainable_parameters()))
    parameters = []
    for path, array in named(block.parameters()).items():
        parameters.append((path, array.shape, array.dtype, path in trainable))
    settings = []
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not name.endswith(("idx", "index", "layer_id")):
                settings.append((path, type(module).__name__, name, value))
    flat: Any = tree_flatten((args, kwargs))
    given = [(path, _shown(leaf)) for path, leaf in flat]
    return _kind(block), tuple(parameters), tuple(settings), tuple(given), into


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """The class of a block, and what the classes that were made for the while around it do."""
    found: list[Any] = []
    for kind in type(block).__mro__[1:]:  # below the class that notes its calls
        if "raised_from" in vars(kind):  # `precision` has it in float32
            found.append("float32")
        elif "ends_at_positions" in vars(kind):
            found.append(last_block.count())
        else:
            found.append(kind)
            break
    return tuple(found)


def _shown(leaf: Any) -> Any:
    """What of an argument decides the graph."""
    if isinstance(leaf, LayerCache):
        return "cache", leaf.offset, leaf.records, tuple((array.shape, array.dtype) for array in leaf.state)
    if isinstance(leaf, mx.array):
        return leaf.shape, leaf.dtype
    return repr(leaf)
