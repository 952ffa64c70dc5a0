"""Families that stand alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtune_convert.families.changes import fixed, rotary_part
from mlxtune_convert.families.checks import BOTH_KINDS, heads_share_the_width, regular_windows
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import (
    LAYER_NORM,
    LOCAL_EXPERTS,
    QK_NORM,
    SIGMOID_ROUTER,
    SILU,
    WINDOW,
    entry,
    experts,
)
from mlxtune_convert.hf.family_rules import LAYER, MOVED, MTP, PARTS, mixtral, moe
from mlxtune_convert.hf.rules import Layout, Rule

_APERTUS = Layout(tuple(Rule(f"{{s}}.alpha_{sign}", (f"{{s}}.alpha_{sign}",), "number") for sign in "pn"))
_MUSE_GLIMMER = Layout(
    (Rule(f"model.{MOVED}{{s}}", ("model.{s}",)),),
    dropped=("vision_tower.", "vision_adapter.", "vision_projection."),
    tower="vision_tower.",
)


def _laguna() -> Layout:
    rules = (
        Rule(f"{LAYER}mlp.gate.weight", (f"{LAYER}mlp.gate.proj.weight",)),
        Rule(f"{LAYER}mlp.experts.e_score_correction_bias", (f"{LAYER}mlp.gate.e_score_correction_bias",)),
    )
    # PEFT renames keys as transformers does when it loads, and garbles what is already named as in memory.
    garbled = tuple(f".shared_expert.{name}" for name in PARTS)
    return replace(moe(router=("mlp.gate.proj", "mlp.gate"), rules=rules), not_in_peft=garbled)


def _minimax_m2_config(config: Config) -> None:
    config.setdefault("shared_intermediate_size", 0)
    if isinstance(config.get("head_dim"), int):
        config.setdefault("rotary_dim", int(config["head_dim"] * rotary_part(config)))


def _minimax_m2_keys(config: Config) -> dict[str, Any]:
    return {"expert_gating_func": SIGMOID_ROUTER, "rope.dimension_count": config["rotary_dim"]}


def _solar_open_config(config: Config) -> None:
    config.setdefault("partial_rotary_factor", rotary_part(config))


def _ernie4_5_moe(config: Config) -> str:
    return "mlx-lm leaves out the router's e_score_correction_bias"


_OLD_CONFIGURATIONS = "mlx-lm reads the first configurations of the family, not those of transformers"

FAMILIES = {
    "afmoe": ModelFamily(hf=moe(router=("mlp.router.gate", "mlp.router.gate"), switch="experts")),
    "apertus": ModelFamily(hf=_APERTUS, config_first=fixed(mlp_bias=False, post_norm=False, qk_norm=True)),
    "bitnet": ModelFamily(not_exported="its weights are ternary codes in mlx-lm, which nothing here trains"),
    "cohere": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "cohere",
            "Cohere",
            "command-r",
            "-ffn_norm",
            f"{LAYER_NORM} logit_scale=logit_scale",
            {**SILU, "use_qk_norm": False},
        ),
        any_activation=True,
        computes={"tie_word_embeddings": (True,)},
    ),
    "cohere2": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "cohere2",
            "Cohere2",
            "cohere2",
            "-ffn_norm",
            f"{LAYER_NORM} logit_scale=logit_scale {WINDOW}",
            {**SILU, "sliding_window_pattern": 4},
        ),
        any_activation=True,
        computes={"tie_word_embeddings": (True,)},
        checks=(heads_share_the_width, regular_windows),
        needs_layers=BOTH_KINDS,
    ),
    "dbrx": ModelFamily(not_exported="mlx-lm takes its stacked experts apart"),
    "ernie4_5": ModelFamily(hf=Layout(), gguf=entry("ernie4_5", "Ernie4_5", "ernie4_5"), any_activation=True),
    "ernie4_5_moe": ModelFamily(differs=_ernie4_5_moe, any_activation=True),
    "helium": ModelFamily(hf=Layout(), any_activation=True, computes={"tie_word_embeddings": (False,)}),
    "hunyuan_v1_dense": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "hunyuan_v1_dense",
            "HunYuanDenseV1",
            "hunyuan-dense",
            "attn_q_norm=self_attn.query_layernorm attn_k_norm=self_attn.key_layernorm",
        ),
        any_activation=True,
    ),
    "kimi_linear": ModelFamily(not_exported=_OLD_CONFIGURATIONS),
    "laguna": ModelFamily(hf=_laguna(), no_rope_scaling=True),
    "longcat_flash": ModelFamily(not_exported=_OLD_CONFIGURATIONS),
    "mellum": ModelFamily(hf=moe(), no_rope_scaling=True),
    "mimo_v2_flash": ModelFamily(not_exported=_OLD_CONFIGURATIONS),
    "minicpm3": ModelFamily(
        not_exported="mlx-lm reads longrope alone, and gives other logits there than transformers",
    ),
    "minimax": ModelFamily(not_exported="mlx-lm's is MiniMax-M2, transformers' MiniMax-Text-01"),
    "minimax_m2": ModelFamily(
        hf=mixtral("mlp.gate"),
        gguf=entry(
            "minimax_m2",
            "MiniMaxM2",
            "minimax-m2",
            f"{QK_NORM} {experts('block_sparse_moe')}",
            f"{LOCAL_EXPERTS} expert_feed_forward_length=intermediate_size rope.dimension_count=rotary_dim",
            {**SILU, "scoring_func": "sigmoid"},
            parameters="exp_probs_b.bias=block_sparse_moe.e_score_correction_bias",
            more=_minimax_m2_keys,
            written_only=True,
        ),
        config_first=_minimax_m2_config,
    ),
    "minimax_m3_vl": ModelFamily(not_exported="nobody compared mlx-lm's model with the one in transformers yet"),
    "muse_glimmer": ModelFamily(hf=_MUSE_GLIMMER),
    "muse_spark": ModelFamily(not_exported="mlx-lm joins its projections and stores its norms in another form"),
    "nemotron": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "nemotron",
            "Nemotron",
            "nemotron",
            "-ffn_gate",
            "attention.layer_norm_epsilon=norm_eps",
            {"hidden_act": "relu2"},
            norm_offset=1.0,
        ),
        any_activation=True,
    ),
    "solar_open": ModelFamily(hf=moe(dropped=MTP), config_first=_solar_open_config),
    "stablelm": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "stablelm",
            "StableLm",
            "stablelm",
            keys=f"{LAYER_NORM} use_parallel_residual=use_parallel_residual",
            fixed={**SILU, "qk_layernorm": False, "use_parallel_residual": False},
        ),
        any_activation=True,
        computes={"tie_word_embeddings": (False,)},
    ),
}
