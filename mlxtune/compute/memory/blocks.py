"""What each block of a model keeps for the backward pass, and needs while it goes back: from the block's own graph.

Nothing is computed: the model is called as in a step, on tokens that do not matter, and every kind of block that it
calls is traced once with its gradients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxtune.adapter.layers import LoRASwitchLinear
from mlxtune.compute import prefix
from mlxtune.compute.memory.graph import Ledger, traced
from mlxtune.compute.memory.kernels import Device, OwnAttention, TracedSwitch, standing_in
from mlxtune.compute.prefix import PrefixCache
from mlxtune.model.arrays import named
from mlxtune.model.dense import OWN_WAYS

QUEUED = 105  # operations ahead of the oldest unfinished one, on the CPU (ten tasks of ten: scheduler.h, encoder.h)
FITTED = (32, 64, 128)  # tokens of the rows from which longer ones are extrapolated
JOINED = 0.95  # of what the written-out attention keeps, ours keeps at least
UNROLLED = 4  # operations a token: more are a loop over the tokens


@dataclass(frozen=True)
class Cost:
    """Bytes of one call of a block. given: its result; kept: what stays for the backward pass, the result included;
    forward, back: the most that is alive on the way, `back` beside what is kept; again: going back from the input
    alone; slices: the gradients of all slices together, each as large as the array that was sliced; operations: of its
    graph.
    """

    given: int
    kept: int
    forward: int
    back: int
    again: int
    slices: int
    operations: int


@dataclass(frozen=True)
class Array:
    """In place of an array whose numbers do not matter."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    def made(self) -> mx.array:
        return mx.zeros(self.shape, self.dtype)


@dataclass(frozen=True)
class Called:
    """A block's call: its cost; what it gave, with Arrays for arrays."""

    cost: Cost
    out: Any
    recorded: list[list[Array]]


_known: dict[Any, Called] = {}


def costs(
    model: nn.Module, rows: int, width: int, shared: int, trained: list[bool], device: Device
) -> tuple[list[list[Cost]], bool]:
    """(of each block the costs of its calls, in a step on [rows, width] tokens; whether some go token by token).

    A block has two calls where a prefix is shared.

    trained: for each block, whether a gradient flows into its input. Raises whatever a model's own code raises.
    """

    def at(width: int) -> list[list[Cost]]:
        return _traced_at(model, rows, width, shared, trained, device)

    if prefix.caches(model) is not None or width <= 2 * FITTED[-1]:
        return at(width), False
    # Blocks that keep a state: where mlx-lm goes from token to token, their graph grows with the row, and would take
    # minutes to look through.
    few, more = at(FITTED[0]), at(FITTED[1])
    growth = FITTED[1] - FITTED[0]
    by_token = [
        any(b.operations - a.operations >= UNROLLED * growth for a, b in zip(*calls, strict=True))
        for calls in zip(few, more, strict=True)
    ]
    if not any(by_token):
        return at(width), False
    many = at(FITTED[2])
    found = [
        [_extended(points, width, loop) for points in zip(*calls, strict=True)]
        for loop, *calls in zip(by_token, few, more, many, strict=True)
    ]
    return found, True


def _extended(points: tuple[Cost, ...], width: int, loop: bool) -> Cost:
    """From the costs at FITTED those at another width. What a loop over the tokens keeps grows with their number, but
    for the slices' gradients; what attention keeps, with its square.
    """

    def at(values: list[int], over: tuple[int, ...]) -> int:
        terms = [math.prod((width - other) / (own - other) for other in over if other != own) for own in over]
        return round(sum(map(operator.mul, terms, values[-len(over) :])))

    found = {}
    for field in fields(Cost):
        straight = loop and field.name != "slices"
        found[field.name] = at([getattr(one, field.name) for one in points], FITTED[1:] if straight else FITTED)
    return Cost(**found)


