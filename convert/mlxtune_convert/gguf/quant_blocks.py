"""GGUF quantization blocks <-> MLX codes, scales and biases.

Both describe a weight as code * scale + bias per group (affine), or as a 4-bit float times a scale of one byte (mxfp4,
nvfp4). GGUF keeps one block of bytes for every 32 weights of a row (ggml-common.h); MLX keeps all codes of a row as one
bit stream, least significant bit first, in uint32 words, with one scale (and bias) per group. Where both can hold the
same numbers nothing is computed but a product by a power of two; elsewhere `carry` measures the error.

One row of 64 weights in 4 bits, both ways:

    GGUF Q4_0   [d0 | 16 bytes] [d1 | 16 bytes]   byte j of a block holds weight j (low half) and weight j + 16 (high)
                                                  weight = (code - 8) * d
    MLX         8 words of 8 codes                byte k of the row holds weight 2k (low half) and weight 2k + 1 (high)
                scales d0 d1, biases -8d0 -8d1    weight = code * scale + bias
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

GROUP = 32  # weights per GGUF block, and MLX's group size for an imported tensor
# The 4-bit floats (sign, two bits of exponent, one of mantissa) of the OCP Microscaling specification.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
LARGEST_E4M3, MINUS_ZERO = 126, 128  # bytes of an NVFP4 scale: above 126 are no number (127), and negative ones
ACCEPTED = 1e-3  # relative error up to which codes are carried; above it 16-bit floats are nearer


@dataclass(frozen=True)
class Codes:
    """One quantized matrix [rows, columns] in MLX's layout."""

    weight: np.ndarray  # [rows, columns * bits / 32] uint32: the codes, see `pack`
    scales: np.ndarray  # [rows, columns / group]: floats in affine mode, else uint8 (E8M0 for mxfp4, E4M3 for nvfp4)
    biases: np.ndarray | None  # [rows, columns / group] floats in affine mode, else None
    bits: int  # of a code
    group: int = GROUP  # weights of a row that share a scale
    mode: str = "affine"  # weight = code * scale + bias; "mxfp4", "nvfp4": weight = FP4[code] * scale

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return self.weight.shape[-1] * 32 // self.bits


