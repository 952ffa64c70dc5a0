"""Settings that mlx-lm has under names or in words of its own, per family, out of transformers' spelling of them.

What transformers' configuration says is never changed in meaning: a key is added that mlx-lm insists on, or a word
becomes the word that mlx-lm knows.
"""

from __future__ import annotations

from typing import Any

# Keys that mlx-lm insists on and transformers does not have, because the family has only this.
FIXED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "minimax_m2": {"shared_intermediate_size": 0},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
}
# mlx-lm's name of a setting, of which transformers has another.
RENAMED: dict[str, dict[str, str]] = {
    "exaone": {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps"},
}
LAYER_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}  # Granite's own words


def spelled(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of one configuration (a wrapper's or its text part's) with what mlx-lm's model of the family needs."""
    out = dict(config)
    kind = str(out.get("model_type"))
    for key, value in FIXED.get(kind, {}).items():
        out.setdefault(key, value)
    for ours, theirs in RENAMED.get(kind, {}).items():
        if theirs in out:
            out.setdefault(ours, out[theirs])
    if kind == "granitemoehybrid" and isinstance(out.get("layer_types"), list):
        out["layer_types"] = [LAYER_KINDS.get(str(word), word) for word in out["layer_types"]]
    if kind == "exaone_moe" and isinstance(out.get("mlp_layer_types"), list):
        out.setdefault("is_moe_layer", [word == "sparse" for word in out["mlp_layer_types"]])
    if kind == "granitemoehybrid" and out.get("num_local_experts") == 0:
        # A dense model has the shared layer alone; mlx-lm reads its width from another key.
        out["intermediate_size"] = out.get("shared_intermediate_size", out.get("intermediate_size"))
    if kind in ("minimax_m2", "solar_open"):
        _rotary_part(out)
    text = out.get("text_config")
    if isinstance(text, dict) and isinstance(out.get("tie_word_embeddings"), bool):
        # The head is the wrapper's in transformers, the text part's in mlx-lm.
        out["text_config"] = {**text, "tie_word_embeddings": out["tie_word_embeddings"]}
    return out


def _rotary_part(out: dict[str, Any]) -> None:
    """How much of a head is rotated, where mlx-lm insists on it: a number of dimensions, or a part."""
    rope = out.get("rope_parameters") or {}
    part = out.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if out.get("model_type") == "solar_open":
        out.setdefault("partial_rotary_factor", part)
    elif isinstance(out.get("head_dim"), int):
        out.setdefault("rotary_dim", int(out["head_dim"] * part))
