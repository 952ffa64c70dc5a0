"""The dense matrices that quantized layers stand for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def dense_weight(layer: Any, dtype: mx.Dtype = mx.float32, after: mx.array | None = None) -> mx.array:
    """The matrix a layer stands for, in `dtype`: [outputs, inputs], or [experts, outputs, inputs]. float32 from scales
    that were cast to float32 is exact.

    after: an array, of any shape, that must be computed first. Without it MLX builds the matrices of many layers ahead
    of their use (24 layers: 31 matrices alive at once; with it 4).
    """
    if not isinstance(layer, QUANTIZED):
        weight: mx.array = layer.weight
        return weight.astype(dtype)
    codes = layer.weight if after is None else mx.depends([layer.weight], [after])[0]
    scales: Any = layer.scales
    biases: Any = None
    if layer.mode == "affine":  # the other modes have no biases, and scales of 8 bits that are no numbers to cast
        scales = scales.astype(dtype)
        biases = layer["biases"].astype(dtype)
    options = {}
    if layer.get("global_scale") is not None:
        options["global_scale"] = layer.global_scale
    return mx.dequantize(
        codes,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
        **options,
    )
