"""The floating type of a run: what a person must know of it at the start, and what helps when a number left it.

float16 holds nothing above 65,504; bfloat16 and float32 hold the same range, far beyond. A gradient may be larger than
float16 holds where every activation and the loss are small: it is then infinite, and the step is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlxtune.machine import backend
from mlxtune.model.arrays import dtype_name

LARGEST = "65,504"  # of float16
# Families of which others report gradients that float16 does not hold, by model_type: nearly always in the first step
# (unslothai/unsloth-zoo, pull request 866), or in some steps (QwenLM/Qwen3, issue 670).
REPORTED = {
    "qwen3_moe": "in the first step",
    "glm4_moe": "in the first step",
    "gemma4": "in the first step",
    "gemma4_text": "in the first step",
    "qwen2": "in some steps",
}


def notes(asked: str, own: mx.Dtype, used: mx.Dtype, config: Mapping[str, Any]) -> list[str]:
    """What a person must know before the first step.

    asked: `train.dtype`; own: type of the weights as they are stored; used: of the activations; config: of the model.
    """
    found = []
    if used == mx.float16:
        family = str(config.get("model_type"))
        seen = ""
        if family in REPORTED:
            seen = f" (reported of {family} models {REPORTED[family]})"
        found.append(
            f"float16 ends at {LARGEST}: a larger gradient is infinite{seen} and its step is lost; "
            "train.dtype=float32 has room for it"
        )
    if used not in (own, mx.float32):
        kept = dtype_name(own)
        found.append(f"{kept} weights, rounded to {dtype_name(used)} to train on; exports keep the {kept} weights")
    if asked == "auto" and own == mx.float16 and backend.kind() != "cpu":
        quantized = "quantization" in config
        what = "activations take" if quantized else "weights and activations take"
        found.append(
            f"a float16 model trains in float32: the same weights exactly, and room for gradients above {LARGEST}; "
            f"{what} twice the memory of train.dtype=float16"
        )
    return found


def narrower(own: mx.Dtype, used: mx.Dtype) -> str:
    """The setting that halves a run's activations, as part of a hint; "" where there is none worth its time."""
    if own.size >= used.size or backend.kind() == "cpu":  # which is far slower in half precision
        return ""
    return f"train.dtype={dtype_name(own)}"


def remedy(dtype: str, trained: bool) -> str:
    """What helps against a loss or gradient that is not finite. dtype: of the activations; trained: something was
    updated before it.
    """
    if dtype == "float16":
        or_else = "; or try a lower train.lr." if trained else "."
        return f"Set train.dtype=float32, for float16 ends at {LARGEST}{or_else}"
    if trained:
        hint = "Try a lower train.lr or more train.warmup_steps."
    else:
        hint = "Nothing was trained before it: look at these rows (mlxtune data show) and at the model (mlxtune eval)."
    if dtype == "bfloat16":
        hint += " If that is not it: train.dtype=float32, for bfloat16 rounds to 8 bits."
    return hint
