"""Functions of mlx-lm's modules replaced for a while: how a model computes a part of a layer otherwise.

A family's module takes the functions that it shares with others by name, and its layers look the name up when they are
called:

    from .activations import swiglu                       # llama.py of mlx-lm

    class MLP:
        def __call__(self, x):
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

So the name can stand for another function as long as a `with` lasts. Only a name that holds the very function that is
to be replaced is taken: a family with a function of its own under the same name keeps it, and so does a later version
of mlx-lm that computes something else there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.nn as nn

Function = Callable[..., Any]


def function(module: str, name: str) -> Function | None:
    """What a module of mlx-lm holds under a name; None: nothing, or the module was never imported."""
    found: Function | None = getattr(sys.modules.get(f"mlx_lm.models.{module}"), name, None)
    return found


@contextmanager
def in_place_of(model: nn.Module, others: Mapping[Function, Function]) -> Iterator[None]:
    """Inside, the modules of the model's classes find for each function the one beside it; after, the first again."""
    before: list[tuple[ModuleType, str, Any]] = []
    for module, name, value in _names(model):
        if value in others:
            before.append((module, name, value))
    try:
        for module, name, value in before:
            setattr(module, name, others[value])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def finds_any(model: nn.Module, functions: Mapping[Function, Any]) -> bool:
    """Whether a module of the model's classes holds one of these functions."""
    return any(value in functions for _, _, value in _names(model))


def _names(model: nn.Module) -> list[tuple[ModuleType, str, Function]]:
    """(module, name, function) of whatever mlx-lm's modules of the model's classes could call by name."""
    modules: dict[str, ModuleType] = {}
    for _, layer in model.named_modules():
        for kind in type(layer).__mro__:  # a layer may be of a class of ours, below mlx-lm's
            if kind.__module__.startswith("mlx_lm.models."):
                modules[kind.__module__] = sys.modules[kind.__module__]
    found = []
    for module in modules.values():
        for name, value in vars(module).items():
            if callable(value) and not isinstance(value, type):
                found.append((module, name, value))
    return found
