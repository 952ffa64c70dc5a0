"""GGUF quantization blocks <-> MLX codes, scales and biases.

Both describe a weight as code * scale + bias per group (affine), or as a 4-bit float times a scale of one byte (mxfp4,
nvfp4). GGUF keeps one block of bytes for every 32 weights of a row (ggml-common.h); MLX keeps all codes of a row as one
bit stream, least significant bit first, in uint32 words, with one scale (and bias) per group. Where both can hold the
same numbers nothing is computed but a product by a power of two; elsewhere `carry` measures the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

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


_D, _M, _QH, _QS = ("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)


@dataclass(frozen=True)
class Block:
    """A GGUF type's block. fields: as they follow each other, d scales, m minimum, qh fifth bits, qs the rest of the
    codes; group: weights that share a scale."""

    bits: int
    fields: tuple[tuple, ...]
    zero_point: int = 0  # bias = -zero_point * scale, unless the block has its own minimum
    mode: str = "affine"
    group: int = GROUP

    @property
    def layout(self) -> np.dtype:
        return np.dtype(list(self.fields))


BLOCKS = {
    "Q4_0": Block(4, (_D, _QS), zero_point=8),
    "Q4_1": Block(4, (_D, _M, _QS)),
    "Q5_0": Block(5, (_D, _QH, _QS), zero_point=16),
    "Q5_1": Block(5, (_D, _M, _QH, _QS)),
    "Q8_0": Block(8, (_D, ("qs", "u1", 32)), zero_point=128),
}
FLOAT4 = {
    "MXFP4": Block(4, (("d", "u1", 1), _QS), mode="mxfp4"),
    "NVFP4": Block(4, (("d", "u1", 4), ("qs", "u1", 32)), mode="nvfp4", group=16),
}
MAPPED = BLOCKS | FLOAT4  # GGUF types whose codes MLX can hold


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


def dequantize(codes: Codes, factor: np.ndarray | None = None) -> np.ndarray:
    """[rows, columns] float32: bit for bit what mx.dequantize gives with its scales cast to float32.

    factor: [rows, 1] float32, which multiplies the scales (nvfp4's scale of a whole tensor).
    """
    grouped = unpack(codes.weight, codes.bits).reshape(len(codes.weight), -1, codes.group)
    if codes.biases is not None:
        scales, biases = (part.astype(np.float32)[..., None] for part in (codes.scales, codes.biases))
        return (grouped * scales + biases).reshape(len(grouped), -1)
    kind = ml_dtypes.float8_e4m3fn if codes.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    scales = codes.scales.view(kind).astype(np.float32)
    scales = scales if factor is None else scales * factor
    values = grouped.view(ml_dtypes.float8_e4m3fn).astype(np.float32) if codes.bits == 8 else FP4[grouped]
    return (values * scales[..., None]).reshape(len(grouped), -1)


def from_blocks(data: np.ndarray, kind: str) -> Codes:
    """One GGUF matrix, losslessly.

    data: [rows, bytes] uint8 as the file holds it; kind: one of MAPPED.
    Raises ValueError when a bias does not fit float16 (|scale| of 512 and more: no trained weight has that).
    """
    block, rows = MAPPED[kind], len(data)
    blocks = np.ascontiguousarray(data).view(block.layout)
    scales = np.ascontiguousarray(blocks["d"]).reshape(rows, -1)
    if block.bits == 8:
        codes = blocks["qs"] ^ np.uint8(0x80)  # int8 + 128 in two's complement
    else:
        codes = _split_nibbles(blocks["qs"].reshape(rows, -1, block.group // 2))
    if block.bits == 5:
        codes = codes | np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << np.uint8(4)
    weight = pack(codes.reshape(rows, -1), block.bits)
    if block.mode != "affine":
        if block.mode == "nvfp4" and ((scales > 126) & (scales != 128)).any():
            raise ValueError("an NVFP4 scale is negative or no number")
        return Codes(weight, scales, None, block.bits, block.group, block.mode)
    if _M in block.fields:
        return Codes(weight, scales, np.ascontiguousarray(blocks["m"]), block.bits)
    exact = -np.float32(block.zero_point) * scales.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is what the next line looks for
        biases = exact.astype(np.float16)
    if not np.array_equal(biases.astype(np.float32), exact, equal_nan=True):
        raise ValueError(f"a {kind} block's scale is too large to keep losslessly")
    return Codes(weight, scales, biases, block.bits)


def to_blocks(codes: Codes, kind: str) -> np.ndarray:
    """MLX codes as blocks of `kind`: [rows, bytes] uint8. Wider scales and biases are rounded to float16.

    For a type without minimum the biases must be -zero_point * scale: they are not stored.
    """
    block, rows = MAPPED[kind], len(codes.weight)
    values = unpack(codes.weight, codes.bits).reshape(rows, -1, block.group)
    blocks = np.empty((rows, values[0].size // GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]), block.layout)
    if block.mode != "affine":
        blocks["d"] = codes.scales.reshape(blocks["d"].shape)
    else:
        with np.errstate(over="ignore"):  # `carry` measures what was lost
            for name, part in (("d", codes.scales), ("m", codes.biases)):
                if part is not None and (name, "<f2") in block.fields:
                    blocks[name] = np.repeat(part.astype("<f2"), codes.group // GROUP, axis=1)
    if block.bits == 5:
        blocks["qh"] = np.packbits(values >> 4, axis=-1, bitorder="little")
    stored = values ^ np.uint8(0x80) if block.bits == 8 else _join_nibbles(values & 15)
    blocks["qs"] = stored.reshape(blocks["qs"].shape)
    return blocks.view(np.uint8).reshape(rows, -1)


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
    columns = codes.weight.shape[-1] * 32 // codes.bits
    if codes.mode.upper() in FLOAT4:
        kind = codes.mode.upper()
        fits = columns % 32 == 0 if kind == "MXFP4" else columns % 64 == 0 and (codes.scales <= 126).all()
        return (kind, to_blocks(codes, kind), 0.0) if fits else None
    stored = _integer_zero_points(codes) if codes.bits == 6 else codes
    if stored is None or stored.biases is None:
        return None
    scales, biases = stored.scales.astype(np.float32), stored.biases.astype(np.float32)
    kinds = (
        kind
        for kind, block in BLOCKS.items()
        if (stored.bits == block.bits or (stored.bits < 4 and kind == "Q4_1"))
        and (_M in block.fields or np.array_equal(biases, -block.zero_point * scales))
    )
    kind = next(kinds, "")
    if not kind:
        return None
    blocks = to_blocks(stored, kind)
    with np.errstate(over="ignore", invalid="ignore"):
        if stored is codes and all(np.array_equal(part.astype(np.float16), part) for part in (scales, biases)):
            return kind, blocks, 0.0
        try:
            error = relative_error(dequantize(from_blocks(blocks, kind)), dequantize(codes))
        except ValueError:
            return None
    return (kind, blocks, error) if error < ACCEPTED else None


def _integer_zero_points(codes: Codes) -> Codes | None:
    """6-bit codes as 8-bit ones with bias = -128 * scale: MLX chooses biases that are nearly whole multiples of the
    scale. None when a shifted code leaves the range.
    """
    assert codes.biases is not None
    scales = codes.scales.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.rint(codes.biases.astype(np.float32) / scales)
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
