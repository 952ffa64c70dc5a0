"""config.json, normalised on the way in.

transformers 5 writes rotary settings as `rope_parameters`; mlx-lm reads `rope_theta`, `rope_scaling` and
`partial_rotary_factor` at the top level, and where they are missing most of its models silently use a default base,
which is another model. `normalise` writes both spellings. The original is kept beside the converted model.
"""

from __future__ import annotations

from mlxtune_convert.families.family import Config
from mlxtune_convert.families.table import family_of

SOURCE_FILE = "mlxtune_source.json"
QUANTIZATION_KEYS = ("quantization", "quantization_config")


def normalise(config: Config) -> Config:
    """A copy of `config` that mlx-lm reads as transformers means it. Old-style configs come back unchanged."""
    out = _spelled(config)
    wrapper = family_of(out).text_of
    if not wrapper:
        return out
    # mlx-lm knows these only as the text part of a vision model.
    shared = ("tie_word_embeddings", "eos_token_id", "bos_token_id", *QUANTIZATION_KEYS)
    whole = {key: out[key] for key in shared if key in out}
    return {"model_type": wrapper, "text_config": out, **whole}


def _spelled(config: Config) -> Config:
    """A copy of one configuration, a wrapper's or its text part's, with what mlx-lm's model of the family needs."""
    out = dict(config)
    family = family_of(out)
    if family.config_first:
        family.config_first(out)
    _spell_text(out)
    _spell_rope(out)
    if family.rope_sets:
        _lift_layers(out)
    _spell_windows(out)
    if family.config_last:
        family.config_last(out)
    _spell_experts(out)
    if isinstance(out.get("time_step_limit"), list):  # JSON has no infinity; transformers writes an object
        out["time_step_limit"] = [float("inf") if isinstance(x, dict) else x for x in out["time_step_limit"]]
    return out


def _spell_text(out: Config) -> None:
    text = out.get("text_config")
    if not isinstance(text, dict):
        return
    if isinstance(out.get("tie_word_embeddings"), bool):
        # The head is the wrapper's in transformers, the text part's in mlx-lm.
        text = {**text, "tie_word_embeddings": out["tie_word_embeddings"]}
    out["text_config"] = _spelled(text)


def _spell_rope(out: Config) -> None:
    """transformers' rope_parameters at the top level too, where mlx-lm reads them."""
    rope = out.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    family = family_of(out)
    # Models with windowed layers keep one set per layer type.
    full = rope.get("full_attention", rope)
    local = rope.get("sliding_attention")
    if isinstance(full, dict):
        _lift_rope(out, full, copied=not family.rope_sets)
    if isinstance(local, dict) and "rope_theta" in local:
        out.setdefault("rope_local_base_freq", local["rope_theta"])
    # Fields that some mlx-lm models insist on, in the spelling of older checkpoints.
    if not family.no_rope_scaling:
        out.setdefault("rope_scaling", None)
    for new, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if new in out:
            out.setdefault(old, out[new])


def _spell_windows(out: Config) -> None:
    """Which layers have a window: transformers lists them all, mlx-lm counts to the first without one."""
    kinds = out.get("layer_types") or []
    if "sliding_attention" in kinds and "full_attention" in kinds:
        out.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)


def _spell_experts(out: Config) -> None:
    """transformers' attribute_map: two names of one number, of which some mlx-lm models read only one."""
    for known, missing in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if known in out:
            out.setdefault(missing, out[known])


def _lift_rope(out: Config, rope: Config, copied: bool) -> None:
    """Settings of one set at the top level. copied: its scaling too, for mlx-lm's models that know only the older key.

    The copy is whole: transformers takes it for the set of all layers, and refuses one without a key that its type
    needs.
    """
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None and out.get(key) is None:
            out[key] = rope[key]
    if copied and rope.get("rope_type", "default") != "default" and out.get("rope_scaling") is None:
        out["rope_scaling"] = {"type": rope["rope_type"], **rope}


def _lift_layers(out: Config) -> None:
    """What transformers says of each layer that differs, which mlx-lm reads once for all layers of full attention."""
    layers = out.get("per_layer_config")
    for layer in layers.values() if isinstance(layers, dict) else ():
        for ours, theirs in (("global_head_dim", "head_dim"), ("num_global_key_value_heads", "num_key_value_heads")):
            if isinstance(layer, dict) and theirs in layer:
                out.setdefault(ours, layer[theirs])


def unquantized(config: Config) -> Config:
    """A copy without anyone's quantization entries, at any depth: they make transformers refuse the folder, or read
    plain weights as quantized ones.
    """
    return {
        key: unquantized(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in (*QUANTIZATION_KEYS, "compression_config")
    }
