"""Microsoft's Phi models."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import LAYER_NORM, WINDOW, entry
from mlxtune_convert.hf.family_rules import mixtral
from mlxtune_convert.hf.rules import Layout


def _phi3_defaults(config: Config) -> dict[str, Any]:
    return {
        "attention.sliding_window": 0,  # which says: no window
        "rope.scaling.original_context_length": config["max_position_embeddings"],
    }


FAMILIES = {
    "phi": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "phi",
            "Phi",
            "phi2",
            "attn_output=self_attn.dense ffn_up=mlp.fc1 ffn_down=mlp.fc2 -ffn_gate -ffn_norm",
            LAYER_NORM,
            {"hidden_act": "gelu_new", "qk_layernorm": False},
            final_norm="model.final_layernorm",
        ),
        any_activation=True,
        computes={"qk_layernorm": (False,), "tie_word_embeddings": (False,)},
    ),
    "phi3": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "phi3",
            "Phi3",
            "phi3",
            "attn_qkv=self_attn.qkv_proj ffn_up=mlp.gate_up_proj -attn_q -attn_k -attn_v -ffn_gate",
            f"{WINDOW} rope.scaling.original_context_length=original_max_position_embeddings",
            defaults=_phi3_defaults,
            absent={"sliding_window": None},
        ),
        any_activation=True,
    ),
    "phimoe": ModelFamily(
        hf=mixtral("mlp.router"),
        any_activation=True,
        computes={
            "attention_bias": (True,),
            "lm_head_bias": (True,),
            "tie_word_embeddings": (False,),
            "num_experts_per_tok": (2,),
        },
    ),
}
