"""MLX LoRA factors -> a PEFT adapter folder, bit for bit.

PEFT computes x A^T B^T * (lora_alpha / r) with A [r, in] and B [out, r]; MLX computes x a b * scale with a [in, r] and
b [r, out]. So A = a^T, B = b^T and lora_alpha = scale * r: transposes, no arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.tensors import save_checked


def write_adapter(
    folder: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]], scale: float, dropout: float, base_name: str
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    factors: module path in the HF model -> (a [in, r], b [r, out]) float32; base_name: hub id of the original
    model, or "" when unknown. Raises UserError for stacked expert factors, which have another form in PEFT.
    """
    stacked = [path for path, (a, _) in factors.items() if a.ndim != 2]
    if stacked:
        raise UserError(
            f"expert layers cannot be exported to PEFT yet (first: {stacked[0]})",
            "`mlxtune fuse` makes a merged MLX model.",
        )
    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(b.T)
    save_checked(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    rank = next(iter(factors.values()))[0].shape[1]
    alpha = scale * rank
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        # Full paths: exactly these modules, whatever else in the model has the same last name.
        "target_modules": sorted(factors),
    }
    write_json(folder / "adapter_config.json", config)


def check_adapter(folder: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """Read the folder back; return how many tensors equal their factor bit for bit. Raises UserError when one does
    not.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            saved = tensors.pop(f"base_model.model.{path}.lora_{letter}.weight")
            if saved.tobytes() != np.ascontiguousarray(factor.T).tobytes():
                raise UserError(f"{path}.lora_{letter}: the file does not hold what was trained", "Check the disk.")
    if tensors:
        raise UserError(f"{folder} holds tensors nobody trained: {min(tensors)}")
    return 2 * len(factors)
