"""config.json, normalised on the way in.

transformers 5 writes rotary settings as `rope_parameters`; mlx-lm reads `rope_theta`, `rope_scaling` and
`partial_rotary_factor` at the top level, and where they are missing most of its models silently use a default base,
which is another model. `normalise` writes both spellings. The original is kept beside the converted model.
"""

from __future__ import annotations

from typing import Any

from mlxtune_convert.hf.spellings import spelled

COPIES = {"gpt2": {"n_ctx": "n_positions"}, "lfm2": {"block_dim": "hidden_size"}}  # older names of one number
TEXT_ALONE = {
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "llama4_text": "llama4",
    "gemma3n_text": "gemma3n",
}
READ_SETS = ("gemma4", "gemma4_text", "gemma4_unified_text")  # mlx-lm reads a set of theirs for each type of layer
# Configurations of these types must hold no rope_scaling: transformers would take it, even null, for all layers.
WITHOUT_SCALING = (*READ_SETS, "laguna", "mellum")
SOURCE_FILE = "mlxtune_source.json"
QUANTIZATION_KEYS = ("quantization", "quantization_config")


def normalise(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` that mlx-lm reads as transformers means it. Old-style configs come back unchanged."""
    out = _spelled(config)
    if out.get("model_type") not in TEXT_ALONE:
        return out
    # mlx-lm knows these only as the text part of a vision model.
    shared = ("tie_word_embeddings", "eos_token_id", "bos_token_id", *QUANTIZATION_KEYS)
    whole = {key: out[key] for key in shared if key in out}
    return {"model_type": TEXT_ALONE[out["model_type"]], "text_config": out, **whole}


def _spelled(config: dict[str, Any]) -> dict[str, Any]:
    out = spelled(config)
    text = out.get("text_config")
    if isinstance(text, dict):
        out["text_config"] = _spelled(text)
    rope = out.get("rope_parameters")
    if isinstance(rope, dict):
        # Models with windowed layers keep one set per layer type.
        full = rope.get("full_attention", rope)
        local = rope.get("sliding_attention")
        if isinstance(full, dict):
            _lift_rope(out, full, copied=out.get("model_type") not in READ_SETS)
        if isinstance(local, dict) and "rope_theta" in local:
            out.setdefault("rope_local_base_freq", local["rope_theta"])
        # Fields that some mlx-lm models insist on, in the spelling of older checkpoints.
        if out.get("model_type") not in WITHOUT_SCALING:
            out.setdefault("rope_scaling", None)
        for new, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
            if new in out:
                out.setdefault(old, out[new])
    if out.get("model_type") in READ_SETS:
        _lift_layers(out)
    for key, value in COPIES.get(str(out.get("model_type")), {}).items():
        if value in out:
            out.setdefault(key, out[value])
    kinds = out.get("layer_types") or []
    if "sliding_attention" in kinds and "full_attention" in kinds:
        out.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)
    if out.get("model_type") == "exaone4":
        out.setdefault("head_dim", out["hidden_size"] // out["num_attention_heads"])
        # Its own spelling: LLLG, and no number where no layer has a window.
        windows = "sliding_attention" in kinds
        pattern = "".join("LG"[kind == "full_attention"] for kind in kinds)
        out["sliding_window_pattern"] = pattern if windows else None
    if out.get("model_type") == "mamba2" and "expand" in out and "hidden_size" in out:
        out.setdefault("intermediate_size", int(out["expand"] * out["hidden_size"]))
    if isinstance(out.get("time_step_limit"), list):  # JSON has no infinity; transformers writes an object
        out["time_step_limit"] = [float("inf") if isinstance(x, dict) else x for x in out["time_step_limit"]]
    # transformers' attribute_map: two names of one number, of which some mlx-lm models read only one.
    for known, missing in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if known in out:
            out.setdefault(missing, out[known])
    return out


def _lift_rope(out: dict[str, Any], rope: dict[str, Any], copied: bool) -> None:
    """Settings of one set at the top level. copied: its scaling too, for mlx-lm's models that know only the older key.

    The copy is whole: transformers takes it for the set of all layers, and refuses one without a key that its type
    needs.
    """
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None and out.get(key) is None:
            out[key] = rope[key]
    if copied and rope.get("rope_type", "default") != "default" and out.get("rope_scaling") is None:
        out["rope_scaling"] = {"type": rope["rope_type"], **rope}


def _lift_layers(out: dict[str, Any]) -> None:
    """What transformers says of each layer that differs, which mlx-lm reads once for all layers of full attention."""
    layers = out.get("per_layer_config")
    for layer in layers.values() if isinstance(layers, dict) else ():
        for ours, theirs in (("global_head_dim", "head_dim"), ("num_global_key_value_heads", "num_key_value_heads")):
            if isinstance(layer, dict) and theirs in layer:
                out.setdefault(ours, layer[theirs])


def unquantized(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without anyone's quantization entries, at any depth: they make transformers refuse the folder, or read
    plain weights as quantized ones.
    """
    return {
        key: unquantized(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in (*QUANTIZATION_KEYS, "compression_config")
    }