def _traced_at(
    model: nn.Module, rows: int, width: int, shared: int, trained: list[bool], device: Device
) -> list[list[Cost]]:
    blocks = list(model.layers)
    found: list[list[Cost]] = [[] for _ in blocks]
    places = {id(block): place for place, block in enumerate(blocks)}

    def note(block: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        place = places[id(block)]
        called = _called(block, call, args, kwargs, trained[place], device)
        found[place].append(called.cost)
        for cache, new in zip(_caches((args, kwargs)), called.recorded, strict=True):
            cache.recorded = [array.made() for array in new]
        return _each(called.out, lambda leaf: leaf.made() if isinstance(leaf, Array) else leaf)

    ids = mx.zeros((rows, width), mx.int32)
    training = model.training
    model.train()
    try:
        with mx.stream(mx.cpu), standing_in(device), _as_it_was(model), _noted(blocks, note):
            if shared:
                prefix.run(model, model, ids, shared)
            else:
                model(ids)
    finally:
        model.train(training)
    return found


@contextmanager
def _noted(blocks: list[nn.Module], note: Any) -> Iterator[None]:
    changed = [(block, type(block)) for block in blocks]
    for block, kind in changed:
        call = kind.__call__
        block.__class__ = type(
            kind.__name__,
            (kind,),
            {"__call__": lambda self, *args, _call=call, **kwargs: note(self, _call, args, kwargs)},
        )
    try:
        yield
    finally:
        for block, kind in changed:
            block.__class__ = kind


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside, layers compute by what can be taken down: quantized ones by MLX's own kernel (the dense copies made on
    the CPU are counted elsewhere).
    """
    plainer: dict[Any, Any] = {**OWN_WAYS, LoRASwitchLinear: TracedSwitch}
    changed = [(module, type(module)) for _, module in model.named_modules() if type(module) in plainer]
    for module, kind in changed:
        module.__class__ = plainer[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def _called(block: nn.Module, call: Any, args: Any, kwargs: Any, into: bool, device: Device) -> Called:
    key = (_signature(block, args, kwargs, into), device)
    if key not in _known:
        _known[key] = _traced(block, call, args, kwargs, into, device)
        if device.powers:
            # Our own attention is taken down in several passes, which MLX makes one of by joining what is equal. Where
            # it joins too little, a part of what is kept would be missing: then MLX's attention stands for ours.
            with standing_in(replace(device, powers=False)):
                other = _traced(block, call, args, kwargs, into, device)
            if _known[key].cost.kept < JOINED * other.cost.kept:
                _known[key] = other
    return _known[key]


def _traced(block: nn.Module, call: Any, args: Any, kwargs: Any, into: bool, device: Device) -> Called:
    caches = _caches((args, kwargs))
    inputs = [leaf for leaf in _leaves((args, kwargs)) if _flows(leaf)]
    inputs += [array for cache in caches for array in cache.state]
    trainable = named(block.trainable_parameters())
    frozen = {path: array for path, array in named(block.parameters()).items() if path not in trainable}
    before = block.parameters()
    seen: dict[str, Any] = {}

    def forward(values: list[mx.array], parameters: list[mx.array]) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(trainable, parameters, strict=True))))
        arrays = iter(values)
        inner: list[PrefixCache] = []

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, PrefixCache):
                inner.append(PrefixCache([], leaf.offset))
                return inner[-1]
            return next(arrays) if _flows(leaf) else leaf

        filled_args, filled_kwargs = _each(args, fill), _each(kwargs, fill)
        for cache, own in zip(caches, inner, strict=True):
            own.state = [next(arrays) for _ in cache.state]
        out = call(block, *filled_args, **filled_kwargs)
        seen["out"], seen["recorded"] = (
            _each(out, _as_array),
            [[_as_array(a) for a in cache.recorded] for cache in inner],
        )
        return [leaf for leaf in _leaves(out) if _flows(leaf)] + [a for cache in inner for a in cache.recorded]

    def whole(*arrays: mx.array) -> list[mx.array]:
        values, rest = list(arrays[: len(inputs)]), list(arrays[len(inputs) :])
        mine, others = rest[: len(trainable)], rest[len(trainable) :]
        block.update(tree_unflatten(list(zip(frozen, others, strict=True))))
        wanted = [*(values if into else []), *mine]

        def of(*wanted: mx.array) -> list[mx.array]:
            flowing = list(wanted[: len(values)]) if into else values
            return forward(flowing, list(wanted[len(wanted) - len(mine) :]))

        if not wanted:
            outs = of()
            seen["outs"] = len(outs)
            return outs
        cotangents = [mx.ones(leaf.shape, leaf.dtype) for leaf in forward(values, mine)]
        attention = mx.fast.scaled_dot_product_attention
        vjp = attention.gradients if isinstance(attention, OwnAttention) else mx.vjp
        outs, gradients = vjp(of, wanted, cotangents)
        seen["outs"] = len(outs)
        return [*outs, *gradients]

    try:
        graph = traced(whole, [*inputs, *trainable.values(), *frozen.values()])
    finally:
        block.update(before)
    outs, gradients = graph.outputs[: seen["outs"]], graph.outputs[seen["outs"] :]
    counted = graph.inputs[: len(inputs)]
    given = sum(graph.sizes[array] for array in outs)
    ahead = QUEUED if device.kind == "cpu" else 0
    once = Ledger(graph, counted, ahead)
    once.depends.difference_update(gradients[len(gradients) - len(trainable) :])  # counted with the adapter
    high = once.compute(outs)
    kept = once.held
    back = max(0, once.compute(gradients) - kept) + given
    second = Ledger(graph, counted, ahead)
    second.depends.difference_update(gradients[len(gradients) - len(trainable) :])
    again = second.compute(gradients) + given
    slices = sum(graph.sizes[node.outputs[0]] for node in graph.nodes if node.name == "SliceUpdate")
    if not gradients:
        kept, back = given, 0
    cost = Cost(given, kept, high, back, again, slices, len(graph.nodes))
    return Called(cost, seen["out"], seen["recorded"])


def _flows(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _as_array(leaf: Any) -> Any:
    return Array(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, mx.array) else leaf


def _each(tree: Any, change: Any) -> Any:
    return tree_map(change, tree, is_leaf=lambda leaf: isinstance(leaf, PrefixCache))


def _leaves(tree: Any) -> list[Any]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _caches(tree: Any) -> list[PrefixCache]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, PrefixCache)]


def _signature(block: nn.Module, args: Any, kwargs: Any, into: bool) -> Any:
    """What decides a block's graph: what it is made of, what its modules say of themselves, and what it is given."""
    trainable = set(named(block.trainable_parameters()))
    made_of = tuple(
        (path, array.shape, array.dtype, path in trainable) for path, array in named(block.parameters()).items()
    )
    said = tuple(
        (path, type(module).__name__, name, value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not name.endswith(("idx", "index", "layer_id"))
    )

    def shown(leaf: Any) -> Any:
        if isinstance(leaf, PrefixCache):
            return "cache", leaf.offset, tuple((array.shape, array.dtype) for array in leaf.state)
        return (leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else repr(leaf)

    flat: Any = tree_flatten((args, kwargs))
    given = tuple((path, shown(leaf)) for path, leaf in flat)
    kind = type(block).__mro__[1]  # below the class that notes its calls
    raised_from = kind.__dict__.get("raised_from")  # where `precision` has it in float32, in a class made for the while
    return raised_from or kind, raised_from is not None, made_of, said, given, into
