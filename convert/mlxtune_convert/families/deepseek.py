"""DeepSeek's models, and those of others with its attention or its routing of experts: GLM, Kimi."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.changes import fixed
from mlxtune_convert.families.checks import groups_of_experts
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import (
    EXPERT_WIDTH,
    EXPERTS_USED,
    QK_NORM,
    SIGMOID_ROUTER,
    SILU,
    entry,
    experts,
    shared_expert,
)
from mlxtune_convert.hf.family_rules import LAYER, MTP, moe
from mlxtune_convert.hf.rules import Layout, Rule


def _deepseek_v3() -> Layout:
    attention = f"{LAYER}self_attn."
    parts = (f"{attention}embed_q.weight", f"{attention}unembed_out.weight")
    return moe(rules=(Rule(f"{attention}kv_b_proj.weight", parts, "kv_b"),), dropped=MTP)


def _glm4_moe_keys(config: Config) -> dict[str, Any]:
    return {"expert_gating_func": SIGMOID_ROUTER, "nextn_predict_layers": 0}


_INDEXER = "mlx-lm's indexer chooses other positions than transformers' in rows longer than index_topk"

FAMILIES = {
    "deepseek_v2": ModelFamily(
        hf=moe(),
        any_activation=True,
        computes={"mlp_bias": (False,), "tie_word_embeddings": (False,)},
    ),
    "deepseek_v3": ModelFamily(
        hf=_deepseek_v3(),
        any_activation=True,
        computes={"tie_word_embeddings": (False,)},
        checks=(groups_of_experts,),
    ),
    "deepseek_v32": ModelFamily(not_exported=_INDEXER),
    "dots1": ModelFamily(hf=moe(switch="experts")),
    "glm": ModelFamily(hf=Layout(), any_activation=True),
    "glm4": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "glm4",
            "Glm4",
            "glm4",
            "ffn_up=mlp.gate_up_proj -ffn_gate "
            "post_attention_norm=post_self_attn_layernorm post_ffw_norm=post_mlp_layernorm",
        ),
        any_activation=True,
        computes={"tie_word_embeddings": (False,)},
    ),
    "glm4_moe": ModelFamily(
        hf=moe(dropped=MTP),
        gguf=entry(
            "glm4_moe",
            "Glm4Moe",
            "glm4moe",
            f"post_attention_norm=post_attention_layernorm -ffn_norm {QK_NORM} "
            f"{shared_expert('mlp.shared_experts')} {experts('mlp', dense_too=True)}",
            f"expert_count=n_routed_experts {EXPERTS_USED} {EXPERT_WIDTH} "
            "leading_dense_block_count=first_k_dense_replace expert_shared_count=n_shared_experts "
            "expert_weights_scale=routed_scaling_factor expert_weights_norm=norm_topk_prob",
            {**SILU, "n_group": 1, "topk_group": 1},
            parameters="exp_probs_b.bias=mlp.gate.e_score_correction_bias",
            more=_glm4_moe_keys,
            written_only=True,
        ),
        any_activation=True,
        computes={"tie_word_embeddings": (False,)},
        checks=(groups_of_experts,),
    ),
    "glm4_moe_lite": ModelFamily(hf=_deepseek_v3()),
    "glm_moe_dsa": ModelFamily(
        config_first=fixed(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1),
        not_exported=_INDEXER,
    ),
    "kimi_k25": ModelFamily(not_exported="transformers saves its text part under the names of its tower"),
}
