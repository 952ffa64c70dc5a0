"""config.json, normalised on the way in.

transformers 5 writes rotary settings as `rope_parameters`; mlx-lm reads `rope_theta`, `rope_scaling` and
`partial_rotary_factor` at the top level, and where they are missing most of its models silently use a default base,
which is another model. `normalise` writes both spellings. The original is kept beside the converted model.
"""

from __future__ import annotations

from typing import Any

# transformers' attribute_map: two names of one number, of which some mlx-lm models read only one.
ALIASES = (("num_experts", "num_local_experts"),)
SOURCE_FILE = "mlxtune_source.json"
QUANTIZATION_KEYS = ("quantization", "quantization_config")


def normalise(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` that mlx-lm reads as transformers means it. Old-style configs come back unchanged."""
    out = dict(config)
    text = out.get("text_config")
    if isinstance(text, dict):
        out["text_config"] = normalise(text)
    rope = out.get("rope_parameters")
    if isinstance(rope, dict):
        # Models with windowed layers keep one set per layer type.
        full = rope.get("full_attention", rope)
        local = rope.get("sliding_attention")
        if isinstance(full, dict):
            _lift_rope(out, full)
        if isinstance(local, dict) and "rope_theta" in local:
            out.setdefault("rope_local_base_freq", local["rope_theta"])
    for one, other in ALIASES:
        for known, missing in ((one, other), (other, one)):
            if known in out and missing not in out:
                out[missing] = out[known]
    return out


def _lift_rope(out: dict[str, Any], rope: dict[str, Any]) -> None:
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None and out.get(key) is None:
            out[key] = rope[key]
    if rope.get("rope_type", "default") != "default" and out.get("rope_scaling") is None:
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        out["rope_scaling"] = {"type": rope["rope_type"], **scaling}  # some mlx-lm models know only the older key


def unquantized(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without MLX's quantization entries, which make transformers refuse the folder."""
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
