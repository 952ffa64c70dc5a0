"""GGUF quantization blocks <-> MLX affine codes, scales and biases.

Both describe a weight as code * scale + bias per group. GGUF keeps, for every 32 weights of a row, one block of bytes
(ggml-common.h); MLX keeps all codes of a row as one bit stream, least significant bit first, in uint32 words, with
one scale and bias per group. The types below hold the same numbers in both, so nothing is computed but
a product by a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 32  # weights per GGUF block, and MLX's group size for an imported tensor


@dataclass(frozen=True)
class Affine:
    """One quantized matrix in MLX's layout: weight = code * scale + bias.

    weight: [rows, columns * bits / 32] uint32; scales, biases: [rows, columns / 32] float16.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int


@dataclass(frozen=True)
class Block:
    """How a GGUF type lays out one block of 32 weights; byte counts."""

    bits: int
    zero_point: int  # bias = -zero_point * scale, unless the block has its own minimum
    has_minimum: bool
    bytes: int


BLOCKS = {
    "Q4_0": Block(4, 8, False, 18),
    "Q4_1": Block(4, 0, True, 20),
    "Q5_0": Block(5, 16, False, 22),
    "Q5_1": Block(5, 0, True, 24),
    "Q8_0": Block(8, 128, False, 34),
}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] uint8 codes below 2**bits -> [rows, columns * bits / 32] uint32, MLX's bit stream."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<u4")
    rows, columns = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(rows, columns * bits), axis=-1, bitorder="little").view("<u4")


def from_blocks(data: np.ndarray, kind: str) -> Affine:
    """One GGUF matrix, losslessly.

    data: [rows, blocks * Block.bytes] uint8 as the file holds it; kind: a key of BLOCKS.
    Raises ValueError when a bias does not fit float16 (|scale| of 512 and more: no trained weight has that).
    """
    block = BLOCKS[kind]
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, block.bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    at = 2
    if block.has_minimum:
        biases = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
        at = 4
    else:
        exact = -np.float32(block.zero_point) * scales.astype(np.float32)
        with np.errstate(over="ignore"):  # an overflow is what the next line looks for
            biases = exact.astype(np.float16)
        if not np.array_equal(biases.astype(np.float32), exact, equal_nan=True):
            raise ValueError(f"a {kind} block's scale is too large to keep losslessly")
    high = None
    if block.bits == 5:
        high = np.unpackbits(np.ascontiguousarray(blocks[..., at : at + 4]), axis=-1, bitorder="little")
        at += 4
    payload = blocks[..., at:]
    if block.bits == 8:
        codes = payload ^ np.uint8(0x80)  # int8 + 128 in two's complement
    else:
        codes = np.concatenate([payload & 15, payload >> 4], axis=-1)
        if high is not None:
            codes = codes | (high << np.uint8(4))
    return Affine(pack(codes.reshape(rows, -1), block.bits), scales, biases, block.bits)
