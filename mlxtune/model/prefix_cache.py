"""What a block hands on to a later pass over the same beginning: its keys and values, still in the graph.

Legend: B rows, N queries, P prefix tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask


class PrefixCache:
    """One layer's keys and values in one pass: those of the tokens before it are put before its own, and all may be
    recorded for a later pass.

    Not a cache that grows: every pass has its own. It has no length and no truth value, because mlx-lm asks
    `if cache`. Windowed layers keep all prefix keys too; their masks choose.
    """

    def __init__(self, state: list[mx.array] | None = None, offset: int = 0, records: bool = True) -> None:
        self.state = (
            state or []
        )  # [keys, values] of the tokens before, [1, heads, P, width] each; empty: there are none
        self.offset = offset  # P
        self.records = records  # whether a later pass may need what this one sees
        self.recorded: list[mx.array] = []  # [keys, values] of all that the queries see, [B, heads, P + N, width]
        self._fetched: tuple[mx.array, mx.array] | None = None

    def with_state(self, state: list[mx.array]) -> PrefixCache:
        """The cache of the same pass, with other keys and values [1, heads, P, width] of the tokens before."""
        return type(self)(state, self.offset, self.records)

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
