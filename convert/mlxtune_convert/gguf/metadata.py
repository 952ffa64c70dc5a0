"""config.json <-> a GGUF's metadata, and the rotary tables that GGUF keeps as tensors."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.gguf.container import F32, Field, File
from mlxtune_convert.gguf.family import FLOAT_KEYS, Family
from mlxtune_convert.gguf.tensor_name import TensorName
from mlxtune_convert.gguf.windows import windowed_layers

ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
SCALING = {  # GGUF key -> config.json key, of linear and YaRN scaling
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Llama 3's published sets: factor, low and high frequency factor, original context.
_LLAMA3 = tuple(product((8.0, 32.0, 16.0, 4.0, 2.0), (1.0,), (4.0, 1.0), (8192, 4096, 2048, 16384, 131072)))


def is_rope_tensor(name: str) -> bool:
    """Whether a GGUF tensor is a rotary table, which config.json says in MLX."""
    parts = TensorName.of(name)
    return parts.block is None and parts.stem in ROPE_TENSORS


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model's text: a vision model has it inside its own."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    return {**config, "model_type": f"{config.get('model_type')}_text", **text}


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotary_dim(config: dict[str, Any]) -> int:
    return int(head_dim(config) * float(config.get("partial_rotary_factor") or 1.0))


def metadata(family: Family, config: dict[str, Any]) -> dict[str, Field]:
    """The architecture's keys. config: as `configs.normalise` gives it.

    Raises UserError for a setting that llama.cpp's architecture cannot express.
    """
    _check(family, config)
    values = {key: config[name] for key, name in family.all_keys.items() if config.get(name) is not None}
    values.setdefault("attention.head_count_kv", config["num_attention_heads"])
    values.setdefault("rope.freq_base", 10000.0)
    values["rope.dimension_count"] = rotary_dim(config)
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        values["attention.key_length"] = values["attention.value_length"] = head_dim(config)
    for key, value in (family.defaults(config) if family.defaults else {}).items():
        values.setdefault(key, value)
    values |= _rope_scaling(config)
    values |= family.more(config) if family.more else {}
    values = {key: value for key, value in values.items() if value is not None}
    typed = {key: float(value) if key.endswith(FLOAT_KEYS) else value for key, value in values.items()}
    return {f"{family.gguf}.{key}": Field.of(value) for key, value in typed.items()}


def _check(family: Family, config: dict[str, Any]) -> None:
    wrong = [
        f"{key} {config[key]!r} (only {value!r})"
        for key, value in family.fixed.items()
        if config.get(key) is not None and config[key] != value
    ]
    pattern = family.fixed.get("sliding_window_pattern")
    if pattern and windowed_layers(config, pattern) != windowed_layers({**config, "layer_types": None}, pattern):
        wrong.append(f"layer_types (only every {pattern}th layer without a window)")
    wanted = config.get("query_pre_attn_scalar")
    computed = family.query_scalar(config) if family.query_scalar else None
    if wanted is not None and wanted != computed:
        wrong.append(f"query_pre_attn_scalar {wanted} (only {computed})")
    if wrong:
        raise UserError(
            f"llama.cpp's {family.gguf} architecture cannot express {', '.join(wrong)}",
            "`--to hf` exports the model all the same.",
        )


def _scaling(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope", "none": "default"}.get(kind, kind), scaling


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any]:
    kind, scaling = _scaling(config)
    if kind in ("default", "llama3"):  # llama3 is a tensor
        return {}
    context, key = config.get("max_position_embeddings", 0), "original_max_position_embeddings"
    original = int(scaling.get(key) or config.get(key) or (context if kind == "yarn" else 0))
    if kind in ("linear", "yarn"):
        known = {**scaling, key: original or None}
        found = {f"rope.scaling.{key}": known[name] for key, name in SCALING.items() if known.get(name) is not None}
        if kind == "yarn":
            found |= _yarn_factor(scaling)
        return {"rope.scaling.type": kind, **found}
    if kind == "longrope" and original:
        longer = scaling.get("factor") or context / original
        factor = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        if scaling.get("attention_factor") is not None:
            factor = float(scaling["attention_factor"])
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    raise UserError(f"rope scaling of type {kind!r} cannot be written to GGUF", "`--to hf` exports the model.")


def _yarn_factor(scaling: dict[str, Any]) -> dict[str, float]:
    """What llama.cpp multiplies its own factor by, 0.1 ln(factor) + 1, where transformers has another."""
    growth = 0.1 * math.log(max(scaling["factor"], 1.0))
    wanted, over, under = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if wanted is None:
        wanted = (growth * over + 1) / (growth * under + 1) if over and under else growth + 1
    return {} if wanted == growth + 1 else {"rope.scaling.attn_factor": wanted / (growth + 1)}


def rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rotary factors that GGUF keeps as tensors, [rotary dim / 2] float32 each."""
    kind, scaling = _scaling(config)
    whole = (config.get("rope_parameters") or {}).get("full_attention") or {}
    if whole.get("rope_type") == "proportional":  # Gemma 4: the pairs beyond a part of the head do not turn
        pairs = int(config.get("global_head_dim") or head_dim(config)) // 2
        turning = int(pairs * float(whole.get("partial_rotary_factor", 1.0)))
        return {"rope_freqs.weight": np.array([1.0] * turning + [1e30] * (pairs - turning), dtype=np.float32)}
    if kind == "llama3":
        shape = (scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"])
        table = _llama3(rotary_dim(config), config["rope_theta"], *shape, scaling["original_max_position_embeddings"])
        return {"rope_freqs.weight": table}
    if kind == "longrope":
        return {
            f"rope_factors_{side}.weight": np.array(scaling[f"{side}_factor"], dtype=np.float32)
            for side in ("long", "short")
        }
    return {}


def _llama3(width: int, base: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, a blend between."""
    waves = 2 * math.pi * base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    blend = (original / waves - low) / (high - low) if high > low else np.zeros_like(waves)
    smooth = 1 / ((1 - blend) / factor + blend)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, smooth)).astype(np.float32)


def config(family: Family, file: File, vocab_size: int) -> dict[str, Any]:
    """config.json as transformers writes it for this family. Raises UserError for a missing or unknown setting."""

    def value(key: str, default: Any = None) -> Any:
        name = f"{family.gguf}.{key}"
        found = file.get(name, default)
        if found is None:
            raise UserError(f"{file.path}: the GGUF has no {name}", "The file is damaged or was made by another tool.")
        return _decimal(found) if name in file.fields and file.fields[name].kind == F32 else found

    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    heads = value("attention.head_count")
    defaults = {"attention.head_count_kv": heads, "rope.freq_base": 10000.0, "vocab_size": vocab_size}
    optional = ("attention.sliding_window", "rope.scaling.original_context_length")
    for key, name in family.all_keys.items():
        if key not in optional or f"{family.gguf}.{key}" in file.fields:
            out[name] = value(key, defaults.get(key))
    numbers = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    bad = [name for name in numbers if not isinstance(out[name], int) or out[name] < 1]
    if bad:
        raise UserError(f"{file.path}: {bad[0]} is {str(out[bad[0]])[:40]}", "Only one number for all layers is known.")
    out["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    out["head_dim"] = value("attention.key_length", out["hidden_size"] // heads)
    rotary = value("rope.dimension_count", out["head_dim"])
    if rotary != out["head_dim"]:
        out["partial_rotary_factor"] = rotary / out["head_dim"]
    for name, nothing in family.absent.items():
        if not out.get(name):
            out[name] = nothing
    pattern = file.get(f"{family.gguf}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        out["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    if family.query_scalar:
        out["query_pre_attn_scalar"] = family.query_scalar(out)
    names = file.tensors.keys()
    out["rope_scaling"] = _read_scaling(family, file, out)
    out["tie_word_embeddings"] = "output.weight" not in names
    out["attention_bias"] = out["use_qkv_bias"] = "blk.0.attn_q.bias" in names
    out["attention_out_bias"] = out["use_bias"] = "blk.0.attn_output.bias" in names
    out["mlp_bias"] = "blk.0.ffn_down.bias" in names
    return {**out, "torch_dtype": "float16", **family.fixed}


def _read_scaling(family: Family, file: File, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = file.get(f"{family.gguf}.rope.scaling.type", "none")
    width = rotary_dim(config)
    for name in ROPE_TENSORS:
        if f"{name}.weight" in file.tensors and file.rows(f"{name}.weight").size != width // 2:
            raise UserError(f"{file.path}: {name} does not fit the rotary width {width}")
    if all(f"{name}.weight" in file.tensors for name in ROPE_TENSORS[1:]):
        sides = {f"{s}_factor": file.rows(f"rope_factors_{s}.weight").astype(float).tolist() for s in ("long", "short")}
        factor = file.get(f"{family.gguf}.rope.scaling.attn_factor")
        return {
            "rope_type": "longrope",
            "type": "longrope",
            **sides,
            **({"attention_factor": factor} if factor else {}),
        }
    if "rope_freqs.weight" in file.tensors:
        table = file.rows("rope_freqs.weight").ravel()
        for factor, low, high, original in _LLAMA3:
            if np.allclose(table, _llama3(width, config["rope_theta"], factor, low, high, original), rtol=1e-5, atol=0):
                shape = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
                return {"rope_type": "llama3", "factor": factor, **shape}
        raise UserError(
            f"{file.path}: its rotary table (rope_freqs) is none of Llama 3's published ones", CONVERT_ORIGINAL
        )
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{file.path}: rope scaling of type {str(kind)[:40]!r} cannot be converted from GGUF", CONVERT_ORIGINAL
        )
    found = {name: file.get(f"{family.gguf}.rope.scaling.{key}") for key, name in SCALING.items()}
    factor = file.get(f"{family.gguf}.rope.scaling.attn_factor")
    if kind == "yarn" and factor not in (None, 1.0):
        found["attention_factor"] = factor * (0.1 * math.log(max(found["factor"], 1.0)) + 1)
    return {"rope_type": kind, "type": kind, **{name: value for name, value in found.items() if value is not None}}


def _decimal(value: float) -> float:
    """GGUF stores float32; the decimal that was meant is the shortest one with the same float32."""
    return float(str(np.float32(value)))
