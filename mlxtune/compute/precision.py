"""A model's activations in float32 for a while, whatever the type of its parameters.

In 16 bits the order of a sum, which on a GPU depends on the number of rows, shows in the third digit and is amplified
by every layer: two ways to compute one loss cannot be told from two different computations. In float32 they can. 16-bit
numbers are float32 numbers, so the model stays the same one; a quantized matrix stays quantized, its scales and biases
are raised.

What lies outside the blocks is raised at once. A block's parameters are raised when it is called and forgotten after:
where blocks are computed again in the backward pass, the float32 copies of one block exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlxtune.adapter.layers import TrainedInFull
from mlxtune.model.arrays import named

HALF = (mx.float16, mx.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every activation is float32; after, every parameter is the very array that it was."""
    outside = _outside(model)
    changed = [(block, type(block), names) for block in blocks_of(model) if (names := list(halves(block)))]
    trained = [(module.frozen, module.frozen.dtype) for module in model.modules() if isinstance(module, TrainedInFull)]
    try:
        _set(model, {name: array.astype(mx.float32) for name, array in outside.items()})
        for block, kind, names in changed:
            block.__class__ = _raising(kind, names)
        for frozen, _ in trained:
            frozen.dtype = mx.float32
        yield
    finally:
        _set(model, outside)
        for block, kind, _ in changed:
            block.__class__ = kind
        for frozen, dtype in trained:
            frozen.dtype = dtype


def copies(model: nn.Module) -> tuple[int, list[int]]:
    """Bytes of the float32 copies: (of what lies outside the blocks, of each block)."""
    return _bytes(_outside(model).values()), [_bytes(halves(block).values()) for block in blocks_of(model)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, each once."""
    return list({id(block): block for block in getattr(model, "layers", [])}.values())


def halves(module: nn.Module) -> dict[str, mx.array]:
    """A module's frozen 16-bit parameters. Those that train are float32 already."""
    trainable = named(module.trainable_parameters())
    own = named(module.parameters())
    return {name: array for name, array in own.items() if array.dtype in HALF and name not in trainable}


def _outside(model: nn.Module) -> dict[str, mx.array]:
    inside = {id(array) for block in blocks_of(model) for array in named(block.parameters()).values()}
    return {name: array for name, array in halves(model).items() if id(array) not in inside}


def _raising(kind: type, names: list[str]) -> type:
    """`kind` with its parameters of those names, and what it is given, in float32."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_raised, (args, kwargs))
        own = named(self.parameters())
        before = {name: own[name] for name in names}
        _set(self, {name: _raised(array) for name, array in before.items()})
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            _set(self, before)

    return type(kind.__name__, (kind,), {"__call__": call, "raised_from": kind})


def _raised(leaf: Any) -> Any:
    return leaf.astype(mx.float32) if isinstance(leaf, mx.array) and leaf.dtype in HALF else leaf


def _set(module: nn.Module, arrays: dict[str, mx.array]) -> None:
    module.update(tree_unflatten(list(arrays.items())))


def _bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.size * mx.float32.size for array in arrays)
