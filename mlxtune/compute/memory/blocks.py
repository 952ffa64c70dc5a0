"""What each block of a model keeps for the backward pass, and needs while it goes back: from the block's own graph.

Nothing is computed: the model is called as in a step, on tokens that do not matter. Every block is of a class that
notes its calls, looks up what such a call costs (`block_call`), and answers with an array of the right shape, so the
next block is called as well. A model of 30 equal blocks is so traced once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapter.layers import LoRASwitchLinear
from mlxtune.compute import last_block, parts, prefix
from mlxtune.compute.memory.block_call import Blank, Cost, caches_in, cost_of, each_leaf
from mlxtune.compute.memory.kernels import Device, TracedSwitch, standing_in
from mlxtune.compute.trunk import Feed, left_out, states_of
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.forest import Forest
from mlxtune.model.classes import as_classes, calling
from mlxtune.model.linux_cpu import ORIGINALS

FITTED = (32, 64, 128)  # tokens of the rows from which longer ones are extrapolated
UNROLLED = 4  # operations a token: more are a loop over the tokens


def costs(
    model: nn.Module,
    passes: Forest,
    trained: list[bool],
    device: Device,
    last_whole: bool = False,
    targets: int = 0,
    frozen: int = 0,
) -> tuple[list[list[Cost]], bool]:
    """(of each block the costs of its calls, in a step of these passes; whether some go token by token).

    A block has a call for each pass. The first `frozen` blocks are called once, on one whole row, before the others.

    trained: for each block, whether a gradient flows into its input; last_whole: whether the last block computes more
    of a trunk than its keys and values, as it does where it is checkpointed; targets: supervised tokens, where the last
    block ends on them alone (0: on all). Raises whatever a model's own code raises.
    """
    first = passes.passes[0]
    if passes.shares or prefix.keeps_keys_alone(model) or first.width <= 2 * FITTED[-1]:
        return _traced(model, passes, trained, device, last_whole, targets, frozen), False

    def at(width: int) -> list[list[Cost]]:
        return _traced(model, forest.whole(len(first.rows), width), trained, device, last_whole, targets, frozen)

    width = first.width
    # Blocks that keep a state: where mlx-lm goes from token to token, their graph grows with the row, and would take
    # minutes to look through.
    few, more = at(FITTED[0]), at(FITTED[1])
    loops = [_is_loop(calls_of_few, calls_of_more) for calls_of_few, calls_of_more in zip(few, more, strict=True)]
    if not any(loops):
        return at(width), False
    many = at(FITTED[2])
    found = []
    for loop, *calls in zip(loops, few, more, many, strict=True):
        found.append([_extended(points, width, loop) for points in zip(*calls, strict=True)])
    return found, True


def _is_loop(few: list[Cost], more: list[Cost]) -> bool:
    """Whether a block goes from token to token, told from its calls on rows of FITTED[0] and FITTED[1] tokens."""
    growth = UNROLLED * (FITTED[1] - FITTED[0])
    return any(b.operations - a.operations >= growth for a, b in zip(few, more, strict=True))


def _extended(points: tuple[Cost, ...], width: int, loop: bool) -> Cost:
    """From the costs at FITTED those at another width.

    What a loop over the tokens keeps grows with their number, but for the slices' gradients; what attention keeps, with
    its square. So a line is drawn through the last two points, or a parabola through all three.
    """
    found = {}
    for field in fields(Cost):
        values = [getattr(point, field.name) for point in points]
        if loop and field.name != "slices":
            found[field.name] = _through(FITTED[1:], values[1:], width)
        else:
            found[field.name] = _through(FITTED, values, width)
    return Cost(**found)


def _through(widths: tuple[int, ...], values: list[int], width: int) -> int:
    """The polynomial through some points, at another width (Lagrange's form)."""
    total = 0.0
    for own, value in zip(widths, values, strict=True):
        share = math.prod((width - other) / (own - other) for other in widths if other != own)
        total += share * value
    return round(total)


def _traced(
    model: nn.Module,
    passes: Forest,
    trained: list[bool],
    device: Device,
    last_whole: bool,
    targets: int,
    frozen: int,
) -> list[list[Cost]]:
    """Of each block the costs of its calls, as in `costs`, every operation looked at."""
    blocks = list(model.layers)
    found: list[list[Cost]] = [[] for _ in blocks]
    places = {id(block): place for place, block in enumerate(blocks)}

    def note(block: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        place = places[id(block)]
        in_trunk = passes.passes[len(found[place])].is_trunk
        needed = last_whole or place < len(blocks) - 1 or not in_trunk
        called = cost_of(block, call, args, kwargs, trained[place], device, needed)
        found[place].append(called.cost)
        for cache, recorded in zip(caches_in((args, kwargs)), called.recorded, strict=True):
            cache.recorded = [blank.zeros() for blank in recorded]
        return each_leaf(called.out, _filled_in)

    training = model.training
    model.train()
    try:
        with (
            mx.stream(mx.cpu),
            standing_in(device),
            _as_exported(model),
            parts.within(model, device.parts),
            _noted(blocks, note),
            ExitStack() as stack,
        ):
            if targets:
                last_block.give(mx.zeros(targets, mx.int32))
            ids = [mx.zeros((len(each.rows), each.width), mx.int32) for each in passes.passes]
            feed = None
            if frozen:
                longest = max(each.start + each.width for each in passes.passes)
                states, beside = states_of(model, frozen, mx.zeros((1, longest), mx.int32))
                rows = 1 + max(max(each.rows) for each in passes.passes)
                feed = Feed(mx.zeros((rows, *states.shape[1:]), states.dtype))
                stack.enter_context(left_out(model, frozen, feed, beside))
            prefix.through(model, model, passes, ids, feed)
    finally:
        model.train(training)
    return found


def _filled_in(leaf: Any) -> Any:
    return leaf.zeros() if isinstance(leaf, Blank) else leaf


@contextmanager
def _noted(blocks: list[nn.Module], note: Any) -> Iterator[None]:
    """Inside, a block's call goes to note(block, its own call, args, kwargs)."""

    def noting(kind: type) -> type:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return note(self, kind.__call__, args, kwargs)

        return calling(kind, call)

    with as_classes([(block, noting(type(block))) for block in blocks]):
        yield


@contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Inside, layers compute by what can be taken down: quantized ones by MLX's own kernel (the dense copies made on
    the CPU are counted elsewhere), experts with gradients that MLX exports.
    """
    plainer: dict[Any, Any] = {**ORIGINALS, LoRASwitchLinear: TracedSwitch}
    modules = [module for _, module in model.named_modules() if type(module) in plainer]
    with as_classes([(module, plainer[type(module)]) for module in modules]):
        yield
