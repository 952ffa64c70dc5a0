"""bitsandbytes: 4-bit codes of a table (nf4, fp4) with one scale per block, and 8-bit rows (LLM.int8).

4 bits: weight = table[code] * absmax[block] over the flattened matrix, two codes to a byte, the higher half first. With
double quantization absmax is itself a code: nested table[code] * nested absmax[block] + offset. Table, block sizes and
shape lie in the file, the last two as JSON in bytes (`quant_state`); its functional.py is the source.
8 bits: weight = code * SCB[row] / 127.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
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


@dataclass(frozen=True)
class _Blocks:
    """The tensors of one 4-bit weight, and what its quant_state says."""

    weights: Weights  # all of the model
    name: str  # of the weight, whose bytes may be stored as any type
    state: str  # of its quant_state
    shape: tuple[int, ...]  # of the weight, [out, in]
    size: int  # weights of a block, which share a scale
    nested_size: int  # with double quantization: scales that share one
    nested_offset: float  # with double quantization: what is added to all of them

    @property
    def absmax(self) -> str:
        """The scales, [blocks]: floats, or codes with double quantization."""
        return f"{self.name}.absmax"

    @property
    def table(self) -> str:
        """The number of each code, [16]."""
        return f"{self.name}.quant_map"

    @property
    def nested(self) -> str:
        """The scales of the scales."""
        return f"{self.name}.nested_absmax"

    @property
    def nested_table(self) -> str:
        """The number of each code of a scale, [256]."""
        return f"{self.name}.nested_quant_map"

    @property
    def double(self) -> bool:
        """Whether it has double quantization."""
        return self.nested in self.weights

    @property
    def count(self) -> int:
        """Weights of the matrix."""
        return math.prod(self.shape)

    @property
    def uses(self) -> tuple[str, ...]:
        usual = (self.name, self.state, self.absmax, self.table)
        return (*usual, self.nested, self.nested_table) if self.double else usual

    def check(self) -> None:
        """Raise UserError naming a tensor that is missing or does not fit."""
        weights, count = self.weights, self.count
        for needed in (self.name, self.absmax, self.table, *([self.nested_table] if self.double else [])):
            weights.needed(needed, self.state)
        if len(self.shape) != 2:
            raise weights.wrong(self.state, f"says {list(self.shape)}: only matrices are quantized so")
        if weights.array(self.name).nbytes != math.ceil(count / 2):
            raise self._misfit(self.name, f"{self.state} says {list(self.shape)}")
        if math.prod(weights.shape(self.absmax)) != math.ceil(count / self.size):
            raise self._misfit(self.absmax, f"{count} weights in blocks of {self.size}")
        if math.prod(weights.shape(self.table)) != 16:
            raise self._misfit(self.table, "16 numbers are right")
        if self.double and weights.kind(self.absmax) != "U8":
            raise self._misfit(self.absmax, f"beside {self.nested} it must be bytes")

    def _misfit(self, name: str, why: str) -> UserError:
        return self.weights.wrong(name, f"is {self.weights.described(name)}: {why}")

    def scales(self) -> np.ndarray:
        """[blocks] float32."""
        if not self.double:
            return self._numbers(self.absmax)
        outer, codes = self._numbers(self.nested), self.weights.array(self.absmax).reshape(-1)
        lookup = self._numbers(self.nested_table)
        if len(lookup) != 256 or len(outer) != math.ceil(len(codes) / self.nested_size):
            raise self._misfit(self.nested, f"{len(codes)} scales in blocks of {self.nested_size}")
        of_code = np.repeat(outer, self.nested_size)[: len(codes)]
        found: np.ndarray = lookup[codes] * of_code + np.float32(self.nested_offset)
        return found

    def matrix(self) -> np.ndarray:
        """[out, in] float32."""
        packed = np.ascontiguousarray(self.weights.array(self.name)).reshape(-1).view(np.uint8)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: self.count]
        of_weight = np.repeat(self.scales(), self.size)[: self.count]
        return (self._numbers(self.table)[codes] * of_weight).reshape(self.shape)

    def _numbers(self, name: str) -> np.ndarray:
        return self.weights.scales(name, self.name).reshape(-1)


def _four(weights: Weights, name: str, state: str, kind: str) -> tuple[Part, str]:
    """kind: nf4 or fp4, which is the name of its table."""
    values = _state(weights, state)
    blocks = _Blocks(
        weights,
        name,
        state,
        tuple(values["shape"]),
        values["blocksize"],
        values["nested_blocksize"],
        values["nested_offset"],
    )
    blocks.check()
    form = f"{kind}, double quantization" if blocks.double else kind
    return Part(name, blocks.shape, blocks.uses, lambda _: blocks.matrix()), form


def _state(weights: Weights, state: str) -> dict[str, Any]:
    """What the bytes of a quant_state say. Raises UserError where they are no such JSON."""
    try:
        values = json.loads(weights.array(state).tobytes())
        sizes = [*values["shape"], values["blocksize"], values.setdefault("nested_blocksize", 256)]
        float(values.setdefault("nested_offset", 0.0))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise weights.wrong(state, f"does not describe a weight ({type(error).__name__})") from error
    if not all(type(size) is int and size > 0 for size in sizes):
        raise weights.wrong(state, "does not describe a weight (its sizes are no positive numbers)")
    return values


def _eight(weights: Weights, module: str, scale: str) -> Part:
    """scale: the tensor of the largest number of each row, [out]."""
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
