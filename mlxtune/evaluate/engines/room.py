"""How many prompts fit the memory at once.

What one prompt takes is measured: the longest one is read alone, and its peak noted. What its answer adds is computed
from the caches that this left, for they grow with it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from mlxtune.evaluate.engines.decode import Caches, Counted, own_caches, prefill
from mlxtune.machine import backend

MOST_ROWS = 32  # more of them gain little: the products are then as large as the device takes at once
SHARE = 0.8  # of the device's working set: the rest is for the system, and for what this does not see
GROWING = 2  # a cache that grows is there twice meanwhile


def rows_at_once(model: Counted, longest: Sequence[int], most: int, budget: int | None = None) -> int:
    """How many prompts may be answered together, 1 at least.

    longest: the longest prompt's token ids; most: tokens of an answer; budget: bytes beyond what is in memory now, None
    for what the device has left.
    """
    before = mx.get_active_memory()
    if budget is None:
        budget = int(SHARE * backend.working_set_bytes()) - before
    mx.reset_peak_memory()
    caches = own_caches(model)
    prefill(model, caches, [longest[:-1] or longest])
    mx.eval(model(mx.array([longest[-1:]]), caches)[:, -1])
    taken = mx.get_peak_memory() - before + GROWING * most * bytes_a_token(caches)
    return max(1, min(MOST_ROWS, budget // max(1, taken)))


def give_back() -> None:
    """Let go of the memory of models that nobody has any more: parts of one may hold each other, so that Python frees
    them late, and MLX keeps what was freed for the next array.
    """
    gc.collect()
    mx.clear_cache()


def bytes_a_token(caches: Caches) -> int:
    """What caches of one row take for each token more; windows and states, which do not grow for ever, count too."""
    total = 0
    for cache in caches:
        if isinstance(cache, CacheList):
            total += bytes_a_token(list(cache.caches))
            continue
        keys: Any = getattr(cache, "keys", None)
        if isinstance(keys, mx.array) and keys.ndim > 2 and keys.shape[2]:
            total += cache.nbytes // keys.shape[2]
    return total
