"""compressed-tensors, the format of vLLM's llm-compressor (PyPI compressed-tensors, whose code says the layout).

What a matrix is shows in its tensors: `weight_packed` int32 are integers (pack-quantized), `weight_packed` bytes 4-bit
floats, `weight` of 8-bit floats or integers beside `weight_scale` the naive formats. What the config's `ignore` names
lies there as plain weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlxtune_convert.foreign.fp4 import microscaled, two_scales
from mlxtune_convert.foreign.fp8 import block_size, scaled
from mlxtune_convert.foreign.packed import grouped
from mlxtune_convert.foreign.parts import Found, Part, counted
from mlxtune_convert.foreign.weights import FLOAT8, Weights, unpacked

FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)


def find(weights: Weights, settings: dict[str, Any]) -> Found:
    """Every compressed matrix. Raises UserError for a format that is not read, or a tensor that does not fit."""
    schemes = list(_schemes(settings))
    for form in (settings.get("format"), *(scheme.get("format") for scheme in schemes)):
        if form is not None and form not in FORMATS:
            raise weights.unread(f"compressed-tensors' format {str(form)[:40]!r}")
    _refuse_what_changes_weights(weights, settings)
    parts, kinds = [], []
    for name in weights:
        module, _, last = name.rpartition(".")
        if last == "weight_packed" and weights.kind(name) in ("I32", "U32"):
            part, kind = _integers(weights, module, schemes)
        elif last == "weight_packed":
            part, kind = _floats(weights, module)
        elif last == "weight" and weights.kind(name) in (*FLOAT8, "I8"):
            part, kind = _naive(weights, module, schemes)
        else:
            continue
        parts.append(part)
        kinds.append(kind)
    return Found(f"compressed-tensors ({counted(kinds)})", parts)


def _schemes(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config's groups: what each does to the weights, and its format."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            weights = group.get("weights")
            yield {**(weights if isinstance(weights, dict) else {}), "format": group.get("format")}


def _refuse_what_changes_weights(weights: Weights, settings: dict[str, Any]) -> None:
    sparse = settings.get("sparsity_config")
    kind = sparse.get("format") if isinstance(sparse, dict) else None
    if kind not in (None, "dense"):
        raise weights.unread(f"compressed-tensors with sparsity {str(kind)[:40]!r}")
    if settings.get("transform_config"):
        raise weights.unread("compressed-tensors with rotated weights (transform_config)")


def _integers(weights: Weights, module: str, schemes: list[dict[str, Any]]) -> tuple[Part, str]:
    """pack-quantized: unsigned codes, code - zero point times scale, [out, in / 32 * bits]."""
    name, scale, zero, order, size = (
        f"{module}.{last}"
        for last in ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    )
    words = weights.words(name, module)
    shape = weights.needed(size, module).reshape(-1)
    if shape.dtype.kind not in "iu" or len(shape) != 2 or shape.min() < 1 or shape[0] != len(words):
        raise weights.wrong(size, f"says {shape.tolist()}: {name} is {weights.described(name)}")
    rows, columns = int(shape[0]), int(shape[1])
    bits = _bits(weights, name, words.shape[1], columns, schemes)
    weights.needed(scale, module)
    sizes = weights.shape(scale)
    groups = sizes[1] if len(sizes) == 2 else 1
    if not sizes or sizes[0] != rows or groups < 1 or columns % groups:
        raise weights.wrong(scale, f"is {weights.described(scale)}: the weight is {rows} x {columns}")
    zeros = _zero_points(weights, zero, module, (rows, groups), bits) if zero in weights else None
    indices = _order(weights, order, columns, groups) if order in weights else None

    def codes() -> np.ndarray:
        return unpacked(words, bits, columns)

    def zero_points() -> np.ndarray:
        return zeros if zeros is not None else np.full((rows, groups), 1 << (bits - 1), np.uint8)

    def scales() -> np.ndarray:
        return weights.scales(scale, module).reshape(rows, groups)

    uses = tuple(part for part in (name, scale, zero, order, size) if part in weights)
    return grouped(module, uses, bits, (rows, columns), codes, zero_points, scales, indices, columns // groups)


def _bits(weights: Weights, name: str, words: int, columns: int, schemes: list[dict[str, Any]]) -> int:
    """Bits per code: of the config's, those that the shapes have.

    Widths that do not divide 32 were packed otherwise in older releases, no code over the border of two words; they are
    taken only where the shapes tell.
    """
    asked = {scheme.get("num_bits") for scheme in schemes} or {4, 8}
    fitting = []
    for bits in range(1, 9):
        as_stream = math.ceil(columns * bits / 32) == words
        may_be_older = 32 % bits != 0 and math.ceil(columns / (32 // bits)) == words
        if bits in asked and as_stream and not may_be_older:
            fitting.append(bits)
    if len(fitting) != 1:
        raise weights.wrong(name, f"is {weights.described(name)}: no width in the config packs {columns} columns so")
    return fitting[0]


def _zero_points(weights: Weights, zero: str, module: str, shape: tuple[int, int], bits: int) -> np.ndarray:
    """[rows, groups] unsigned, packed down the columns, or signed bytes as older releases wrote them."""
    rows, groups = shape
    array = weights.array(zero)
    if array.dtype == np.int8 and math.prod(array.shape) == rows * groups:
        half = 1 << (bits - 1)
        return (array.reshape(shape).astype(np.int16) + half).astype(np.uint8)
    words = weights.words(zero, module)
    if words.shape != (math.ceil(rows * bits / 32), groups):
        raise weights.wrong(zero, f"is {weights.described(zero)}: for {rows} rows and {groups} groups it cannot")
    return unpacked(np.ascontiguousarray(words.T), bits, rows).T


def _order(weights: Weights, order: str, columns: int, groups: int) -> np.ndarray | None:
    """The group of each column where they do not follow each other; -1 everywhere where nothing was ordered."""
    indices = weights.array(order)
    if indices.shape != (columns,) or indices.dtype.kind not in "iu":
        raise weights.wrong(order, f"is {weights.described(order)}: the weight has {columns} columns")
    if (indices == -1).all() or np.array_equal(indices, np.arange(columns) // (columns // groups)):
        return None
    if indices.min() < 0 or indices.max() >= groups:
        raise weights.wrong(order, f"names a group that is not there: there are {groups}")
    return indices.astype(np.int64)


def _floats(weights: Weights, module: str) -> tuple[Part, str]:
    """4-bit floats: with one scale for all NVFP4, without MXFP4."""
    packed, scale, overall = (f"{module}.{last}" for last in ("weight_packed", "weight_scale", "weight_global_scale"))
    if overall in weights:
        return two_scales(weights, packed, scale, overall, divides=True)
    if scale in weights and weights.kind(scale) not in ("U8", "F8_E8M0"):
        raise weights.wrong(packed, f"has no {overall}")
    return microscaled(weights, module, packed, scale)


def _naive(weights: Weights, module: str, schemes: list[dict[str, Any]]) -> tuple[Part, str]:
    """8 bits a weight, as they are: floats, or integers with or without zero points."""
    name, scale, zero = (f"{module}.{last}" for last in ("weight", "weight_scale", "weight_zero_point"))
    weights.needed(scale, name)
    block = next((size for size in (block_size(scheme.get("block_structure")) for scheme in schemes) if size), None)
    part, form = scaled(weights, name, scale, block, zero if zero in weights else "")
    return part, f"{'fp8' if weights.kind(name) in FLOAT8 else 'int8'}, {form}"