# Parts of a block of 32 weights: scale, minimum, fifth bits of the codes, the other four bits of them.
_D, _M, _QH, _QS = ("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)


@dataclass(frozen=True)
class Block:
    """How a GGUF type keeps a block of weights (ggml-common.h)."""

    bits: int  # of a code
    fields: tuple[tuple, ...]  # (name, NumPy type, count) of its parts as they follow each other
    zero_point: int = 0  # bias = -zero_point * scale, unless the block has its own minimum
    mode: str = "affine"  # as in `Codes`
    group: int = GROUP  # weights that share a scale

    @property
    def layout(self) -> np.dtype:
        return np.dtype(list(self.fields))

    @property
    def has_minimum(self) -> bool:
        return _M in self.fields


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
    rows = len(codes.weight)
    grouped = unpack(codes.weight, codes.bits).reshape(rows, -1, codes.group)  # [rows, groups, group] uint8
    if codes.biases is not None:
        scales = codes.scales.astype(np.float32)[..., None]  # [rows, groups, 1]
        biases = codes.biases.astype(np.float32)[..., None]
        return (grouped * scales + biases).reshape(rows, -1)
    kind = ml_dtypes.float8_e4m3fn if codes.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    scales = codes.scales.view(kind).astype(np.float32)
    if factor is not None:
        scales = scales * factor
    in_bytes = codes.bits == 8  # mxfp8; the others have 4-bit floats
    values = grouped.view(ml_dtypes.float8_e4m3fn).astype(np.float32) if in_bytes else FP4[grouped]
    return (values * scales[..., None]).reshape(rows, -1)


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
        if block.mode == "nvfp4" and ((scales > LARGEST_E4M3) & (scales != MINUS_ZERO)).any():
            raise ValueError("an NVFP4 scale is negative or no number")
        return Codes(weight, scales, None, block.bits, block.group, block.mode)
    if block.has_minimum:
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
    """[..., block / 2] bytes -> [..., block] codes: weight j and weight j + half of a block are in one byte."""
    return np.concatenate([payload & 15, payload >> 4], axis=-1)


def _join_nibbles(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_split_nibbles`: [..., block] codes -> [..., block / 2] bytes."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


Carried = tuple[str, np.ndarray, float]  # GGUF type; [rows, bytes] uint8 blocks or floats; relative error of weights


def carry(codes: Codes) -> Carried | None:
    """MLX's codes in the GGUF type that takes them; the error is 0.0 when every weight is the same float32.

    None when no type holds them within ACCEPTED: then 16-bit floats do.
    """
    if codes.mode.upper() in FLOAT4:
        return _carry_float4(codes)
    if codes.biases is None:
        return None
    # Q6_K has other scales than MLX's 6 bits. 8 bits hold the codes where the zero points are whole numbers.
    stored = _integer_zero_points(codes) if codes.bits == 6 else codes
    if stored is None:
        return None
    kind = _type_for(stored)
    if not kind:
        return None
    blocks = to_blocks(stored, kind)
    if stored is codes and _fits_half(codes):
        return kind, blocks, 0.0  # the same codes with the same scales: nothing was rounded
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            error = relative_error(dequantize(from_blocks(blocks, kind)), dequantize(codes))
    except ValueError:
        return None
    return (kind, blocks, error) if error < ACCEPTED else None


def _carry_float4(codes: Codes) -> Carried | None:
    """The same for 4-bit floats, whose scales are bytes on both sides."""
    kind = codes.mode.upper()
    if codes.columns % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        return None  # a row is no number of whole blocks
    if kind == "NVFP4" and (codes.scales > LARGEST_E4M3).any():
        return None
    return kind, to_blocks(codes, kind), 0.0


def _type_for(codes: Codes) -> str:
    """The first GGUF type whose blocks hold codes, scales and biases of affine mode; "" when none does."""
    assert codes.biases is not None
    scales, biases = codes.scales.astype(np.float32), codes.biases.astype(np.float32)
    for kind, block in BLOCKS.items():
        narrower = codes.bits < 4 and kind == "Q4_1"  # 2 and 3 bits are 4-bit codes that use less of their range
        if codes.bits != block.bits and not narrower:
            continue
        if block.has_minimum or np.array_equal(biases, -block.zero_point * scales):
            return kind
    return ""


def _fits_half(codes: Codes) -> bool:
    """Whether scales and biases, both [rows, columns / group], are float16 numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        for part in (codes.scales, codes.biases):
            assert part is not None
            wide = part.astype(np.float32)
            if not np.array_equal(wide.astype(np.float16), wide):
                return False
    return True


def _integer_zero_points(codes: Codes) -> Codes | None:
    """6-bit codes as 8-bit ones with bias = -128 * scale: MLX chooses biases that are nearly whole multiples of the
    scale. None when a shifted code leaves the range. A weight of code 5, scale 0.1 and bias -3.2 is code 5 - 32 + 128.
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


def half_floats(weight: np.ndarray) -> Carried:
    """F16 or BF16, whichever is nearer to a float32 array of any shape; float16 when they tie."""
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for kind, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
            array = weight.astype(dtype)
            found.append((kind, array, relative_error(array.astype(np.float32), weight)))
    return min(found, key=lambda entry: (np.isnan(entry[2]), entry[2]))


def relative_error(other: np.ndarray, true: np.ndarray) -> float:
    """Root mean square of the difference over that of the true weights; infinity where a number was lost.

    other, true: float32 of one shape.
    """
    if not np.isfinite(other).all():
        return float("inf")
    norm = float(np.linalg.norm(true))
    difference = float(np.linalg.norm((other - true).ravel()))
    return difference / norm if norm else float(difference > 0)
