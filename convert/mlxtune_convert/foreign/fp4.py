"""4-bit floats, two to a byte, the lower half first: MXFP4, NVFP4.

MXFP4 (OCP Microscaling specification): 32 weights share a power of two (E8M0). NVFP4: 16 weights share an 8-bit float
(E4M3), and all of a tensor one float32, which ModelOpt stores as a factor (`weight_scale_2`) and compressed-tensors as
a divisor (`weight_global_scale`).
"""

from __future__ import annotations

import numpy as np

from mlxtune_convert.foreign.parts import Found, Part
from mlxtune_convert.foreign.weights import Weights, module_of
from mlxtune_convert.gguf.quant_blocks import FP4, Codes


def values(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., n * 2] float32: each byte holds two numbers, the first in its lower half."""
    codes = packed.view(np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1)
    return FP4[nibbles.reshape(*packed.shape[:-1], -1)]


def gpt_oss(weights: Weights) -> Found:
    """`<name>_blocks` and `<name>_scales` -> <name>, experts whose inputs are the rows, as gpt-oss has them."""
    parts = []
    for name in weights.ending("_blocks"):
        blocks, scale = f"{name}_blocks", f"{name}_scales"
        shape = weights.shape(blocks)
        weights.needed(scale, blocks)
        if len(shape) < 3 or shape[-1] != 16 or weights.kind(blocks) != "U8" or weights.shape(scale) != shape[:-1]:
            raise weights.wrong(scale, f"is {weights.described(scale)}, {blocks} is {weights.described(blocks)}")
        parts.append(_experts(weights, name, blocks, scale))
    return Found("MXFP4", parts)


def _experts(weights: Weights, name: str, blocks: str, scale: str) -> Part:
    *outer, rows, groups, _ = weights.shape(blocks)

    def matrix(index: int) -> np.ndarray:
        factors = weights.scales(scale, blocks, exponents=True).reshape(-1, rows, groups, 1)[index]
        codes = weights.array(blocks).reshape(-1, rows, groups, 16)[index]
        return (values(codes) * factors).reshape(rows, groups * 32).T

    return Part(name, (*outer, groups * 32, rows), (blocks, scale), matrix)


def microscaled(weights: Weights, module: str, packed: str, scale: str) -> tuple[Part, str]:
    """compressed-tensors' MXFP4 matrix. Raises UserError for shapes that do not fit."""
    rows, columns = _shape(weights, packed, scale, 32)

    def matrix(_: int) -> np.ndarray:
        factors = weights.scales(scale, packed, exponents=True)
        return values(weights.array(packed)) * np.repeat(factors, 32, axis=1)

    def codes(_: np.dtype) -> Codes:
        weights.scales(scale, packed, exponents=True)
        words = np.ascontiguousarray(weights.array(packed)).view("<u4")
        return Codes(words, np.ascontiguousarray(weights.array(scale)).view(np.uint8), None, 4, 32, "mxfp4")

    return Part(f"{module}.weight", (rows, columns), (packed, scale), matrix, codes), "MXFP4"


def two_scales(weights: Weights, packed: str, scale: str, overall: str, divides: bool) -> tuple[Part, str]:
    """An NVFP4 matrix. overall: the tensor's one scale; divides: it is a divisor.

    Raises UserError for shapes that do not fit.
    """
    rows, columns = _shape(weights, packed, scale, 16)
    if weights.needed(overall, packed).size != 1:
        raise weights.wrong(overall, f"is {weights.described(overall)}: one number is right")

    def matrix(_: int) -> np.ndarray:
        one = weights.scales(overall, packed).reshape(())
        if one == 0:
            raise weights.wrong(overall, "is 0")
        factors = weights.scales(scale, packed)
        factors = factors / one if divides else factors * one
        return values(weights.array(packed)) * np.repeat(factors, 16, axis=1)

    name = f"{module_of(packed.removesuffix('_packed'))}.weight"
    return Part(name, (rows, columns), (packed, scale, overall), matrix), "NVFP4"


def _shape(weights: Weights, packed: str, scale: str, group: int) -> tuple[int, int]:
    """Rows and columns of a packed matrix whose scales fit."""
    weights.needed(scale, packed)
    shape = weights.shape(packed)
    if len(shape) != 2 or weights.kind(packed) not in ("U8", "I8"):
        raise weights.wrong(packed, f"must be bytes with 2 axes: it is {weights.described(packed)}")
    rows, columns = shape[0], shape[1] * 2
    if columns % group or weights.shape(scale) != (rows, columns // group):
        raise weights.wrong(scale, f"is {weights.described(scale)}, {packed} is {weights.described(packed)}")
    return rows, columns
