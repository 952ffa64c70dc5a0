"""The model cut above its frozen blocks: what they give does not change while a run trains, so it can be kept.

With `lora.layers: 8` of 30 blocks nothing trains in the first 22, and nothing before them. They give the same hidden
states for a row in every epoch:

    whole      ids -> embedding -> block 1 .. 22 -> states -> block 23 .. 30 -> norm -> head
    below      ids -> embedding -> block 1 .. 22 -> states                    `states_of`, once for a row
    above                                          states -> block 23 .. 30 -> norm -> head    `left_out`, every time

A block passed forward costs about as much as one passed back, and through the frozen ones nothing goes back: a step
passes 22 + 8 forward and 8 back, and 16 of these 38 where the states are at hand.

Both halves are the model's own forward. Below, the last frozen block breaks it off with what it gave. Above, each
frozen block gives the states whatever it is called with; masks, rotations and what else the model makes for its blocks
it makes as always (and MLX, which is lazy, never computes the embedding). So no table of families is needed, and the
proof of the fast ways finds those that cannot be cut so: blocks that hand on more than one hidden state of each token,
or that look into an earlier block.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapter.layers import EMBEDDING
from mlxtune.adapter.plan import block_paths, outside_blocks
from mlxtune.model.arrays import named
from mlxtune.model.classes import as_classes, calling


def frozen_blocks(model: nn.Module) -> int:
    """How many of the first blocks give in every epoch what they gave before: nothing trains in them or before them."""
    trained = tuple(named(model.trainable_parameters()))
    embeddings = tuple(f"{path}." for path in outside_blocks(model, EMBEDDING))
    if any(path.startswith(embeddings) for path in trained):
        return 0
    count = 0
    for block in block_paths(model):
        if any(path.startswith(f"{block}.") for path in trained):
            break
        count += 1
    return count


class _Reached(Exception):
    """The forward pass came to its last frozen block. The argument: what it gave."""


def states_of(model: nn.Module, frozen: int, ids: mx.array) -> tuple[mx.array, int]:
    """[B, T] tokens -> ([B, T, D] that the last of the first `frozen` blocks gives, how many results it gives beside:
    Gemma 4's blocks give their keys and values to the trunk). Raises ValueError for blocks that give anything else.
    """
    block = model.layers[frozen - 1]
    kind = type(block)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(kind.__call__(self, *args, **kwargs))

    with as_classes([(block, calling(kind, call))]):
        try:
            model(ids)
        except _Reached as reached:
            (given,) = reached.args
    states, *beside = given if isinstance(given, tuple) else (given,)
    if not isinstance(states, mx.array) or states.ndim != 3 or states.shape[:2] != ids.shape:
        raise ValueError("its blocks hand on more than one hidden state of each token")
    return states, len(beside)


class Feed:
    """What frozen blocks that are left out give, pass by pass."""

    def __init__(self, states: mx.array) -> None:
        """states: [B, T, D] of a micro-batch, on which no gradient is wanted."""
        self._states: mx.array | None = states
        self.now: mx.array | None = states  # in the pass under way

    def take(self, rows: Sequence[int], start: int, width: int) -> None:
        """The pass that comes goes through `width` tokens of some rows, beginning with token `start` of each."""
        states = self._states
        assert states is not None
        if list(rows) != list(range(states.shape[0])):
            states = states[mx.array(list(rows))]
        self.now = padded(states[:, start : start + width], width)

    def clear(self) -> None:
        """Let go of the states."""
        self._states = self.now = None


def padded(states: mx.array, width: int) -> mx.array:
    """[B, T, D] -> [B, width, D], each row's last state repeated.

    Nothing that counts looks there, but blocks compute on it, and of zeros a norm may make what is no number.
    """
    missing = width - states.shape[1]
    if not missing:
        return states
    return mx.pad(states, [(0, 0), (0, missing), (0, 0)], mode="edge")


@contextmanager
def left_out(model: nn.Module, frozen: int, feed: Feed, beside: int = 0) -> Iterator[None]:
    """Inside, the model's first `frozen` blocks give what `feed` says, whatever they are called with; and None for what
    they give beside: a later block that needs it fails.

    After, the feed is empty: a class is part of a cycle, so those made here live on until Python looks for cycles, and
    they know the feed.
    """

    def call(*_: Any, **__: Any) -> Any:
        return (feed.now, *[None] * beside) if beside else feed.now

    try:
        with as_classes([(block, calling(type(block), call)) for block in model.layers[:frozen]]):
            yield
    finally:
        feed.clear()
