"""GGUF quantization blocks <-> MLX codes, scales and biases.

Both describe a weight as code * scale + bias per group (affine), or as a 4-bit float times a scale of one byte (mxfp4,
nvfp4). GGUF keeps one block of bytes for every 32 weights of a row (ggml-common.h); MLX keeps all codes of a row as one
bit stream, least significant bit first, in uint32 words, with one scale (and bias) per group. Where both can hold the
same numbers nothing is computed but a product by a power of two; elsewhere `carry` measures the error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

GROUP = 32  # weights per GGUF block, and MLX's group size for an imported tensor
# The 4-bit floats (sign, two bits of exponent, one of mantissa) of the OCP Microscaling specification.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
ACCEPTED = 1e-3  # relative error up to which codes are carried; above it 16-bit floats are nearer


@dataclass(frozen=True)
class Codes:
    """One quantized matrix in MLX's layout: weight = code * scale + bias (affine), or FP4[code] * scale.

    weight: [rows, columns * bits / 32] uint32; scales, biases: [rows, columns / group]; floats in affine mode, else one
    byte each (E8M0 for mxfp4, E4M3 for nvfp4) and no biases.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    bits: int
    group: int = GROUP
    mode: str = "affine"


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
FLOAT4 = {"MXFP4": ("mxfp4", 32, 1), "NVFP4": ("nvfp4", 16, 4)}  # MLX's mode and group, scale bytes per block
MAPPED = (*BLOCKS, *FLOAT4)  # GGUF types whose codes MLX can hold


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] uint8 codes below 2**bits -> [rows, columns * bits / 32] uint32, MLX's bit stream."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<u4")
    rows, columns = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(rows, columns * bits), axis=-1, bitorder="little").view("<u4")


