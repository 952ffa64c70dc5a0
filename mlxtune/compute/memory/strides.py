"""How arrays lie in memory, in strides of elements: what decides whether an operation of MLX copies.

Rules of mlx/backend/common (utils.cpp, collapse_contiguous_dims; common.cpp, prepare_reshape).
"""

from __future__ import annotations

import math


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array that lies in memory row by row."""
    out, step = [], 1
    for length in reversed(shape):
        out.append(step)
        step *= length
    return tuple(reversed(out))


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an array lies in memory row by row; where an axis has length 1 its stride means nothing."""
    wanted = rows_of(shape)
    return all(length == 1 or have == want for length, have, want in zip(shape, strides, wanted, strict=True))


def dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an array's elements lie without gaps, in whatever order; repeated ones lie there once."""
    pairs = sorted((stride, length) for length, stride in zip(shape, strides, strict=True) if length > 1 and stride)
    step = 1
    for stride, length in pairs:
        if stride != step:
            return False
        step *= length
    return True


def stored(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements that an array has in memory, repeated ones counted once."""
    return math.prod(length for length, stride in zip(shape, strides, strict=True) if stride or length == 1)


def strides_as(shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of an array under another shape; None when it must be copied (Reshape's rule in MLX)."""
    if contiguous(shape, strides):
        return rows_of(wanted)
    joined: list[list[int]] = []  # [length, stride] of axes, those joined that lie one behind the other
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
        out.append(joined[place][0] * joined[place][1])
        place += joined[place][0] == 1
    return tuple(out)
