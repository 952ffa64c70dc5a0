"""How often a program waits for the device: counted by watching the calls that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

OF_ARRAYS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__")  # methods of mx.array


class _Place(NamedTuple):
    """A function that waits, and where it is found."""

    owner: Any  # a module or a class
    name: str  # of the function in it
    counts: Callable[..., bool]  # whether a call with these arguments waits


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, the list grows by the name of every call that waits for the device: evaluations, and what reads an array
    into Python. numpy reads through a buffer, so np.array and np.asarray of an mx.array are watched themselves.
    """
    found: list[str] = []

    def watched(place: _Place, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            if place.counts(*args):
                found.append(place.name)
            return function(*args, **kwargs)

        return watching

    before = []
    for place in _places():
        function = getattr(place.owner, place.name)
        before.append((place, function))
        setattr(place.owner, place.name, watched(place, function))
    try:
        yield found
    finally:
        for place, function in before:
            setattr(place.owner, place.name, function)


def _places() -> list[_Place]:
    places = [_Place(mx, "eval", _always), _Place(mx, "synchronize", _always)]
    for name in OF_ARRAYS:
        if hasattr(mx.array, name):
            places.append(_Place(mx.array, name, _always))
    for name in ("array", "asarray"):
        places.append(_Place(np, name, _is_of_mlx))
    return places


def _always(*_: Any) -> bool:
    return True


def _is_of_mlx(first: Any, *_: Any) -> bool:
    return isinstance(first, mx.array)
