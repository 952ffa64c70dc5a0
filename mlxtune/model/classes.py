"""Modules given other classes for a while: how a model computes something else without being copied or wrapped.

A wrapper around a block would change the names of its parameters, and with them what is saved and what an optimizer
finds. A subclass with another `__call__` changes nothing but the call:

    def call(self, *args, **kwargs):
        print("called")
        return kind.__call__(self, *args, **kwargs)

    with as_classes([(block, calling(kind, call))]):
        model(ids)  # prints "called"
    model(ids)  # prints nothing

Blocks are checkpointed so, noted for the prediction of memory, and raised to float32 for a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def as_classes(wanted: Iterable[tuple[nn.Module, type]]) -> Iterator[None]:
    """Inside, each module is of the class beside it; after, of its own one again."""
    before: list[tuple[nn.Module, type]] = []
    try:
        for module, kind in wanted:
            before.append((module, type(module)))
            module.__class__ = kind
        yield
    finally:
        for module, kind in reversed(before):  # one that came twice is its first self again
            module.__class__ = kind


def calling(kind: type, call: Callable[..., Any], **attributes: Any) -> type:
    """A subclass of `kind`, of the same name, whose `__call__` is `call`; attributes: others that it has."""
    return type(kind.__name__, (kind,), {"__call__": call, **attributes})
