"""Tiny configurations of many architectures: what `tiny.make_model` builds and every family is held to."""

from __future__ import annotations

import json
from typing import Any

Shape = dict[str, Any]


def _of(text: str, *others: Shape) -> Shape:
    """Settings from "key=json key=json", on top of others."""
    pairs = (entry.partition("=") for entry in text.split())
    return {key: value for other in others for key, value in other.items()} | {k: json.loads(v) for k, _, v in pairs}


_GQA = _of("num_key_value_heads=2")
_HEADS = _of("head_dim=16", _GQA)
_WINDOWED = _of('sliding_window=16 layer_types=["sliding_attention","full_attention"]')
_TIED = _of("tie_word_embeddings=true")
_SCALAR = _of("query_pre_attn_scalar=16", _TIED)
_HALF_ROTARY = _of("partial_rotary_factor=0.5", _HEADS)
_CHOOSE = _of("num_experts=4 num_experts_per_tok=2", _GQA)
_CHOOSE_LOCAL = _of("num_local_experts=4 num_experts_per_tok=2", _GQA)
_MOE = _of("moe_intermediate_size=48 decoder_sparse_step=1 mlp_only_layers=[]", _CHOOSE)
_ROUTED = _of(
    "n_routed_experts=4 num_experts_per_tok=2 moe_intermediate_size=48 first_k_dense_replace=1 n_group=2 topk_group=1"
)
_MLA = _of(
    "kv_lora_rank=32 q_lora_rank=24 qk_rope_head_dim=8 qk_nope_head_dim=16 v_head_dim=16 n_shared_experts=1 "
    "num_key_value_heads=4 head_dim=8",
    _ROUTED,
)
_YARN = _of(
    'rope_type="yarn" rope_theta=10000.0 factor=4.0 original_max_position_embeddings=128 mscale=1.0 mscale_all_dim=1.0'
)
_LINEAR_ATTENTION = _of(
    "linear_num_key_heads=2 linear_num_value_heads=4 linear_key_head_dim=16 linear_value_head_dim=16 "
    'linear_conv_kernel_dim=4 layer_types=["linear_attention","full_attention"] full_attention_interval=2',
    _HEADS,
)
_CONV = _of('layer_types=["conv","full_attention"] conv_L_cache=4', _GQA, _TIED)
_MAMBA = _of("state_size=16 expand=2 num_hidden_layers=2 conv_kernel=4 time_step_rank=4")
_VISION = _of(
    "hidden_size=32 intermediate_size=32 num_hidden_layers=1 num_attention_heads=2 image_size=28 patch_size=14"
)
_TEXT = _of(
    "vocab_size=320 hidden_size=64 intermediate_size=128 num_hidden_layers=2 num_attention_heads=4 "
    "max_position_embeddings=512",
    _HEADS,
)

IDENTITY: dict[str, Shape] = {
    "llama": _GQA,
    "mistral": _of("sliding_window=null", _GQA),
    "qwen2": _GQA,
    "qwen3": _HEADS,
    "phi": _GQA,
    "phi3": _of("pad_token_id=0", _GQA),
    "gemma": _of("", _HEADS, _TIED),
    "gemma2": _of("", _HEADS, _SCALAR),
    "gemma3_text": _of("", _HEADS, _WINDOWED, _SCALAR),
    "granite": _of("logits_scaling=3.0 embedding_multiplier=2.0", _GQA),
    "cohere": _of("logit_scale=0.25", _GQA, _TIED),
    "cohere2": _of("logit_scale=0.25", _HEADS, _WINDOWED, _TIED),
    "olmo2": _GQA,
    "olmo3": _of("", _GQA, _WINDOWED),
    "smollm3": _GQA,
    "starcoder2": _GQA,
    "stablelm": _of("layer_norm_eps=1e-5", _GQA),
    "helium": _HEADS,
    "seed_oss": _HEADS,
    "ernie4_5": _HEADS,
    "glm": _HALF_ROTARY,
    "glm4": _HALF_ROTARY,
    "gpt_bigcode": _of("n_embd=64 n_inner=128 n_layer=2 n_head=4 n_positions=512"),
    "exaone4": _of("", _GQA, _WINDOWED),
    "nemotron": _HALF_ROTARY,
    "hunyuan_v1_dense": _HEADS,
    "ministral3": _HEADS,
}
CHANGED: dict[str, Shape] = {
    "mixtral": _CHOOSE_LOCAL,
    "qwen2_moe": _of("shared_expert_intermediate_size=48", _MOE),
    "qwen3_moe": _of("head_dim=16 norm_topk_prob=true moe_intermediate_size=64", _MOE),
    "olmoe": _CHOOSE,
    "phimoe": _of("attention_bias=true lm_head_bias=true", _CHOOSE_LOCAL),
    "granitemoe": _of("logits_scaling=3.0", _CHOOSE_LOCAL),
    "gpt_oss": _of(
        'head_dim=16 rope_parameters={"rope_type":"default","rope_theta":10000.0}', _CHOOSE_LOCAL, _WINDOWED
    ),
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy", "rope_parameters": _YARN},
    "deepseek_v3": _MLA,
    "glm4_moe": _of("", _HALF_ROTARY, _ROUTED),
    "ernie4_5_moe": _of(
        "moe_num_experts=4 moe_k=2 moe_intermediate_size=48 moe_num_shared_experts=1 moe_layer_start_index=1", _HEADS
    ),
    "lfm2": _CONV,
    "lfm2_moe": _of("moe_intermediate_size=48 num_dense_layers=1", _CONV, _CHOOSE),
    "mamba": _of("intermediate_size=128", _MAMBA),
    "mamba2": _of("num_heads=8 head_dim=16 n_groups=1", _MAMBA),
    "jamba": _of(
        "attn_layer_period=2 attn_layer_offset=1 expert_layer_period=2 expert_layer_offset=1 use_mamba_kernels=false "
        "mamba_dt_rank=4",
        _CHOOSE,
    ),
    "falcon_h1": _of(
        "mamba_d_ssm=64 mamba_n_heads=4 mamba_d_head=16 mamba_d_state=16 attention_in_multiplier=0.5 "
        "attention_out_multiplier=0.7 key_multiplier=0.6 embedding_multiplier=3.0 lm_head_multiplier=0.4 "
        "ssm_in_multiplier=1.5 ssm_out_multiplier=0.8 mlp_multipliers=[0.9,1.1] ssm_multipliers=[0.5,0.6,0.7,0.8,0.9]",
        _HEADS,
    ),
    "qwen3_next": _of("shared_expert_intermediate_size=48", _MOE, _LINEAR_ATTENTION),
    "qwen3_5_text": _LINEAR_ATTENTION,
    "gemma4_text": _of("hidden_size_per_layer_input=16 vocab_size_per_layer_input=320", _HEADS),
    "gemma3": {
        "text_config": _of("query_pre_attn_scalar=16", _TEXT, _WINDOWED),
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": _of('model_type="mistral"', _TEXT),
        "vision_config": _of('model_type="pixtral" head_dim=16', _VISION),
    },
    "llama4_text": _of(
        "intermediate_size_mlp=96 num_local_experts=4 num_experts_per_tok=1 num_hidden_layers=4 moe_layers=[1,3] "
        "interleave_moe_layer_step=2",
        _HEADS,
    ),
    "gpt2": _of("n_embd=64 n_layer=2 n_head=4 n_positions=512", _TIED),
    "gpt_neox": _of("rotary_pct=0.25 intermediate_size=256"),
}
SHAPES = {**IDENTITY, **CHANGED}
