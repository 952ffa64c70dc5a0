"""The dense matrices that quantized layers stand for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

# Every layer of MLX and mlx-lm whose `weight` is packed and stands for a matrix by itself (tests/test_quantized_mla.py
# reads mlx-lm for others). The last holds one matrix for each head, [heads, out, in]: DeepSeek's latent attention.
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)


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


def dequantize_model(model: nn.Module) -> nn.Module:
    """The model with every packed layer made dense, rounded to the type that MLX gives (affine: that of the scales).

    mlx-lm's own function of this name leaves the layers with one matrix for each head packed: what follows would take
    their codes for numbers.
    """
    from mlx_lm.utils import dequantize_model as mlx_lm_dequantize_model

    model = mlx_lm_dequantize_model(model)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedMultiLinear):
            weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
            )
            heads, outputs, inputs = weight.shape
            dense = MultiLinear(inputs, outputs, heads)
            dense.weight = weight
            model.update_modules(tree_unflatten([(path, dense)]))
    return model
