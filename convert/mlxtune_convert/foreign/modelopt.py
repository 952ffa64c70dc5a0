"""NVIDIA ModelOpt: 8-bit floats as everyone's, and NVFP4 (`weight`, `weight_scale`, `weight_scale_2`)."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.foreign import fp8
from mlxtune_convert.foreign.fp4 import two_scales
from mlxtune_convert.foreign.parts import Found, counted
from mlxtune_convert.foreign.weights import FLOAT8, Weights

ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION", "FP8_PER_CHANNEL_PER_TOKEN")
INPUTS = ".pre_quant_scale"  # inputs are scaled before the matrix: it is not the original's


def find(weights: Weights, settings: dict[str, Any]) -> Found:
    """Every quantized matrix. Raises UserError for an algorithm that is not read, or a tensor that does not fit."""
    nested = settings.get("quantization")
    algorithm = str((nested if isinstance(nested, dict) else settings).get("quant_algo"))
    if algorithm not in ALGORITHMS or weights.ending(INPUTS):
        raise weights.unread(f"ModelOpt's {algorithm[:40]}")
    parts, kinds = [], []
    for name in weights:
        if not name.endswith(".weight"):
            continue
        if weights.kind(name) in FLOAT8:
            part, kind = fp8.scaled(weights, name, fp8.scale_name(weights, name), None)
        elif f"{name}_scale_2" in weights:
            part, kind = two_scales(weights, name, f"{name}_scale", f"{name}_scale_2", divides=False)
        else:
            continue
        parts.append(part)
        kinds.append(kind)
    return Found(f"ModelOpt {algorithm} ({counted(kinds)})", parts)
