"""MLX's quantized matrices as GGUF blocks: mx.dequantize and the gguf package are the oracles."""

from __future__ import annotations

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from mlxtune_convert.gguf import quant_blocks
from mlxtune_convert.gguf.quant_blocks import Codes

from mlxtune.model.arrays import to_numpy


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> np.ndarray:
    out = np.random.default_rng(seed).normal(0, 0.04, (rows, columns)).astype(np.float32)
    out[3] = 0.0  # a constant row
    out[4] *= -1
    return out


def quantized(bits: int, group: int, mode: str, dtype: mx.Dtype) -> tuple[Codes, np.ndarray]:
    """(codes as numpy, what mx.dequantize makes of them in float32)."""
    parts = mx.quantize(mx.array(weight()).astype(dtype), group, bits, mode=mode)
    arrays = [to_numpy(part) for part in parts]
    codes = Codes(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, bits, group, mode)
    wide = [parts[0], *(p.astype(mx.float32) for p in parts[1:])] if mode == "affine" else list(parts)
    dense = mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    return codes, np.array(dense)


SCHEMES = [(bits, group, "affine") for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
SCHEMES += [(4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]


@pytest.mark.parametrize(("bits", "group", "mode"), SCHEMES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_every_scheme_is_carried_exactly_or_says_how_inexactly(
    bits: int, group: int, mode: str, dtype: mx.Dtype
) -> None:
    codes, dense = quantized(bits, group, mode, dtype)
    np.testing.assert_array_equal(quant_blocks.dequantize(codes), dense)
    np.testing.assert_array_equal(quant_blocks.pack(quant_blocks.unpack(codes.weight, bits), bits), codes.weight)
    carried = quant_blocks.carry(codes)
    if mode == "mxfp8" or (mode == "affine" and bits == 8):
        assert carried is None  # no type has 8-bit codes with a minimum
        kind, half, error = quant_blocks.half_floats(dense)
        assert error == (0.0 if mode == "mxfp8" else pytest.approx(error)) and error < 3e-4
        assert np.abs(half.astype(np.float32) - dense).max() <= 5e-4 * np.abs(dense).max()
        return
    if mode == "affine" and bits == 6 and carried is None:  # a constant group has no integer zero point
        return
    assert carried is not None
    kind, blocks, error = carried
    theirs = dequantize(blocks, gguf.GGMLQuantizationType[kind])
    expected = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}.get(mode, {5: "Q5_1", 6: "Q8_0"}.get(bits, "Q4_1"))
    assert kind == expected
    assert error == pytest.approx(np.linalg.norm(theirs - dense) / np.linalg.norm(dense), rel=1e-3, abs=1e-12)
    if mode != "affine" or (bits != 6 and dtype == mx.float16):
        np.testing.assert_array_equal(theirs, dense)
        assert error == 0.0
    assert error < 1e-3


def test_six_bit_codes_keep_their_grid_as_eight_bit_ones() -> None:
    """Without a constant row every group has a nearly whole zero point; requantizing would cost ten times as much."""
    dense = np.delete(weight(), 3, axis=0)
    arrays = [to_numpy(part) for part in mx.quantize(mx.array(dense).astype(mx.float16), 64, 6)]
    codes = Codes(arrays[0], arrays[1], arrays[2], 6, 64)
    carried = quant_blocks.carry(codes)
    assert carried is not None and carried[0] == "Q8_0"
    again = dequantize(
        quantize(quant_blocks.dequantize(codes), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    assert 0 < carried[2] < quant_blocks.relative_error(again, quant_blocks.dequantize(codes)) / 5


@pytest.mark.parametrize("kind", quant_blocks.MAPPED)
def test_blocks_come_back_byte_for_byte(kind: str) -> None:
    """GGUF -> MLX -> GGUF, with the type found again; in MLX the very values that the gguf package gives."""
    if kind == "NVFP4":
        codes, _ = quantized(4, 16, "nvfp4", mx.float32)
        data = quant_blocks.to_blocks(codes, kind)
    else:
        data = quantize(weight(), gguf.GGMLQuantizationType[kind])
    codes = quant_blocks.from_blocks(data, kind)
    np.testing.assert_array_equal(quant_blocks.dequantize(codes), dequantize(data, gguf.GGMLQuantizationType[kind]))
    carried = quant_blocks.carry(codes)
    assert carried is not None
    assert (carried[0], carried[2]) == (kind, 0.0)
    assert carried[1].tobytes() == data.tobytes()


def test_scales_outside_float16_are_measured_not_hidden() -> None:
    """bfloat16 reaches further than float16 in both directions: small scales cost accuracy, large ones everything."""
    codes, _ = quantized(4, 64, "affine", mx.bfloat16)
    for factor, carried_at_all in ((1e-5, False), (1e8, False), (1.0, True)):
        scales, biases = (
            (part.astype(np.float32) * factor).astype(ml_dtypes.bfloat16) for part in (codes.scales, codes.biases)
        )
        scaled = Codes(codes.weight, scales, biases, 4, 64)
        assert (quant_blocks.carry(scaled) is not None) == carried_at_all
        kind, _, error = quant_blocks.half_floats(quant_blocks.dequantize(scaled))
        assert error < 2e-3 and kind == ("F16" if factor == 1.0 else "BF16")
