"""Architectures of llama.cpp that GGUF files are written for, and not read: what is more there than names and keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf.family import SILU, Family, entry, experts

SIGMOID = 2  # llama.cpp's number of a router that scores each expert by itself
_QK_NORM = "attn_q_norm=self_attn.q_norm attn_k_norm=self_attn.k_norm"
_EXPERT_KEYS = "expert_used_count=num_experts_per_tok expert_feed_forward_length=moe_intermediate_size"
_WINDOW = "attention.sliding_window=sliding_window"


def _shared(place: str) -> str:
    return " ".join(f"ffn_{part}_shexp={place}.{part}_proj" for part in ("gate", "up", "down"))


def _and_dense(names: str) -> str:
    """Stacked experts in some blocks, the plain layers in the others."""
    return " ".join(name for name in names.split() if not name.startswith("-"))


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    """How many pairs of a head turn with time, height and width; on text the three are one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sections = [int(number) for number in rope.get("mrope_section") or (11, 11, 10)]
    return {"rope.dimension_sections": sections + [0] * (4 - len(sections))}


def _windowed(config: dict[str, Any]) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.get("layer_types") or ()]


def _qwen3_vl(config: dict[str, Any]) -> dict[str, Any]:
    deep = (config.get("vision_config") or {}).get("deepstack_visual_indexes") or ()
    return {**_sections(config), "n_deepstack_layers": len(deep)}


def _qwen3_5(config: dict[str, Any]) -> dict[str, Any]:
    interval = int(config.get("full_attention_interval") or 4)
    kinds = config.get("layer_types") or ()
    if any((kind == "full_attention") != ((layer + 1) % interval == 0) for layer, kind in enumerate(kinds)):
        raise UserError(
            f"llama.cpp's qwen35 architecture has full attention in every {interval}th layer alone",
            "`--to hf` exports the model all the same.",
        )
    return {
        **_sections(config),
        "full_attention_interval": interval,
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
    }


