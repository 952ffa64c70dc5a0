"""What a block hands on to a later pass over the same beginning, still in the graph: its keys and values
(`PrefixCache`), or the state that a gated delta layer is in (`StateCache`).

    keys and values   one of every token: a pass may begin after any of them, for it takes the first so many
    a state           one of all tokens together: a pass may begin only where the pass that it leaves ends

Legend: B rows, N queries, P prefix tokens.
"""

from __future__ import annotations

from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask


class LayerCache:
    """What one layer is given of the tokens before a pass, and what it may record for a later one.

    Not a cache that grows: every pass has its own. It has no length and no truth value, because mlx-lm asks
    `if cache`.
    """

    def __init__(self, state: list[mx.array] | None = None, offset: int = 0, records: bool = True) -> None:
        self.state = state or []  # of the tokens before, of one row, [1, ...] each; empty: there are none
        self.offset = offset  # P
        self.records = records  # whether a later pass may need what this one sees
        self.recorded: list[mx.array] = []  # as `state`, of the tokens before and of its own, [B, ...] each

    def with_state(self, state: list[mx.array]) -> Self:
        """The cache of the same pass, with other arrays [1, ...] of the tokens before."""
        return type(self)(state, self.offset, self.records)

    def before(self, start: int) -> list[mx.array]:
        """Of the arrays that were recorded, [B, ...] each, what a pass is given that begins after `start` tokens."""
        raise NotImplementedError


class PrefixCache(LayerCache):
    """One layer's keys and values in one pass: those of the tokens before it are put before its own.

    `state` is [keys, values] of the tokens before, [1, heads, P, width] each; `recorded` those of all that the queries
    see, [B, heads, P + N, width]. Windowed layers keep all prefix keys too; their masks choose.
    """

    def __init__(self, state: list[mx.array] | None = None, offset: int = 0, records: bool = True) -> None:
        super().__init__(state, offset, records)
        self._fetched: tuple[mx.array, mx.array] | None = None

    def before(self, start: int) -> list[mx.array]:
        """The keys and values of the first `start` tokens, [B, heads, start, width] each."""
        return [array[:, :, :start] for array in self.recorded]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """New keys and values, [B, heads, N, width] -> all that the queries see, [B, heads, P + N, width]."""
        if self.state:
            rows = keys.shape[0]
            before = [mx.broadcast_to(array, (rows, *array.shape[1:])) for array in self.state]
            keys, values = mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)
        if self.records:
            self.recorded = [keys, values]
        self._fetched = keys, values
        return self._fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What the last layer with its own fetched, [B, heads, P + N, width], for those that share it (Gemma 3n)."""
        assert self._fetched is not None
        return self._fetched

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """N queries at positions offset .. offset + N - 1 over offset + N keys; "causal" is aligned bottom right."""
        if return_array or (window_size is not None and self.offset + N > window_size):
            return create_causal_mask(N, self.offset, window_size=window_size)
        return "causal"


class StateCache(LayerCache):
    """The arrays of one gated delta layer in one pass: the last inputs of its convolutions, [B, width of the kernel
    less one, channels] each, and its matrices S, [B, heads, width of a value, width of a key] (`gated_delta`).

    The layer reads and writes them by their places, as those of mlx-lm's ArraysCache. A row that is shorter than its
    pass is filled up at its end, so no token of it sees what comes after, and such a pass records nothing.
    """

    lengths = None  # of rows: mlx-lm would take the state from where each row ends

    def __init__(self, state: list[mx.array] | None = None, offset: int = 0, records: bool = True) -> None:
        super().__init__(state, offset, records)
        self.places = 0  # how many arrays the layer has
        self.rows = 1  # B

    def with_state(self, state: list[mx.array]) -> Self:
        """The cache of the same pass, with other arrays [1, ...] of the tokens before."""
        other = super().with_state(state)
        other.places, other.rows = self.places, self.rows
        return other

    def before(self, start: int) -> list[mx.array]:
        """The arrays [B, ...] at the end of the pass, which must be after `start` tokens."""
        return self.recorded

    def __getitem__(self, place: int) -> mx.array | None:
        """The array of every row at the beginning of the pass; None: it is to begin with zeros."""
        if place >= self.places:
            raise IndexError(place)  # so ends a loop over all of them
        if not self.state:
            return None
        array = self.state[place]
        return mx.broadcast_to(array, (self.rows, *array.shape[1:]))

    def __setitem__(self, place: int, array: mx.array) -> None:
        """Record an array at the end of the pass. Layers write in the order of the places."""
        if self.records:
            assert place == len(self.recorded)
            self.recorded.append(array)

    def advance(self, N: int) -> None:
        """mlx-lm counts down lengths and padding, of which there are none."""

    def make_mask(self, N: int) -> None:
        """No token is left out."""
