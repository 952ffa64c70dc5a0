"""8-bit floats with scales: DeepSeek's and Qwen's blocks, Ministral's scalars, rows, and ModelOpt's.

weight = value * scale, whatever the scale is called: `weight_scale_inv` is DeepSeek's name of that same factor. The
scale is one number, one per row, or one per block; blocks at the right and lower edge may be cut off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxtune_convert.foreign.parts import Found, Part, counted
from mlxtune_convert.foreign.weights import FLOAT8, Weights, module_of


def find(weights: Weights, settings: dict[str, Any]) -> Found:
    """Every 8-bit float tensor with its scale. Raises UserError naming one that has none, or that does not fit."""
    block = block_size(settings.get("weight_block_size"))
    parts, kinds = [], []
    for name in weights:
        if weights.kind(name) in FLOAT8 and not name.endswith("_scale"):
            part, kind = scaled(weights, name, scale_name(weights, name), block)
            parts.append(part)
            kinds.append(kind)
    return Found(f"fp8 ({counted(kinds)})", parts)


def block_size(given: Any) -> tuple[int, int] | None:
    """A config's [rows, columns], or None where it names no blocks."""
    if isinstance(given, list | tuple) and len(given) == 2 and all(type(size) is int and size > 0 for size in given):
        return given[0], given[1]
    return None


def scale_name(weights: Weights, name: str) -> str:
    """The tensor with a weight's scales. Raises UserError where there is none."""
    names = (f"{name}_scale_inv", f"{name}_scale", f"{module_of(name)}.scale")
    found = next((scale for scale in names if scale in weights), None)
    if found is None:
        raise weights.wrong(name, f"is {weights.kind(name)}, and its scale is missing (such as {names[0]})")
    return found


def scaled(weights: Weights, name: str, scale: str, block: tuple[int, int] | None, zero: str = "") -> tuple[Part, str]:
    """A weight of 8-bit floats or integers with its scales, and the form of these for people.

    block: rows and columns that share a scale; zero: the tensor of zero points, of the scales' shape.
    Raises UserError for shapes that do not fit.
    """
    shape, sizes = weights.shape(name), weights.shape(scale)
    kind, block = _form(weights, name, scale, block)
    if zero and math.prod(weights.shape(zero)) != math.prod(sizes):
        raise weights.wrong(zero, f"is {weights.described(zero)}: {scale} is {weights.described(scale)}")

    count = math.prod(shape[:-2])

    def matrix(index: int) -> np.ndarray:
        values = weights.array(name).reshape(-1, *shape[-2:])[index].astype(np.float32)
        factors = weights.scales(scale, name, exponents=weights.kind(name) in FLOAT8)
        if zero:
            zeros = weights.array(zero).astype(np.float32).reshape(factors.shape)
            values -= _spread(zeros, count, index, block, values.shape)
        return values * _spread(factors, count, index, block, values.shape)

    return Part(name, shape, tuple(part for part in (name, scale, zero) if part), matrix), kind


def _form(weights: Weights, name: str, scale: str, block: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """How the scales lie over a weight: in words, and as rows and columns that share one."""
    shape, sizes = weights.shape(name), weights.shape(scale)
    if len(shape) < 2:
        raise weights.wrong(name, f"is {weights.described(name)}: only matrices are quantized so")
    outer, rows, columns = shape[:-2], shape[-2], shape[-1]
    # The scales as a table over each matrix, where they have the axes of the weight.
    grid = sizes[-2:] if len(sizes) == len(shape) and sizes[:-2] == outer else ()
    if block and grid == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        return _in_blocks(block), block
    scales = math.prod(sizes)
    if scales == 1 or (outer and scales == math.prod(outer)):
        return "one scale per tensor", (rows, columns)
    if sizes in ((*outer, rows), (*outer, rows, 1)):
        return "one scale per row", (1, columns)
    if grid and not block and _divides(grid, (rows, columns)):
        block = (rows // grid[0], columns // grid[1])
        return _in_blocks(block), block
    blocks = f", blocks of {block[0]} x {block[1]}" if block else ""
    raise weights.wrong(scale, f"is {weights.described(scale)}, {name} is {weights.described(name)}{blocks}")


def _in_blocks(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]} blocks"


def _divides(grid: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether a matrix of `shape` can be cut into a grid of equal blocks."""
    return all(parts and size % parts == 0 for parts, size in zip(grid, shape, strict=True))


def _spread(factors: np.ndarray, count: int, index: int, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The factors of one of `count` matrices, for each of its elements or broadcastable to them.

    factors: of all of them; block: rows and columns that share one; shape: of a matrix.
    """
    one = factors.reshape(count, -1)[index] if factors.size >= count > 1 else factors.reshape(-1)
    grid = one.reshape(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    if grid.size == 1:
        return grid
    tall = np.repeat(grid, block[0], axis=0)[: shape[0]]  # the last blocks may be cut off
    return np.repeat(tall, block[1], axis=1)[:, : shape[1]]
