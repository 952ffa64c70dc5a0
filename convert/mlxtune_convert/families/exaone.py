"""LG AI Research's EXAONE models."""

from __future__ import annotations

from mlxtune_convert.families.changes import copied
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import QK_NORM, SILU, entry
from mlxtune_convert.hf.family_rules import LAYER, moe
from mlxtune_convert.hf.rules import Layout, Rule


def _exaone() -> Layout:
    ours, theirs = "transformer.h.{n}.", LAYER
    return Layout(
        modules=(
            (f"{ours}attn.attention.out_proj", f"{theirs}self_attn.o_proj"),
            (f"{ours}attn.attention.{{s}}", f"{theirs}self_attn.{{s}}"),
            (f"{ours}mlp.c_fc_0", f"{theirs}mlp.gate_proj"),
            (f"{ours}mlp.c_fc_1", f"{theirs}mlp.up_proj"),
            (f"{ours}mlp.c_proj", f"{theirs}mlp.down_proj"),
            (f"{ours}ln_1", f"{theirs}input_layernorm"),
            (f"{ours}ln_2", f"{theirs}post_attention_layernorm"),
            ("transformer.wte", "model.embed_tokens"),
            ("transformer.ln_f", "model.norm"),
        )
    )


def _exaone_moe() -> Layout:
    mlp = f"{LAYER}mlp."
    bias = Rule(f"{mlp}e_score_correction_bias", (f"{mlp}gate.e_score_correction_bias",))
    return moe(rules=(bias,), dropped=("mtp.",))


def _exaone4_config(config: Config) -> None:
    """mlx-lm reads a pattern such as LLLG (three layers with a window, one without), and null without windows."""
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    kinds = config.get("layer_types") or []
    letters = {True: "G", False: "L"}
    pattern = "".join(letters[kind == "full_attention"] for kind in kinds)
    config["sliding_window_pattern"] = pattern if "sliding_attention" in kinds else None


def _exaone_moe_config(config: Config) -> None:
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        config.setdefault("is_moe_layer", [kind == "sparse" for kind in kinds])


FAMILIES = {
    "exaone": ModelFamily(
        hf=_exaone(),
        config_first=copied(num_layers="num_hidden_layers", layer_norm_epsilon="rms_norm_eps"),
    ),
    "exaone4": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "exaone4",
            "Exaone4",
            "exaone4",
            "post_attention_norm=post_attention_layernorm post_ffw_norm=post_feedforward_layernorm "
            f"-attn_norm -ffn_norm {QK_NORM}",
            fixed={**SILU, "sliding_window": None},
            written_only=True,
        ),
        config_last=_exaone4_config,
        any_activation=True,
        needs_layers=("full_attention",),
    ),
    "exaone_moe": ModelFamily(hf=_exaone_moe(), config_first=_exaone_moe_config),
}
