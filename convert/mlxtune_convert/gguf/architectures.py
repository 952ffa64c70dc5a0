"""One table per architecture that llama.cpp and mlx-lm share: tensor names and metadata keys."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf.container import HINT, File
from mlxtune_convert.gguf.family import SILU, Family, entry, experts
from mlxtune_convert.gguf.newer import NEWER

_QK_NORM = "attn_q_norm=self_attn.q_norm attn_k_norm=self_attn.k_norm"
_GEMMA_NORMS = (
    "post_attention_norm=post_attention_layernorm ffn_norm=pre_feedforward_layernorm "
    "post_ffw_norm=post_feedforward_layernorm"
)
_OLMO = f"post_attention_norm=post_attention_layernorm post_ffw_norm=post_feedforward_layernorm -ffn_norm {_QK_NORM}"
_WINDOW = "attention.sliding_window=sliding_window"
_LN = "attention.layer_norm_epsilon=layer_norm_eps"
_USED = "expert_used_count=num_experts_per_tok"
_EXPERTS, _LOCAL_EXPERTS = f"expert_count=num_experts {_USED}", f"expert_count=num_local_experts {_USED}"
_GRANITE = (
    "attention.scale=attention_multiplier embedding_scale=embedding_multiplier residual_scale=residual_multiplier "
    "logit_scale=logits_scaling"
)
_GELU: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}
_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}  # its older files say another hidden_act
_FULL = {**SILU, "use_sliding_window": False}
_SPARSE = {**SILU, "decoder_sparse_step": 1, "mlp_only_layers": []}
_SHARED = " ".join(f"ffn_{p}_shexp=mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))


FAMILIES = (
    entry("llama Llama llama", permuted=True),
    entry("mistral Mistral llama", permuted=True),
    entry("mixtral Mixtral llama", experts("block_sparse_moe"), _LOCAL_EXPERTS, permuted=True),
    entry("qwen2 Qwen2 qwen2", fixed=_FULL),
    entry(
        "qwen2_moe Qwen2Moe qwen2moe",
        f"{experts('mlp')} {_SHARED} ffn_gate_inp_shexp=mlp.shared_expert_gate",
        f"{_EXPERTS} expert_feed_forward_length=moe_intermediate_size "
        "expert_shared_feed_forward_length=shared_expert_intermediate_size",
        {**_SPARSE, "norm_topk_prob": False},
    ),
    entry("qwen3 Qwen3 qwen3", _QK_NORM, fixed=_FULL),
    entry(
        "qwen3_moe Qwen3Moe qwen3moe",
        f"{_QK_NORM} {experts('mlp')}",
        f"{_EXPERTS} expert_feed_forward_length=moe_intermediate_size",
        {**_SPARSE, "norm_topk_prob": True},
    ),
    entry("gemma Gemma gemma", fixed=_GEMMA, norm_offset=1.0),
    entry(
        "gemma2 Gemma2 gemma2",
        _GEMMA_NORMS,
        "attn_logit_softcapping=attn_logit_softcapping final_logit_softcapping=final_logit_softcapping " + _WINDOW,
        _GEMMA,
        norm_offset=1.0,
    ),
    entry(
        "gemma3_text Gemma3 gemma3",
        f"{_GEMMA_NORMS} {_QK_NORM}",
        _WINDOW,
        {**_GEMMA, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        norm_offset=1.0,
    ),
    entry(
        "phi3 Phi3 phi3",
        "attn_qkv=self_attn.qkv_proj ffn_up=mlp.gate_up_proj -attn_q -attn_k -attn_v -ffn_gate",
        f"{_WINDOW} rope.scaling.original_context_length=original_max_position_embeddings",
    ),
    entry(
        "phi Phi phi2",
        "attn_output=self_attn.dense ffn_up=mlp.fc1 ffn_down=mlp.fc2 -ffn_gate -ffn_norm",
        _LN,
        {"hidden_act": "gelu_new", "qk_layernorm": False},
        final_norm="model.final_layernorm",
    ),
    entry("smollm3 SmolLM3 smollm3", fixed={**SILU, "no_rope_layer_interval": 4}, permuted=True),
    entry("olmo2 Olmo2 olmo2", f"{_OLMO} -attn_norm"),
    entry("olmo3 Olmo3 olmo2", f"{_OLMO} -attn_norm", _WINDOW),
    entry(
        "olmoe Olmoe olmoe",
        f"{_QK_NORM} {experts('mlp')}",
        _EXPERTS,
        {**SILU, "norm_topk_prob": False, "clip_qkv": None},
    ),
    entry("granite Granite granite", keys=_GRANITE, permuted=True),
    entry(
        "granitemoe GraniteMoe granitemoe",
        experts("block_sparse_moe", "router.layer"),
        f"{_GRANITE} {_LOCAL_EXPERTS}",
        permuted=True,
    ),
    entry(
        "gpt_oss GptOss gpt-oss",
        "post_attention_norm=post_attention_layernorm attn_sinks=self_attn.sinks -ffn_norm "
        + experts("mlp", "router", "experts"),
        f"{_LOCAL_EXPERTS} {_WINDOW} expert_feed_forward_length=intermediate_size",
    ),
    entry(
        "starcoder2 Starcoder2 starcoder2",
        "ffn_up=mlp.c_fc ffn_down=mlp.c_proj -ffn_gate",
        "attention.layer_norm_epsilon=norm_epsilon",
        _GELU,
    ),
    entry(
        "stablelm StableLm stablelm",
        keys=f"{_LN} use_parallel_residual=use_parallel_residual",
        fixed={**SILU, "qk_layernorm": False, "use_parallel_residual": False},
    ),
    entry(
        "nemotron Nemotron nemotron",
        "-ffn_gate",
        "attention.layer_norm_epsilon=norm_eps",
        {"hidden_act": "relu2"},
        norm_offset=1.0,
    ),
    entry("ernie4_5 Ernie4_5 ernie4_5"),
    entry("seed_oss SeedOss seed_oss", "post_attention_norm=post_attention_layernorm -ffn_norm"),
    entry(
        "glm4 Glm4 glm4",
        "ffn_up=mlp.gate_up_proj -ffn_gate "
        "post_attention_norm=post_self_attn_layernorm post_ffw_norm=post_mlp_layernorm",
    ),
    entry(
        "hunyuan_v1_dense HunYuanDenseV1 hunyuan-dense",
        "attn_q_norm=self_attn.query_layernorm attn_k_norm=self_attn.key_layernorm",
    ),
    entry("cohere Cohere command-r", "-ffn_norm", f"{_LN} logit_scale=logit_scale", {**SILU, "use_qk_norm": False}),
    entry(
        "cohere2 Cohere2 cohere2",
        "-ffn_norm",
        f"{_LN} logit_scale=logit_scale {_WINDOW}",
        {**SILU, "sliding_window_pattern": 4},
    ),
    *NEWER,
)


def by_model_type(model_type: str) -> Family:
    """The family of a config.json. Raises UserError naming what is covered and what works instead."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    covered = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"models of type {model_type} cannot be written as GGUF yet (covered: {covered})",
        "`--to hf`, or `mlxtune fuse` for a merged MLX model.",
    )


def of_file(file: File) -> Family:
    """The family of a GGUF model. Raises UserError naming what is covered."""
    name = file.get("general.architecture")
    matching = [family for family in FAMILIES if family.gguf == name and not family.written_only]
    if not matching:
        covered = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES if not family.written_only))
        raise UserError(
            f"GGUF files of the {str(name)[:40]} architecture cannot be converted yet (covered: {covered})",
            HINT,
        )
    # One architecture for several: experts make a Mixtral of a llama, a sliding window an Olmo 3 of an Olmo 2.
    for family in matching:
        told = [key for key in family.keys if key in ("expert_count", "attention.sliding_window")]
        if told and all(file.get(f"{name}.{key}") for key in told):
            return family
    return matching[0]
