"""Prompts -> tokens, several rows at once, one token of each after the other.

    prompts       a b c d e        right-padded for the first pass: a b c d e
                  a b f                                             a b f . .
    beginning     a b              which all share, is computed once: the caches of one row, laid under every row
    last tokens   e, f             begin the answers; from there on one token of each row is computed at a time, and
                                   rows that ended leave the batch

mlx-lm's caches for several rows do the work (`merge`, `prepare`, `finalize`, `filter`). Its BatchGenerator does not:
it calls a sampler without saying which row and which place it is for, and copies a shared beginning for each row.

A row alone goes through the caches that a model makes for itself. That is the plain way, which every family has, and
the reference of `proof`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlxtune.evaluate.engines.sampling import Chooser
from mlxtune.machine import backend

PREFILL = 2048  # tokens of a prompt that are computed at once
TIDY = 256  # tokens of an answer after which MLX lets go of the buffers that it kept

Caches = list[Any]  # one of mlx-lm's for each layer that has one


class Counted:
    """A model that counts what goes through it: the measure of work that no clock disturbs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes = 0
        self.tokens = 0  # of all rows, padding included

    def __call__(self, ids: mx.array, cache: Caches) -> mx.array:
        """[B, T] token ids -> [B, T, V] logits."""
        self.passes += 1
        self.tokens += ids.size
        logits: mx.array = self.model(ids, cache=cache)
        return logits


def own_caches(model: Counted) -> Caches:
    """Those that a model makes for one row."""
    caches: Caches = make_prompt_cache(model.model)
    return caches


def can_batch(caches: Caches) -> bool:
    """Whether caches of one row can be made into caches of several."""
    for cache in caches:
        parts = list(cache.caches) if isinstance(cache, CacheList) else [cache]
        if not all(hasattr(part, "merge") for part in parts):
            return False
    return True


def repeated(caches: Caches, rows: int) -> Caches:
    """The caches of one row laid under several: empty ones, or those of a shared beginning."""
    return [cache.merge([cache] * rows) for cache in caches]


def prefill(model: Counted, caches: Caches, rows: Sequence[Sequence[int]], at_once: int = PREFILL) -> None:
    """Compute tokens, each row's own, into the caches. rows: several need caches of as many rows, and none is empty.

    at_once: how many tokens of a row; all of them where a model rotates by how long a row is.
    """
    lengths = [len(row) for row in rows]
    width = max(lengths)
    missing = [width - length for length in lengths]
    padded = any(missing)
    if padded:
        for cache in caches:
            cache.prepare(lengths=lengths, right_padding=missing)
    ids = mx.array([[*row, *[0] * (width - len(row))] for row in rows])
    for first in range(0, width, at_once):
        model(ids[:, first : first + at_once], cache=caches)
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()
    if padded:
        for cache in caches:
            cache.finalize()
        mx.eval([cache.state for cache in caches])


def decode(
    model: Counted,
    prompts: Sequence[Sequence[int]],
    chooser: Chooser,
    ends: set[int],
    most: int,
    caches: Caches,
    done: int = 0,
    at_once: int = PREFILL,
    is_over: Callable[[int], bool] = lambda _: False,
) -> Iterator[list[tuple[int, int]]]:
    """Answers, one token of each row at a time: (row, token id) of those that go on, the last one its end token unless
    it is cut.

    most: tokens of an answer; caches: which hold the first `done` tokens of every prompt; at_once: as in `prefill`;
    is_over: asked of each row when its token was given, whether its answer ends there though it is no end token.
    """
    with _wired(model.model):
        unseen = [list(prompt[done:-1]) for prompt in prompts]
        if any(unseen):
            prefill(model, caches, unseen, at_once)
        last = mx.array([prompt[-1] for prompt in prompts])
        tokens = chooser(model(last[:, None], caches)[:, -1])
        mx.async_eval(tokens)
        rows = list(range(len(prompts)))
        for place in range(most):
            following = None
            if place + 1 < most:  # computed while the tokens before are read
                following = chooser(model(tokens[:, None], caches)[:, -1])
                mx.async_eval(following)
            found: list[int] = tokens.tolist()  # type: ignore[assignment]
            yield list(zip(rows, found, strict=True))
            going = [index for index, token in enumerate(found) if token not in ends and not is_over(rows[index])]
            if following is None or not going:
                return
            if len(going) < len(rows):
                rows = [rows[index] for index in going]
                for cache in caches:
                    cache.filter(going)
                chooser.keep(going)
                following = following[mx.array(going)]
            tokens = following
            if place % TIDY == TIDY - 1:
                mx.clear_cache()


@contextlib.contextmanager
def _wired(model: nn.Module) -> Iterator[None]:
    """Inside, the model's weights stay in memory, where the device has such a limit."""
    if backend.kind() != "metal":
        yield
        return
    with wired_limit(model):
        yield