def _tiled(config: dict[str, Any], width: int) -> np.ndarray | None:
    """llama.cpp's order of the value heads, each of `width` rows: HF has those of one key head together, llama.cpp the
    first of every key head, then the second of every one.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if keys == values:
        return None
    heads = np.arange(values * width).reshape(keys, values // keys, width)
    return heads.swapaxes(0, 1).reshape(-1)


def _qwen3_5_rows(name: str, config: dict[str, Any]) -> np.ndarray | None:
    stem = name.split(".")[2] if name.startswith("blk.") else ""
    if stem in ("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt"):
        return _tiled(config, 1)
    tiled = _tiled(config, config["linear_value_head_dim"])
    if tiled is None or stem == "attn_gate":
        return tiled if stem == "attn_gate" else None
    if stem in ("attn_qkv", "ssm_conv1d"):
        before = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]  # queries and keys stay
        return np.concatenate([np.arange(before), before + tiled])
    return None


def _qwen3_5_columns(name: str, config: dict[str, Any]) -> np.ndarray | None:
    return _tiled(config, config["linear_value_head_dim"]) if ".ssm_out." in name else None


def _decay(name: str, array: np.ndarray) -> np.ndarray:
    return -np.exp(array) if name.endswith(".ssm_a") else array


_QWEN3_5: dict[str, Any] = {
    "parameters": "ssm_a=linear_attn.A_log ssm_dt.bias=linear_attn.dt_bias",
    "more": _qwen3_5,
    "rows": _qwen3_5_rows,
    "columns": _qwen3_5_columns,
    "value": _decay,
    "written_only": True,
}
_QWEN3_5_NAMES = (
    f"{_QK_NORM} attn_gate=linear_attn.in_proj_z attn_qkv=linear_attn.in_proj_qkv ssm_beta=linear_attn.in_proj_b "
    "ssm_alpha=linear_attn.in_proj_a ssm_conv1d=linear_attn.conv1d ssm_norm=linear_attn.norm "
    "ssm_out=linear_attn.out_proj post_attention_norm=post_attention_layernorm -ffn_norm"
)
_QWEN3_5_KEYS = (
    "ssm.conv_kernel=linear_conv_kernel_dim ssm.state_size=linear_key_head_dim "
    "ssm.group_count=linear_num_key_heads ssm.time_step_rank=linear_num_value_heads"
)


def _gemma4(config: dict[str, Any]) -> dict[str, Any]:
    windowed, layers = _windowed(config), config["num_hidden_layers"]
    shared = int(config.get("num_kv_shared_layers") or 0)
    whole, part = int(config.get("global_head_dim") or config["head_dim"]), int(config["head_dim"])
    wide = [
        1 + (bool(config.get("use_double_wide_mlp", True)) and layer >= layers - shared > 0) for layer in range(layers)
    ]
    few = config["num_key_value_heads"]
    fewer = config.get("num_global_key_value_heads") or few
    rope = config["rope_parameters"]
    return {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "attention.sliding_window_pattern": windowed,
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": part,
        "attention.value_length_swa": part,
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": part,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "feed_forward_length": [config["intermediate_size"] * times for times in wide],
        "attention.head_count_kv": [few if window else fewer for window in windowed],
        "final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),  # without it: 30
    }


def _lfm2(config: dict[str, Any]) -> dict[str, Any]:
    kinds = config["layer_types"]
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):  # as the model itself makes it
        width = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        multiple = int(config["block_multiple_of"])
        width = multiple * -(-width // multiple)
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": [config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in kinds],
        "attention.layer_norm_rms_epsilon": float(config.get("norm_eps", 1e-5)),
    }


def _ministral3(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta")
    return {"attention.temperature_scale": None if beta is None else float(beta)}


def _glm4_moe(config: dict[str, Any]) -> dict[str, Any]:
    return {"expert_gating_func": SIGMOID, "nextn_predict_layers": 0}


NEWER: tuple[Family, ...] = (
    entry("qwen3_vl_text Qwen3VL qwen3vl", _QK_NORM, more=_qwen3_vl, written_only=True),
    entry(
        "qwen3_vl_moe_text Qwen3VLMoe qwen3vlmoe",
        f"{_QK_NORM} {experts('mlp')}",
        f"expert_count=num_experts {_EXPERT_KEYS}",
        more=_qwen3_vl,
        written_only=True,
    ),
    entry("qwen3_5_text Qwen3_5 qwen35", _QWEN3_5_NAMES, _QWEN3_5_KEYS, **_QWEN3_5),
    entry(
        "qwen3_5_moe_text Qwen3_5Moe qwen35moe",
        f"{_QWEN3_5_NAMES} {experts('mlp')} {_shared('mlp.shared_expert')} ffn_gate_inp_shexp=mlp.shared_expert_gate",
        f"{_QWEN3_5_KEYS} expert_count=num_experts {_EXPERT_KEYS} "
        "expert_shared_feed_forward_length=shared_expert_intermediate_size",
        **_QWEN3_5,
    ),
    *(
        entry(
            f"{kind} Gemma4 gemma4",
            f"{_QK_NORM} post_attention_norm=post_attention_layernorm ffn_norm=pre_feedforward_layernorm "
            "post_ffw_norm=post_feedforward_layernorm inp_gate=per_layer_input_gate proj=per_layer_projection "
            "post_norm=post_per_layer_input_norm",
            _WINDOW,
            {"hidden_activation": "gelu_pytorch_tanh", "enable_moe_block": False},
            parameters="layer_output_scale.weight=layer_scalar",
            outside="per_layer_token_embd=model.embed_tokens_per_layer "
            "per_layer_model_proj=model.per_layer_model_projection per_layer_proj_norm=model.per_layer_projection_norm",
            more=_gemma4,
            written_only=True,
        )
        for kind in ("gemma4_text", "gemma4_unified_text")
    ),
    entry("ministral3 Ministral3 mistral3", more=_ministral3, permuted=True, written_only=True),
    entry(
        "glm4_moe Glm4Moe glm4moe",
        f"post_attention_norm=post_attention_layernorm -ffn_norm {_QK_NORM} {_shared('mlp.shared_experts')} "
        + _and_dense(experts("mlp")),
        f"expert_count=n_routed_experts {_EXPERT_KEYS} leading_dense_block_count=first_k_dense_replace "
        "expert_shared_count=n_shared_experts expert_weights_scale=routed_scaling_factor "
        "expert_weights_norm=norm_topk_prob",
        {**SILU, "n_group": 1, "topk_group": 1},
        parameters="exp_probs_b.bias=mlp.gate.e_score_correction_bias",
        more=_glm4_moe,
        written_only=True,
    ),
    entry(
        "exaone4 Exaone4 exaone4",
        "post_attention_norm=post_attention_layernorm post_ffw_norm=post_feedforward_layernorm -attn_norm -ffn_norm "
        + _QK_NORM,
        fixed={**SILU, "sliding_window": None},
        written_only=True,
    ),
    entry(
        "lfm2 Lfm2 lfm2",
        "attn_norm=operator_norm ffn_norm=ffn_norm attn_output=self_attn.out_proj attn_q_norm=self_attn.q_layernorm "
        "attn_k_norm=self_attn.k_layernorm shortconv.conv=conv.conv shortconv.in_proj=conv.in_proj "
        "shortconv.out_proj=conv.out_proj ffn_gate=feed_forward.w1 ffn_up=feed_forward.w3 ffn_down=feed_forward.w2",
        "shortconv.l_cache=conv_L_cache",
        {},
        outside="token_embd_norm=model.embedding_norm",
        more=_lfm2,
        written_only=True,
    ),
    entry(
        "minimax_m2 MiniMaxM2 minimax-m2",
        f"{_QK_NORM} {experts('block_sparse_moe')}",
        "expert_count=num_local_experts expert_used_count=num_experts_per_tok "
        "expert_feed_forward_length=intermediate_size rope.dimension_count=rotary_dim",
        {**SILU, "scoring_func": "sigmoid"},
        parameters="exp_probs_b.bias=block_sparse_moe.e_score_correction_bias",
        more=lambda config: {"expert_gating_func": SIGMOID, "rope.dimension_count": config["rotary_dim"]},
        written_only=True,
    ),
)
