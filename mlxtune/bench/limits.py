"""MLX's limits of memory and cache, which loading a model with mlxtune changes: a competitor runs under MLX's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def mlx_limits_kept() -> Iterator[None]:
    """Put back, at the end, the limits of the beginning."""
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)  # each gives back the one before
    _set(memory, cache)
    try:
        yield
    finally:
        _set(memory, cache)


def _set(memory: int, cache: int) -> None:
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
