"""How arrays lie in memory, in strides of elements: what decides whether an operation of MLX copies.

An array [2, 3] that lies row by row has the strides (3, 1): the next row begins 3 elements on, the next column 1. Its
transpose is [3, 2] with the strides (1, 3): the same memory, nothing is copied. To make that one row of 6, the elements
must be copied: no single stride walks through them in this order.

Rules of mlx/backend/common (utils.cpp, collapse_contiguous_dims; common.cpp, prepare_reshape).
"""

from __future__ import annotations

import math
from typing import Any

Lengths = tuple[int, ...]  # of an array's axes
Strides = tuple[int, ...]  # of each axis, in elements; 0: its elements are one, repeated


def rows_of(shape: Lengths) -> Strides:
    """The strides of an array that lies in memory row by row."""
    out, step = [], 1
    for length in reversed(shape):
        out.append(step)
        step *= length
    return tuple(reversed(out))


def contiguous(shape: Lengths, strides: Strides) -> bool:
    """Whether an array lies in memory row by row; where an axis has length 1 its stride means nothing."""
    wanted = rows_of(shape)
    return all(length == 1 or have == want for length, have, want in zip(shape, strides, wanted, strict=True))


def dense(shape: Lengths, strides: Strides) -> bool:
    """Whether an array's elements lie without gaps, in whatever order; repeated ones lie there once."""
    pairs = sorted((stride, length) for length, stride in zip(shape, strides, strict=True) if length > 1 and stride)
    step = 1
    for stride, length in pairs:
        if stride != step:
            return False
        step *= length
    return True


def stored(shape: Lengths, strides: Strides) -> int:
    """Elements that an array has in memory, repeated ones counted once."""
    return math.prod(length for length, stride in zip(shape, strides, strict=True) if stride or length == 1)


def strides_as(shape: Lengths, strides: Strides, wanted: Lengths) -> Strides | None:
    """The strides of an array under another shape; None when it must be copied (Reshape's rule in MLX).

    Axes that lie one behind the other are joined to one; then each axis wanted must be cut from one of those.
    """
    if contiguous(shape, strides):
        return rows_of(wanted)
    joined: list[list[int]] = []  # [length, stride] of each axis that is left
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if joined and joined[-1][1] == length * stride:
            joined[-1] = [joined[-1][0] * length, stride]
        else:
            joined.append([length, stride])
    out, place = [], 0
    for length in wanted:
        if length == 1:
            out.append(1)
            continue
        if place >= len(joined) or joined[place][0] % length:
            return None
        joined[place][0] //= length
        rest, stride = joined[place]
        out.append(rest * stride)
        if rest == 1:
            place += 1
    return tuple(out)


def of_view(name: str, arguments: Any, shape: Lengths, strides: Strides, wanted: Lengths) -> Strides | None:
    """The strides of what an operation of MLX makes of an array without copying it; None when it must be copied.

    name, arguments: of the operation; shape, strides: of the array; wanted: the result's shape.
    """
    if name in ("Reshape", "Flatten", "Unflatten"):
        return strides_as(shape, strides, wanted)
    if name in ("Contiguous", "View"):
        return strides if strides == rows_of(shape) else None
    if name == "Transpose":
        return tuple(strides[axis] for axis in arguments[0])
    if name in ("Broadcast", "BroadcastAxes"):
        return _repeated(shape, strides, wanted)
    if name == "ExpandDims":
        out = list(strides)
        for axis in sorted(arguments[0]):
            out.insert(axis, 1)
        return tuple(out)
    if name == "Squeeze":
        return tuple(stride for axis, stride in enumerate(strides) if axis not in arguments[0])
    if name == "Slice":
        steps = arguments[2]
        return tuple(stride * step for stride, step in zip(strides, steps, strict=True))
    if name == "Split" or shape == wanted:
        return strides
    return rows_of(wanted)  # of the others nothing is known but that they share the buffer


def _repeated(shape: Lengths, strides: Strides, wanted: Lengths) -> Strides:
    """The strides of an array that is broadcast: 0 along the axes that are new or repeated."""
    new = len(wanted) - len(shape)
    out = [0] * new
    for have, want, stride in zip(shape, wanted[new:], strides, strict=True):
        out.append(stride if have == want else 0)
    return tuple(out)
