"""bitsandbytes: 4-bit codes of a table (nf4, fp4) with one scale per block, and 8-bit rows (LLM.int8).

4 bits: weight = table[code] * absmax[block] over the flattened matrix, two codes to a byte, the higher half first. With
double quantization absmax is itself a code: nested table[code] * nested absmax[block] + offset. Table, block sizes and
shape lie in the file, the last two as JSON in bytes (`quant_state`); its functional.py is the source.
8 bits: weight = code * SCB[row] / 127.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from mlxtune_convert.foreign.parts import Found, Part, counted
from mlxtune_convert.foreign.weights import Weights, module_of

STATE = ".quant_state.bitsandbytes__"


def find(weights: Weights) -> Found:
    """Every matrix of 4 or 8 bits. Raises UserError naming a tensor that is missing or does not fit."""
    parts, kinds = [], []
    for name in weights:
        stem, found, kind = name.rpartition(STATE)
        if found:
            part, form = _four(weights, stem, name, kind)
        elif name.endswith(".SCB"):
            part, form = _eight(weights, module_of(name.removesuffix(".SCB")), name), "int8"
        else:
            continue
        parts.append(part)
        kinds.append(form)
    return Found(f"bitsandbytes ({counted(kinds)})", parts)


def _four(weights: Weights, name: str, state: str, kind: str) -> tuple[Part, str]:
    """name: of the weight, whose bytes may be stored as any type."""
    values = _state(weights, state)
    shape, block = tuple(values["shape"]), values["blocksize"]
    count = math.prod(shape)
    absmax, table = f"{name}.absmax", f"{name}.quant_map"
    nested, nested_table = f"{name}.nested_absmax", f"{name}.nested_quant_map"
    double = nested in weights
    for needed in (name, absmax, table, *([nested_table] if double else [])):
        weights.needed(needed, state)
    if len(shape) != 2:
        raise weights.wrong(state, f"says {list(shape)}: only matrices are quantized so")
    if weights.array(name).nbytes != math.ceil(count / 2):
        raise weights.wrong(name, f"is {weights.described(name)}: {state} says {list(shape)}")
    if math.prod(weights.shape(absmax)) != math.ceil(count / block):
        raise weights.wrong(absmax, f"is {weights.described(absmax)}: {count} weights in blocks of {block}")
    if math.prod(weights.shape(table)) != 16:
        raise weights.wrong(table, f"is {weights.described(table)}: 16 numbers are right")
    if double and weights.kind(absmax) != "U8":
        raise weights.wrong(absmax, f"is {weights.described(absmax)}: beside {nested} it must be bytes")

    def scales() -> np.ndarray:
        if not double:
            return weights.scales(absmax, name).reshape(-1)
        outer, codes = weights.scales(nested, name).reshape(-1), weights.array(absmax).reshape(-1)
        size = values["nested_blocksize"]
        lookup = weights.scales(nested_table, name).reshape(-1)
        if len(lookup) != 256 or len(outer) != math.ceil(len(codes) / size):
            raise weights.wrong(nested, f"is {weights.described(nested)}: {len(codes)} scales in blocks of {size}")
        return lookup[codes] * np.repeat(outer, size)[: len(codes)] + np.float32(values["nested_offset"])

    def matrix(_: int) -> np.ndarray:
        packed = np.ascontiguousarray(weights.array(name)).reshape(-1).view(np.uint8)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]
        found = weights.scales(table, name).reshape(-1)[codes]
        return (found * np.repeat(scales(), block)[:count]).reshape(shape)

    uses = (name, state, absmax, table, *((nested, nested_table) if double else ()))
    return Part(name, shape, uses, matrix), f"{kind}{', double quantization' if double else ''}"


def _state(weights: Weights, state: str) -> dict[str, Any]:
    """What the bytes of a quant_state say. Raises UserError where they are no such JSON."""
    try:
        values = json.loads(weights.array(state).tobytes())
        sizes = [*values["shape"], values["blocksize"], values.setdefault("nested_blocksize", 256)]
        float(values.setdefault("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise weights.wrong(state, f"does not describe a weight ({type(error).__name__})") from error
    if not all(type(size) is int and size > 0 for size in sizes):
        raise weights.wrong(state, "does not describe a weight (its sizes are no positive numbers)")
    return values


def _eight(weights: Weights, module: str, scale: str) -> Part:
    name, form = f"{module}.weight", f"{module}.weight_format"
    weights.needed(name, scale)
    shape = weights.shape(name)
    if weights.kind(name) != "I8" or len(shape) != 2 or math.prod(weights.shape(scale)) != shape[0]:
        raise weights.wrong(scale, f"is {weights.described(scale)}, {name} is {weights.described(name)}")
    if form in weights and weights.array(form).any():
        raise weights.wrong(form, "says that the rows are tiled for a GPU: only plain rows are read")

    def matrix(_: int) -> np.ndarray:
        rows = weights.scales(scale, name).reshape(-1, 1) / np.float32(127)
        return weights.array(name).astype(np.float32) * rows

    return Part(name, shape, tuple(part for part in (name, scale, form) if part in weights), matrix)
