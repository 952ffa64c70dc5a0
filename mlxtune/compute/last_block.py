"""The end of the last block on supervised positions only.

The loss looks at few of the trunk's outputs: those of positions that predict a supervised token. Attention needs every
position's keys and values, but what comes behind it in the last block goes position by position: the projection of
attention's output, the residuals, the feed-forward part or its experts. Of 30 blocks and rows with three supervised
tokens in ten, that is 2% of the trunk; of 16 blocks and one in twenty, 5%.

A block of mlx-lm is cut without a table of families, as the head is (`head`): its own `__call__` runs on a stand-in
whose attention is another.

    class Block:                                         # of mlx-lm
        def __call__(self, x, mask, cache):
            h = x + self.self_attn(self.input_layernorm(x), mask, cache)
            return h + self.mlp(self.post_attention_layernorm(h))

    first    the call on all rows; the stand-in's attention is the real one, with its projection on the positions alone,
             whose rows are put aside. It answers with zeros: what the call makes of them is never computed.
    second   the call on the rows of x at the positions; the stand-in's attention answers with what was put aside.

A block that mixes positions elsewhere as well gives other numbers: the proof refuses it.

Legend: B rows, T tokens, N supervised positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.model.classes import as_classes, calling
from mlxtune.model.prefix_cache import LayerCache

ATTENTION = ("self_attn", "attention", "attn")  # what blocks of mlx-lm call it
PROJECTION = ("o_proj", "out_proj", "wo", "c_proj", "dense")  # and attention its last layer

_positions: list[
    mx.array
] = []  # [N] of the micro-batch that is computed, in all rows' outputs put in one list; or none


def is_for(model: nn.Module) -> bool:
    """Whether the last block and its attention are built as expected."""
    return _attention_of(model.layers[-1]) is not None


@contextmanager
def within(model: nn.Module) -> Iterator[None]:
    """Inside, once `give` was told the positions, the last block of a pass whose outputs are wanted gives theirs alone:
    [1, N, D].
    """
    block = model.layers[-1]
    ending = calling(type(block), _ending_at_positions(type(block).__call__), ends_at_positions=True)
    try:
        with as_classes([(block, ending)]):
            yield
    finally:
        _positions.clear()  # until the backward pass is built: a block that is computed again asks for them again


def give(positions: mx.array) -> None:
    """Tell which positions [N] are supervised, of the outputs of all rows put in one list."""
    _positions[:] = [positions]


def count() -> int:
    """How many positions were given; 0: none, the block computes all."""
    return _positions[0].size if _positions else 0


class _WithAttention:
    """A block whose attention is another function."""

    def __init__(self, block: nn.Module, name: str, attention: Callable[..., Any]) -> None:
        self._block = block
        self._name = name
        self._attention = attention

    def __getattr__(self, name: str) -> Any:
        return self._attention if name == self._name else getattr(self._block, name)

    def __contains__(self, name: str) -> bool:
        return name in self._block


def _attention_of(block: nn.Module) -> tuple[str, nn.Module, nn.Module] | None:
    """(the attention's name in the block, the attention, its last layer)."""
    for name in ATTENTION:
        attention = block.get(name)
        if not isinstance(attention, nn.Module):
            continue
        for last in PROJECTION:
            if isinstance(attention.get(last), nn.Module):
                return name, attention, attention[last]
    return None


def _ending_at_positions(whole: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a block that ends so. whole: the call that it has."""

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if not _positions or _only_records((args, kwargs)):
            return whole(self, x, *args, **kwargs)
        positions = _positions[0]
        found = _attention_of(self)
        assert found is not None
        name, attention, projection = found
        aside: list[Any] = []

        def at_positions(array: mx.array) -> mx.array:
            """[B, T, width] -> [1, N, width]."""
            return array.reshape(-1, array.shape[-1])[positions][None]

        def attend(rows: mx.array, *given: Any, **named: Any) -> Any:
            kind: Any = type(projection)
            at_the_end = calling(kind, lambda layer, rows: kind.__call__(layer, at_positions(rows)))
            with as_classes([(projection, at_the_end)]):
                attended = attention(rows, *given, **named)
            aside.append(attended)
            nothing = mx.zeros_like(rows)
            # Gemma 4's attention gives its keys and values beside, of all positions both times.
            return (nothing, *attended[1:]) if isinstance(attended, tuple) else nothing

        def answer(*_: Any, **__: Any) -> Any:
            return aside[0]

        def cut(leaf: Any) -> Any:
            goes_by_position = isinstance(leaf, mx.array) and leaf.ndim == 3 and leaf.shape[:2] == x.shape[:2]
            return at_positions(leaf) if goes_by_position else leaf

        whole(_WithAttention(self, name, attend), x, *args, **kwargs)
        args, kwargs = tree_map(cut, (args, kwargs))
        return whole(_WithAttention(self, name, answer), at_positions(x), *args, **kwargs)

    return call


def _only_records(arguments: Any) -> bool:
    """Whether a pass only records what a prefix hands on: nothing looks at its outputs."""
    caches: list[LayerCache] = []

    def note(leaf: Any) -> None:
        if isinstance(leaf, LayerCache):
            caches.append(leaf)

    tree_map(note, arguments)
    return any(not cache.state for cache in caches)
