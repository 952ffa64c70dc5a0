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

_MAMBA_HEADS = _of(
    "mamba_n_heads=8 mamba_d_head=16 mamba_d_state=16 mamba_n_groups=1 mamba_expand=2 mamba_d_conv=4 "
    "mamba_chunk_size=16",
    _GQA,
)
_SHARED = _of("shared_expert_intermediate_size=48", _MOE)
_PER_LAYER = _of("hidden_size_per_layer_input=16 vocab_size_per_layer_input=320", _HEADS)
_INDEXER = _of("index_head_dim=16 index_n_heads=2 index_topk=16", _MLA)
_LLAMA4 = _of(
    "intermediate_size_mlp=96 num_local_experts=4 num_experts_per_tok=1 num_hidden_layers=4 moe_layers=[1,3] "
    "interleave_moe_layer_step=2",
    _HEADS,
)
_GEMMA3N = _of(
    "altup_num_inputs=2 laurel_rank=8 num_hidden_layers=4 num_kv_shared_layers=2 intermediate_size=[128,128,128,128] "
    "activation_sparsity_pattern=[0.0,0.5,0.0,0.5] sliding_window=16 "
    'layer_types=["sliding_attention","full_attention","sliding_attention","full_attention"]',
    _PER_LAYER,
    _TIED,
)
_TOWER = _of(
    "depth=1 hidden_size=32 intermediate_size=32 num_heads=2 out_hidden_size=64 patch_size=14 spatial_merge_size=1 "
    "temporal_patch_size=1 in_channels=3 num_position_embeddings=16"
)
_PIXTRAL = _of('model_type="pixtral" head_dim=16', _VISION)
_QWEN_IDS = _of("image_token_id=300 video_token_id=301 vision_start_token_id=302 vision_end_token_id=303")
_MROPE = _of('rope_type="default" rope_theta=10000.0 mrope_section=[3,3,2]')
_MROPE_WHOLE = _of("mrope_interleaved=true", _MROPE)
_MROPE_PART = _of("mrope_section=[2,1,1] partial_rotary_factor=0.5", _MROPE_WHOLE)


