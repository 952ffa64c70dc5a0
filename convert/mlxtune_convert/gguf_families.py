"""One table per architecture that llama.cpp and mlx-lm share, read in both directions: tensor names and metadata keys.

Facts of llama.cpp (llama-arch.cpp and its converter): which keys an architecture reads, whether its rotary pairs are
interleaved (then q and k rows are permuted), whether its norms carry the +1 that Gemma adds when running.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf_file import File

# GGUF stem -> MLX stem, within a block.
_DENSE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PARTS = ("gate", "up", "down")


def _with(*changes: dict[str, str], drop: tuple[str, ...] = ()) -> dict[str, str]:
    merged = dict(_DENSE)
    for change in changes:
        merged |= change
    return {stem: name for stem, name in merged.items() if stem not in drop}


def _experts(place: str, router: str = "gate", switch: str = "switch_mlp") -> dict[str, str]:
    return {"ffn_gate_inp": f"{place}.{router}", **{f"ffn_{p}_exps": f"{place}.{switch}.{p}_proj" for p in _PARTS}}


_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FFN = ("ffn_gate", "ffn_up", "ffn_down")
_LN = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_EXPERT_KEYS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_SILU: dict[str, Any] = {"hidden_act": "silu"}
# GGUF key -> config.json key. A key is read or written where it is there; FLOAT_KEYS says which are float32.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
FLOAT_KEYS = ("epsilon", "freq_base", "scale", "softcapping", "clamp_kqv", "weights_scale")


@dataclass(frozen=True)
class Family:
    """model_type, architecture: of config.json; gguf: llama.cpp's name; names: GGUF stem -> MLX stem in a block;
    permuted: q and k rows are interleaved; norm_offset: added to norms on the way out; keys: beyond the common ones;
    fixed: what llama.cpp takes for granted, so written to config.json on import and required of it on export."""

    model_type: str
    architecture: str
    gguf: str
    names: dict[str, str] = field(default_factory=_with)
    permuted: bool = False
    norm_offset: float = 0.0
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    final_norm: str = "model.norm"

    @property
    def outer(self) -> dict[str, str]:
        return {"token_embd": "model.embed_tokens", "output_norm": self.final_norm, "output": "lm_head"}

    @property
    def all_keys(self) -> dict[str, str]:
        keys = {**_KEYS, **self.keys}
        if "attention.layer_norm_epsilon" in keys:
            keys.pop("attention.layer_norm_rms_epsilon")
        return keys

    def gguf_name(self, name: str) -> str:
        """GGUF name of an MLX tensor or module, such as model.layers.0.mlp.up_proj.weight. Raises UserError."""
        for stem, known in self.outer.items():
            if name == known or name.startswith(f"{known}."):
                return stem + name.removeprefix(known)
        parts = name.split(".", 3)
        if len(parts) == 4 and parts[:2] == ["model", "layers"]:
            for stem, known in self.names.items():
                if parts[3] == known or parts[3].startswith(f"{known}."):
                    suffix = parts[3].removeprefix(known) or (".weight" if stem == "attn_sinks" else "")
                    return f"blk.{parts[2]}.{stem}{suffix}"
        raise UserError(
            f"{name}: llama.cpp's {self.gguf} architecture has no such tensor",
            "`--to hf` exports the model all the same.",
        )

    def mlx_name(self, name: str) -> str:
        """MLX name of a GGUF tensor. Raises UserError for one that the architecture does not have."""
        stem, _, suffix = name.rpartition(".")
        found = self.outer.get(stem)
        if stem.startswith("blk."):
            _, layer, inner = (*stem.split(".", 2), "")[:3]
            if layer.isdecimal() and inner in self.names:
                found = f"model.layers.{layer}.{self.names[inner]}"
        if found is None or suffix not in ("weight", "bias"):
            raise UserError(
                f"the GGUF tensor {name[:80]} is not one of the {self.gguf} architecture's",
                "Convert from the original Hugging Face model instead.",
            )
        return found if found.endswith(".sinks") else f"{found}.{suffix}"

    def heads(self, name: str, config: dict[str, Any]) -> int:
        """In how many groups the rows of a GGUF tensor are interleaved; 0 for those that are not."""
        stem = name.split(".")[2] if self.permuted and name.startswith("blk.") else ""
        heads = int(config["num_attention_heads"])
        return {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}.get(stem, 0)

    def offset(self, name: str) -> float:
        return self.norm_offset if name.endswith("norm.weight") else 0.0


_GEMMA: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", permuted=True, fixed=_SILU),
    Family("mistral", "MistralForCausalLM", "llama", permuted=True, fixed=_SILU),
    Family(
        *("mixtral", "MixtralForCausalLM", "llama"),
        names=_with(_experts("block_sparse_moe"), drop=_FFN),
        permuted=True,
        keys=_LOCAL_EXPERT_KEYS,
        fixed=_SILU,
    ),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", fixed={**_SILU, "use_sliding_window": False}),
    Family(
        *("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2moe"),
        names=_with(
            _experts("mlp"),
            {f"ffn_{p}_shexp": f"mlp.shared_expert.{p}_proj" for p in _PARTS},
            {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
            drop=_FFN,
        ),
        keys={
            **_EXPERT_KEYS,
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        fixed={**_SILU, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", names=_with(_QK_NORM), fixed={**_SILU, "use_sliding_window": False}),
    Family(
        *("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe"),
        names=_with(_QK_NORM, _experts("mlp"), drop=_FFN),
        keys={**_EXPERT_KEYS, "expert_feed_forward_length": "moe_intermediate_size"},
        fixed={**_SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family("gemma", "GemmaForCausalLM", "gemma", norm_offset=1.0, fixed=_GEMMA),
    Family(
        *("gemma2", "Gemma2ForCausalLM", "gemma2"),
        names=_with(_GEMMA_NORMS),
        norm_offset=1.0,
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        fixed=_GEMMA,
    ),
    Family(
        *("gemma3_text", "Gemma3ForCausalLM", "gemma3"),
        names=_with(_GEMMA_NORMS, _QK_NORM),
        norm_offset=1.0,
        keys={"attention.sliding_window": "sliding_window"},
        fixed={**_GEMMA, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
    ),
    Family(
        *("phi3", "Phi3ForCausalLM", "phi3"),
        names=_with(
            {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            drop=("attn_q", "attn_k", "attn_v", "ffn_gate"),
        ),
        keys={
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        fixed=_SILU,
    ),
    Family(
        *("phi", "PhiForCausalLM", "phi2"),
        names=_with(
            {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
            drop=("ffn_gate", "ffn_norm"),
        ),
        keys=_LN,
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
        final_norm="model.final_layernorm",
    ),
    Family("smollm3", "SmolLM3ForCausalLM", "smollm3", permuted=True, fixed={**_SILU, "no_rope_layer_interval": 4}),
    Family(
        *("olmo2", "Olmo2ForCausalLM", "olmo2"),
        names=_with(_OLMO_NORMS, _QK_NORM, drop=("attn_norm", "ffn_norm")),
        fixed=_SILU,
    ),
    Family(
        *("olmo3", "Olmo3ForCausalLM", "olmo2"),
        names=_with(_OLMO_NORMS, _QK_NORM, drop=("attn_norm", "ffn_norm")),
        keys={"attention.sliding_window": "sliding_window"},
        fixed=_SILU,
    ),
    Family(
        *("olmoe", "OlmoeForCausalLM", "olmoe"),
        names=_with(_QK_NORM, _experts("mlp"), drop=_FFN),
        keys=_EXPERT_KEYS,
        fixed={**_SILU, "norm_topk_prob": False, "clip_qkv": None},
    ),
    Family(
        *("granite", "GraniteForCausalLM", "granite"),
        permuted=True,
        keys=(
            _GRANITE := {
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            }
        ),
        fixed=_SILU,
    ),
    Family(
        *("granitemoe", "GraniteMoeForCausalLM", "granitemoe"),
        names=_with(_experts("block_sparse_moe", "router.layer"), drop=_FFN),
        permuted=True,
        keys={**_GRANITE, **_LOCAL_EXPERT_KEYS},
        fixed=_SILU,
    ),
    Family(
        *("gpt_oss", "GptOssForCausalLM", "gpt-oss"),
        names=_with(
            {"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
            _experts("mlp", "router", "experts"),
            drop=(*_FFN, "ffn_norm"),
        ),
        keys={
            **_LOCAL_EXPERT_KEYS,
            "attention.sliding_window": "sliding_window",
            "expert_feed_forward_length": "intermediate_size",
        },
        fixed=_SILU,
    ),
    Family(
        *("starcoder2", "Starcoder2ForCausalLM", "starcoder2"),
        names=_with({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, drop=("ffn_gate",)),
        keys={"attention.layer_norm_epsilon": "norm_epsilon"},
        fixed={"hidden_act": "gelu_pytorch_tanh"},
    ),
    Family(
        *("stablelm", "StableLmForCausalLM", "stablelm"),
        keys={**_LN, "use_parallel_residual": "use_parallel_residual"},
        fixed={**_SILU, "qk_layernorm": False, "use_parallel_residual": False},
    ),
    Family(
        *("nemotron", "NemotronForCausalLM", "nemotron"),
        names=_with(drop=("ffn_gate",)),
        norm_offset=1.0,
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        fixed={"hidden_act": "relu2"},
    ),
    Family("ernie4_5", "Ernie4_5ForCausalLM", "ernie4_5", fixed=_SILU),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        "seed_oss",
        names=_with({"post_attention_norm": "post_attention_layernorm"}, drop=("ffn_norm",)),
        fixed=_SILU,
    ),
    Family(
        *("glm4", "Glm4ForCausalLM", "glm4"),
        names=_with(
            {
                "ffn_up": "mlp.gate_up_proj",
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
            },
            drop=("ffn_gate",),
        ),
        fixed=_SILU,
    ),
    Family(
        *("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "hunyuan-dense"),
        names=_with({"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}),
        fixed=_SILU,
    ),
    Family(
        *("cohere", "CohereForCausalLM", "command-r"),
        names=_with(drop=("ffn_norm",)),
        keys={**_LN, "logit_scale": "logit_scale"},
        fixed={**_SILU, "use_qk_norm": False},
    ),
    Family(
        *("cohere2", "Cohere2ForCausalLM", "cohere2"),
        names=_with(drop=("ffn_norm",)),
        keys={**_LN, "logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"},
        fixed={**_SILU, "sliding_window_pattern": 4},
    ),
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
    matching = [family for family in FAMILIES if family.gguf == name]
    if not matching:
        covered = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES))
        raise UserError(
            f"GGUF files of the {str(name)[:40]} architecture cannot be converted yet (covered: {covered})",
            "Convert from the original Hugging Face model instead.",
        )
    # One architecture for several: experts make a Mixtral of a llama, a sliding window an Olmo 3 of an Olmo 2.
    for family in reversed(matching):
        told = [key for key in family.keys if key.startswith("expert_count") or key == "attention.sliding_window"]
        if len(matching) == 1 or (all(file.get(f"{name}.{key}") for key in told) and (told or family is matching[0])):
            return family
    return matching[0]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: [heads * d, ...] with the rotary halves apart -> pairs adjacent.

    Rows move whole, so packed blocks and biases move the same way.
    """
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def uninterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