def unpack(weight: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: [rows, words] uint32 -> [rows, columns] uint8."""
    raw = np.ascontiguousarray(weight).view(np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    stream = np.unpackbits(raw, axis=-1, bitorder="little").reshape(len(raw), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def dequantize(codes: Codes) -> np.ndarray:
    """[rows, columns] float32: bit for bit what mx.dequantize gives with its scales cast to float32."""
    grouped = unpack(codes.weight, codes.bits).reshape(len(codes.weight), -1, codes.group)
    if codes.biases is not None:
        scales, biases = (part.astype(np.float32)[..., None] for part in (codes.scales, codes.biases))
        return (grouped * scales + biases).reshape(len(grouped), -1)
    kind = ml_dtypes.float8_e4m3fn if codes.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    scales = codes.scales.view(kind).astype(np.float32)
    values = grouped.view(ml_dtypes.float8_e4m3fn).astype(np.float32) if codes.bits == 8 else FP4[grouped]
    return (values * scales[..., None]).reshape(len(grouped), -1)


def from_blocks(data: np.ndarray, kind: str) -> Codes:
    """One GGUF matrix, losslessly.

    data: [rows, bytes] uint8 as the file holds it; kind: one of MAPPED.
    Raises ValueError when a bias does not fit float16 (|scale| of 512 and more: no trained weight has that).
    """
    rows = data.shape[0]
    if kind in FLOAT4:
        mode, group, scale_bytes = FLOAT4[kind]
        blocks = data.reshape(rows, -1, scale_bytes + scale_bytes * group // 2)
        scales = np.ascontiguousarray(blocks[..., :scale_bytes]).reshape(rows, -1)
        if mode == "nvfp4" and ((scales > 126) & (scales != 128)).any():
            raise ValueError("an NVFP4 scale is negative or no number")
        nibbles = _split_nibbles(blocks[..., scale_bytes:].reshape(rows, -1, group // 2))
        return Codes(pack(nibbles.reshape(rows, -1), 4), scales, None, 4, group, mode)
    block = BLOCKS[kind]
    blocks = data.reshape(rows, -1, block.bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    at = 2
    if block.has_minimum:
        biases = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
        at = 4
    else:
        exact = -np.float32(block.zero_point) * scales.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is what the next line looks for
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
        codes = _split_nibbles(payload)
        if high is not None:
            codes = codes | (high << np.uint8(4))
    return Codes(pack(codes.reshape(rows, -1), block.bits), scales, biases, block.bits)


def to_blocks(codes: Codes, kind: str) -> np.ndarray:
    """MLX codes as blocks of `kind`: [rows, bytes] uint8. Wider scales and biases are rounded to float16.

    For a type without minimum the biases must be -zero_point * scale: they are not stored.
    """
    rows = len(codes.weight)
    if kind in FLOAT4:
        _, group, scale_bytes = FLOAT4[kind]
        nibbles = _join_nibbles(unpack(codes.weight, 4).reshape(rows, -1, group))
        scales = codes.scales.reshape(rows, -1, scale_bytes)
        return np.concatenate([scales, nibbles.reshape(*scales.shape[:2], -1)], axis=-1).reshape(rows, -1)
    block = BLOCKS[kind]
    assert codes.biases is not None
    values = unpack(codes.weight, codes.bits).reshape(rows, -1, GROUP)
    with np.errstate(over="ignore"):  # `carry` measures what was lost
        halves = [
            np.ascontiguousarray(np.repeat(part.astype("<f2"), codes.group // GROUP, axis=1))[..., None].view(np.uint8)
            for part in (codes.scales, codes.biases)
        ]
    parts = halves if block.has_minimum else halves[:1]
    if block.bits == 8:
        parts.append(values ^ np.uint8(0x80))
    else:
        if block.bits == 5:
            parts.append(np.packbits(values >> 4, axis=-1, bitorder="little"))
        parts.append(_join_nibbles(values & 15))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _split_nibbles(payload: np.ndarray) -> np.ndarray:
    """GGUF keeps weight j and weight j + half of a block in one byte."""
    return np.concatenate([payload & 15, payload >> 4], axis=-1)


def _join_nibbles(codes: np.ndarray) -> np.ndarray:
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def carry(codes: Codes) -> tuple[str, np.ndarray, float] | None:
    """(GGUF type, blocks, relative error of the weights) of the nearest type that takes MLX's codes; the error is 0.0
    when every weight is the same float32. None when none comes within ACCEPTED: then 16-bit floats do.
    """
    kind = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}.get(codes.mode)
    columns = codes.weight.shape[-1] * 32 // codes.bits
    if kind:
        if columns % (64 if kind == "NVFP4" else 32) or (kind == "NVFP4" and (codes.scales > 126).any()):
            return None
        return kind, to_blocks(codes, kind), 0.0
    if codes.biases is None:
        return None
    scales, biases = codes.scales.astype(np.float32), codes.biases.astype(np.float32)
    if codes.bits == 6:
        shifted = _integer_zero_points(codes, scales, biases)
        if shifted is None:
            return None
        blocks = to_blocks(shifted, "Q8_0")
        error = relative_error(dequantize(from_blocks(blocks, "Q8_0")), dequantize(codes))
        return ("Q8_0", blocks, error) if error < ACCEPTED else None
    kind = next(
        (
            name
            for name, block in BLOCKS.items()
            if (codes.bits == block.bits or (codes.bits < 4 and name == "Q4_1"))
            and (block.has_minimum or np.array_equal(biases, -block.zero_point * scales))
        ),
        None,
    )
    if kind is None:
        return None
    with np.errstate(over="ignore"):
        rounded = replace(codes, scales=scales.astype(np.float16), biases=biases.astype(np.float16))
    assert rounded.biases is not None
    if not (np.isfinite(rounded.scales).all() and np.isfinite(rounded.biases).all()):
        return None
    exact = np.array_equal(rounded.scales, scales) and np.array_equal(rounded.biases, biases)
    error = 0.0 if exact else relative_error(dequantize(rounded), dequantize(codes))
    return (kind, to_blocks(codes, kind), error) if error < ACCEPTED else None


def _integer_zero_points(codes: Codes, scales: np.ndarray, biases: np.ndarray) -> Codes | None:
    """6-bit codes as 8-bit ones with bias = -128 * scale: MLX chooses biases that are nearly whole multiples of the
    scale. None when a shifted code leaves the range.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.rint(biases / scales)
    if not np.isfinite(zero).all():
        return None
    values = unpack(codes.weight, codes.bits).reshape(len(scales), -1, codes.group) + zero[..., None] + 128
    if values.min() < 0 or values.max() > 255:
        return None
    weight = pack(values.astype(np.uint8).reshape(len(scales), -1), 8)
    return Codes(weight, scales, -128 * scales, 8, codes.group)


def half_floats(weight: np.ndarray) -> tuple[str, np.ndarray, float]:
    """(F16 or BF16, array, relative error), whichever is nearer to a float32 matrix; float16 when they tie."""
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for kind, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
            array = weight.astype(dtype)
            found.append((kind, array, relative_error(array.astype(np.float32), weight)))
    return min(found, key=lambda entry: (np.isnan(entry[2]), entry[2]))


def relative_error(other: np.ndarray, true: np.ndarray) -> float:
    """Root mean square of the difference over that of the true weights; infinity where a number was lost."""
    if not np.isfinite(other).all():
        return float("inf")
    norm = float(np.linalg.norm(true))
    difference = float(np.linalg.norm((other - true).ravel()))
    return difference / norm if norm else float(difference > 0)