def _around(vision: Shape, *others: Shape, **text: Any) -> Shape:
    """A vision model: settings of its tower and its own, and those of the text model inside."""
    own: Shape = {key: value for other in others for key, value in other.items()}
    return {"text_config": {**_TEXT, **text}, "vision_config": vision, **own}


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
    "apertus": _GQA,
    "exaone": _GQA,
    "internlm3": _HEADS,
    "iquestcoder": _GQA,
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
    "gemma4_text experts": _of(
        "hidden_size_per_layer_input=0 enable_moe_block=true num_experts=4 top_k_experts=2 moe_intermediate_size=48",
        _HEADS,
        _WINDOWED,
    ),
    # Later blocks use the keys and values of earlier ones; those without a window have heads of their own width.
    "gemma4_text shared": _of(
        "num_kv_shared_layers=2 num_hidden_layers=4 use_double_wide_mlp=true sliding_window=16 global_head_dim=32 "
        'layer_types=["sliding_attention","full_attention","sliding_attention","full_attention"]',
        _PER_LAYER,
    ),
    "gemma3n_text": _GEMMA3N,
    "llama4_text": _LLAMA4,
    "qwen3_5_moe_text": _of("", _SHARED, _LINEAR_ATTENTION),
    "afmoe": _of("moe_intermediate_size=48 num_dense_layers=1", _CHOOSE, _HEADS, _WINDOWED),
    "dots1": _of("n_shared_experts=1", _ROUTED, _HEADS),
    "exaone_moe": _of(
        "moe_intermediate_size=48 first_k_dense_replace=1 num_shared_experts=1 n_group=1 topk_group=1",
        _CHOOSE,
        _HEADS,
        _WINDOWED,
    ),
    "falcon_mamba": _of("intermediate_size=128", _MAMBA),
    "glm4_moe_lite": _MLA,
    "granitemoehybrid": _of(
        'layer_types=["mamba","attention"] shared_intermediate_size=64 embedding_multiplier=2.0 logits_scaling=3.0 '
        'position_embedding_type="nope"',
        _MAMBA_HEADS,
        _CHOOSE_LOCAL,
    ),
    "granitemoehybrid dense": _of(
        'layer_types=["mamba","attention"] shared_intermediate_size=64 num_local_experts=0 num_experts_per_tok=0 '
        'position_embedding_type="rope"',
        _MAMBA_HEADS,
    ),
    "laguna": _of("moe_intermediate_size=48", _CHOOSE, _HEADS, _WINDOWED),
    "mellum": _of("", _MOE, _HEADS, _WINDOWED),
    "minimax_m2": _of("rotary_dim=8", _CHOOSE_LOCAL, _HEADS),
    "nanochat": _GQA,
    "nemotron_h": _of(
        'layers_block_type=["mamba","attention","mlp","moe"] mamba_num_heads=8 mamba_head_dim=16 ssm_state_size=16 '
        "n_groups=1 conv_kernel=4 expand=2 chunk_size=16 n_routed_experts=4 num_experts_per_tok=2 "
        "moe_intermediate_size=48 n_shared_experts=1 moe_shared_expert_intermediate_size=48 n_group=1 topk_group=1",
        _HEADS,
    ),
    # As many heads of keys as of values: transformers saves others torn in the wrong places.
    "olmo_hybrid": _of("linear_num_key_heads=4", _LINEAR_ATTENTION),
    "recurrent_gemma": _of(
        'num_key_value_heads=1 lru_width=64 attention_window_size=16 block_types=["recurrent","attention"]'
    ),
    "solar_open": _of("n_shared_experts=1 first_k_dense_replace=0", _HEADS, _ROUTED),
    "gpt2": _of("n_embd=64 n_layer=2 n_head=4 n_positions=512", _TIED),
    "gpt_neox": _of("rotary_pct=0.25 intermediate_size=256"),
    "gptj": _of("n_embd=64 n_layer=2 n_head=4 n_positions=512 rotary_dim=8"),
}
# Vision models whose text part is tuned.
WRAPPERS: dict[str, Shape] = {
    "gemma3": _around(_VISION, _of("mm_tokens_per_image=4"), **_of("query_pre_attn_scalar=16", _WINDOWED)),
    "gemma4": _around(
        _of("num_key_value_heads=2 head_dim=16", _VISION),
        _of("audio_config=null", _TIED),
        **_of("global_head_dim=32", _PER_LAYER, _WINDOWED),
    ),
    "gemma4_unified": _around(
        _of("mm_embed_dim=32 mm_posemb_size=16 output_proj_dims=32 num_soft_tokens=4"),
        _of("audio_config=null", _TIED),
        **_of("", _HEADS, _WINDOWED),
    ),
    "llama4": _around(
        _of(
            "vision_output_dim=32 projector_input_dim=32 projector_output_dim=32 intermediate_size=128",
            {key: value for key, value in _VISION.items() if key != "intermediate_size"},
        ),
        **_LLAMA4,
    ),
    "llava": _around(_PIXTRAL, _of("image_token_index=310"), **_of('model_type="mistral"')),
    "mistral3": _around(_PIXTRAL, **_of('model_type="mistral"')),
    "mistral3 of ministral3": _around(_PIXTRAL, _TIED, **_of('model_type="ministral3"', _TIED)),
    "muse_glimmer": _around(_VISION),
    "qwen2_vl": _around(
        _of(
            "depth=1 embed_dim=32 hidden_size=64 num_heads=2 patch_size=14 spatial_merge_size=1 temporal_patch_size=1 "
            "mlp_ratio=2"
        ),
        _QWEN_IDS,
        rope_parameters=_MROPE,
    ),
    "qwen2_5_vl": _around(_of("fullatt_block_indexes=[0]", _TOWER), _QWEN_IDS, rope_parameters=_MROPE),
    "qwen3_vl": _around(_of("deepstack_visual_indexes=[0]", _TOWER), _QWEN_IDS, rope_parameters=_MROPE_WHOLE),
    "qwen3_vl_moe": _around(
        _of("deepstack_visual_indexes=[0]", _TOWER), _QWEN_IDS, rope_parameters=_MROPE_WHOLE, **_MOE
    ),
    "qwen3_5": _around(_TOWER, _QWEN_IDS, rope_parameters=_MROPE_PART, **_LINEAR_ATTENTION),
    "qwen3_5_moe": _around(_TOWER, _QWEN_IDS, rope_parameters=_MROPE_PART, **_of("", _SHARED, _LINEAR_ATTENTION)),
}
# Of which mlx-lm's model is another one than transformers', or no model at all.
REFUSED: dict[str, Shape] = {
    "deepseek_v32": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    "mistral3 of mistral4": _around(_PIXTRAL, **_of('model_type="mistral4"', _MLA)),
    "dbrx": _of(
        'd_model=64 n_heads=4 n_layers=2 max_seq_len=512 attn_config={"kv_n_heads":2,"clip_qkv":8.0,'
        '"rope_theta":10000.0} ffn_config={"ffn_hidden_size":48,"moe_num_experts":4,"moe_top_k":2}'
    ),
    "bitnet": _GQA,
    "kimi_linear": _MLA,
    "longcat_flash": _of(
        "num_layers=2 ffn_hidden_size=96 expert_ffn_hidden_size=48 n_routed_experts=4 moe_topk=2 zero_expert_num=2",
        _MLA,
    ),
    "mimo_v2_flash": _of("", _ROUTED, _HEADS, _WINDOWED),
    "minicpm3": _of("q_lora_rank=24 kv_lora_rank=32 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=16"),
    "minimax": _of('layer_types=["linear_attention","full_attention"]', _CHOOSE_LOCAL, _HEADS),
    "ministral": _HEADS,
}
SHAPES = {**IDENTITY, **CHANGED, **WRAPPERS, **REFUSED}
