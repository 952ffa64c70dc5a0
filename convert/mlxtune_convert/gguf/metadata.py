"""config.json <-> a GGUF's metadata, and the rotary tables that GGUF keeps as tensors."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.gguf.container import F32, Field, File
from mlxtune_convert.gguf.family import FLOAT_KEYS, GgufFamily
from mlxtune_convert.gguf.tensor_name import TensorName
from mlxtune_convert.gguf.windows import windowed_layers

# Rotary tables: what Llama 3 divides each frequency by, and what longrope does in long and in short rows.
FREQUENCIES, LONG, SHORT = ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
OPTIONAL_KEYS = ("attention.sliding_window", "rope.scaling.original_context_length")  # config.json may lack them
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
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotary_dim(config: dict[str, Any]) -> int:
    """How much of a head is rotated."""
    return int(head_dim(config) * float(config.get("partial_rotary_factor") or 1.0))


def metadata(family: GgufFamily, config: dict[str, Any]) -> dict[str, Field]:
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
    fields = {}
    for key, value in values.items():
        if value is not None:
            fields[f"{family.gguf}.{key}"] = Field.of(float(value) if key.endswith(FLOAT_KEYS) else value)
    return fields


def _check(family: GgufFamily, config: dict[str, Any]) -> None:
    """Raise UserError for settings that llama.cpp computes in one way alone, and the configuration in another."""
    wrong = []
    for key, value in family.fixed.items():
        if config.get(key) is not None and config[key] != value:
            wrong.append(f"{key} {config[key]!r} (only {value!r})")
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
    """The type of rope scaling, "default" for none, and its settings."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope", "none": "default"}.get(kind, kind), scaling


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's keys for rope scaling. Raises UserError for a type that has none."""
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
        # Its scale of attention, as transformers computes it (modeling_rope_utils.py).
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
            f"{LONG}.weight": np.array(scaling["long_factor"], dtype=np.float32),
            f"{SHORT}.weight": np.array(scaling["short_factor"], dtype=np.float32),
        }
    return {}


def _llama3(width: int, base: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, a blend between.

    width: rotary dimensions; low, high: waves longer than original / low are long, shorter than original / high short,
    in positions. Returns [width / 2] float32.
    """
    waves = 2 * math.pi * base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    blend = (original / waves - low) / (high - low) if high > low else np.zeros_like(waves)
    smooth = 1 / ((1 - blend) / factor + blend)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, smooth)).astype(np.float32)


def config(family: GgufFamily, file: File, vocab_size: int) -> dict[str, Any]:
    """config.json as transformers writes it for this family. Raises UserError for a missing or unknown setting.

    vocab_size: tokens of the file's vocabulary, for files that do not say it.
    """
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    heads = _setting(family, file, "attention.head_count")
    defaults = {"attention.head_count_kv": heads, "rope.freq_base": 10000.0, "vocab_size": vocab_size}
    for key, name in family.all_keys.items():
        if key not in OPTIONAL_KEYS or f"{family.gguf}.{key}" in file.fields:
            out[name] = _setting(family, file, key, defaults.get(key))
    _require_numbers(file, out)
    out["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    out["head_dim"] = _setting(family, file, "attention.key_length", out["hidden_size"] // heads)
    rotary = _setting(family, file, "rope.dimension_count", out["head_dim"])
    if rotary != out["head_dim"]:
        out["partial_rotary_factor"] = rotary / out["head_dim"]
    for name, nothing in family.absent.items():
        if not out.get(name):
            out[name] = nothing
    pattern = file.get(f"{family.gguf}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        out["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    scalar = family.query_scalar(out) if family.query_scalar else None
    if scalar:
        out["query_pre_attn_scalar"] = scalar
    out["rope_scaling"] = _read_scaling(family, file, out)
    # What only the tensors show.
    names = file.tensors.keys()
    out["tie_word_embeddings"] = "output.weight" not in names
    out["attention_bias"] = out["use_qkv_bias"] = "blk.0.attn_q.bias" in names
    out["attention_out_bias"] = out["use_bias"] = "blk.0.attn_output.bias" in names
    out["mlp_bias"] = "blk.0.ffn_down.bias" in names
    return {**out, "torch_dtype": "float16", **family.fixed}


def _setting(family: GgufFamily, file: File, key: str, default: Any = None) -> Any:
    """One value of the architecture's metadata. Raises UserError where there is none, and no default."""
    name = f"{family.gguf}.{key}"
    found = file.get(name, default)
    if found is None:
        raise UserError(f"{file.path}: the GGUF has no {name}", "The file is damaged or was made by another tool.")
    if name in file.fields and file.fields[name].kind == F32:
        return _decimal(found)
    return found


def _require_numbers(file: File, out: dict[str, Any]) -> None:
    """llama.cpp also has one value for each layer; mlx-lm's models of these families have one for all."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if not isinstance(out[name], int) or out[name] < 1:
            raise UserError(f"{file.path}: {name} is {str(out[name])[:40]}", "Only one number for all layers is known.")


def _read_scaling(family: GgufFamily, file: File, config: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling of config.json, out of a rotary table in the file or of its metadata; None without."""
    width = rotary_dim(config)
    for name in ROPE_TENSORS:
        if f"{name}.weight" in file.tensors and file.rows(f"{name}.weight").size != width // 2:
            raise UserError(f"{file.path}: {name} does not fit the rotary width {width}")
    if f"{LONG}.weight" in file.tensors and f"{SHORT}.weight" in file.tensors:
        return _read_longrope(family, file)
    if f"{FREQUENCIES}.weight" in file.tensors:
        return _read_llama3(file, width, config["rope_theta"])
    # As in llama.cpp (llama-model.cpp): the factor under its older name too, 1 without any, linear without a type.
    place = f"{family.gguf}.rope"
    factor = file.get(f"{place}.scaling.factor", file.get(f"{place}.scale_linear")) or 1.0
    kind = file.get(f"{place}.scaling.type", "none" if factor == 1.0 else "linear")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{file.path}: rope scaling of type {str(kind)[:40]!r} cannot be converted from GGUF", CONVERT_ORIGINAL
        )
    attention = file.get(f"{place}.scaling.attn_factor") or 1.0
    if not isinstance(factor, int | float) or not isinstance(attention, int | float):
        raise UserError(f"{file.path}: a factor of its rope scaling is no number", CONVERT_ORIGINAL)
    found = {"rope_type": kind, "type": kind, "factor": factor}
    for key, name in SCALING.items():
        value = file.get(f"{place}.scaling.{key}")
        if value is not None:
            found.setdefault(name, value)
    if kind == "yarn" and attention != 1.0:
        found["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1)
    return found


def _read_longrope(family: GgufFamily, file: File) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
    for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
        found[key] = file.rows(f"{name}.weight").astype(float).tolist()
    factor = file.get(f"{family.gguf}.rope.scaling.attn_factor")
    if factor:
        found["attention_factor"] = factor
    return found


def _read_llama3(file: File, width: int, base: float) -> dict[str, Any]:
    """The published set of Llama 3's numbers whose table the file has; the file does not hold the numbers."""
    table = file.rows(f"{FREQUENCIES}.weight").ravel()  # [width / 2] float32
    for factor, low, high, original in _LLAMA3:
        if np.allclose(table, _llama3(width, base, factor, low, high, original), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UserError(f"{file.path}: its rotary table (rope_freqs) is none of Llama 3's published ones", CONVERT_ORIGINAL)


def _decimal(value: float) -> float:
    """GGUF stores float32; the decimal that was meant is the shortest one with the same float32."""
    return float(str(np.float32(value)))
