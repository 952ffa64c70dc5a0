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
from mlxtune.model.classes import as_classes, calling

HALF = (mx.float16, mx.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every activation is float32; after, every parameter is the very array that it was."""
    outside = _outside(model)
    raising = []
    for block in blocks_of(model):
        names = list(halves(block))
        if names:
            raising.append((block, _raising(type(block), names)))
    # The frozen half of a layer that is trained in full says itself in what type it is computed.
    frozen_halves = [module.frozen for module in model.modules() if isinstance(module, TrainedInFull)]
    types_before = [frozen.dtype for frozen in frozen_halves]
    try:
        _set(model, {name: array.astype(mx.float32) for name, array in outside.items()})
        for frozen in frozen_halves:
            frozen.dtype = mx.float32
        with as_classes(raising):
            yield
    finally:
        _set(model, outside)
        for frozen, dtype in zip(frozen_halves, types_before, strict=True):
            frozen.dtype = dtype


def copies(model: nn.Module) -> tuple[int, list[int]]:
    """Bytes of the float32 copies: (of what lies outside the blocks, of each block)."""
    return _bytes(_outside(model).values()), [_bytes(halves(block).values()) for block in blocks_of(model)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, each once."""
    by_identity = {id(block): block for block in getattr(model, "layers", [])}
    return list(by_identity.values())


def halves(module: nn.Module) -> dict[str, mx.array]:
    """A module's frozen 16-bit parameters by name, of any shape. Those that train are float32 already."""
    trainable = named(module.trainable_parameters())
    found = {}
    for name, array in named(module.parameters()).items():
        if array.dtype in HALF and name not in trainable:
            found[name] = array
    return found


def _outside(model: nn.Module) -> dict[str, mx.array]:
    """The frozen 16-bit parameters of embeddings, head and last norm."""
    in_blocks: set[int] = set()
    for block in blocks_of(model):
        in_blocks.update(id(array) for array in named(block.parameters()).values())
    return {name: array for name, array in halves(model).items() if id(array) not in in_blocks}


def _raising(kind: type, names: list[str]) -> type:
    """`kind` with its parameters of those names, and what it is given, in float32.

    raised_from: what it was, for who compares blocks (`memory.blocks`): every such class is made anew.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_raised, (args, kwargs))
        own = named(self.parameters())
        before = {name: own[name] for name in names}
        _set(self, {name: _raised(array) for name, array in before.items()})
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            _set(self, before)

    return calling(kind, call, raised_from=kind)


def _raised(leaf: Any) -> Any:
    if isinstance(leaf, mx.array) and leaf.dtype in HALF:
        return leaf.astype(mx.float32)
    return leaf


def _set(module: nn.Module, arrays: dict[str, mx.array]) -> None:
    module.update(tree_unflatten(list(arrays.items())))


def _bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.size * mx.float32.size for array in arrays)
