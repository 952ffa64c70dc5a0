"""One table per architecture that llama.cpp and mlx-lm share, read in both directions: tensor names and metadata keys.

Facts of llama.cpp (llama-arch.cpp and its converter): which keys an architecture reads, whether its rotary pairs are
interleaved (then q and k rows are permuted), whether its norms carry the +1 that Gemma adds when running.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf_file import HINT, File


def _spec(text: str, base: dict[str, str] | None = None) -> dict[str, str]:
    """A table from "gguf=mlx gguf=mlx -gguf": entries added to `base`, and entries taken out of it."""
    table = dict(base or {})
    for entry in text.split():
        name, _, known = entry.partition("=")
        if known:
            table[name] = known
        else:
            del table[name[1:]]
    return table


# GGUF stem -> MLX stem, within a block.
_DENSE = _spec(
    "attn_norm=input_layernorm attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
    "attn_output=self_attn.o_proj ffn_norm=post_attention_layernorm "
    "ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj"
)
_QK_NORM = "attn_q_norm=self_attn.q_norm attn_k_norm=self_attn.k_norm"
_GEMMA_NORMS = (
    "post_attention_norm=post_attention_layernorm ffn_norm=pre_feedforward_layernorm "
    "post_ffw_norm=post_feedforward_layernorm"
)
_OLMO = f"post_attention_norm=post_attention_layernorm post_ffw_norm=post_feedforward_layernorm -ffn_norm {_QK_NORM}"


def _names(*parts: str) -> dict[str, str]:
    return _spec(" ".join(parts), _DENSE)


def _experts(place: str, router: str = "gate", switch: str = "switch_mlp") -> str:
    parts = " ".join(f"ffn_{p}_exps={place}.{switch}.{p}_proj -ffn_{p}" for p in ("gate", "up", "down"))
    return f"ffn_gate_inp={place}.{router} {parts}"


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
FLOAT_KEYS = ("epsilon", "freq_base", "scale", "softcapping", "factor", "beta_fast", "beta_slow")


@dataclass(frozen=True)
class Family:
    """model_type, architecture: of config.json; gguf: llama.cpp's name; names: GGUF stem -> MLX stem in a block;
    permuted: q and k rows are interleaved; norm_offset: added to norms on the way out; keys: beyond the common ones;
    fixed: what llama.cpp takes for granted, so written to config.json on import and required of it on export."""

    model_type: str
    architecture: str
    gguf: str
    names: dict[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    final_norm: str = "model.norm"

    @property
    def tabled_gelu(self) -> bool:
        """llama.cpp looks this activation up in a float16 table, which costs accuracy."""
        return any("gelu" in str(value) for value in self.fixed.values())

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
        """GGUF name of an MLX tensor, such as model.layers.0.mlp.up_proj.weight. Raises UserError."""
        path, _, suffix = (f"{name}.weight" if name.endswith(".sinks") else name).rpartition(".")
        block = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", path)
        stems = {known: stem for stem, known in (self.names if block else self.outer).items()}
        stem = stems.get(block[2] if block else path)
        if stem is None:
            raise UserError(
                f"{name}: llama.cpp's {self.gguf} architecture has no such tensor",
                "`--to hf` exports the model all the same.",
            )
        return f"blk.{block[1]}.{stem}.{suffix}" if block else f"{stem}.{suffix}"

    def mlx_name(self, name: str) -> str:
        """MLX name of a GGUF tensor. Raises UserError for one that the architecture does not have."""
        path, _, suffix = name.rpartition(".")
        block = re.fullmatch(r"blk\.([0-9]+)\.(.+)", path)
        found = self.names.get(block[2]) if block else self.outer.get(path)
        if found is None or suffix not in ("weight", "bias"):
            raise UserError(f"the GGUF tensor {name[:80]} is not one of the {self.gguf} architecture's", HINT)
        found = f"model.layers.{block[1]}.{found}" if block else found
        return found if found.endswith(".sinks") else f"{found}.{suffix}"

    def heads(self, name: str, config: dict[str, Any]) -> int:
        """In how many groups the rows of a GGUF tensor are interleaved; 0 for those that are not."""
        stem = name.split(".")[2] if self.permuted and name.startswith("blk.") else ""
        heads = int(config["num_attention_heads"])
        return {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}.get(stem, 0)

    def offset(self, name: str) -> float:
        return self.norm_offset if name.endswith("norm.weight") else 0.0


_WINDOW = "attention.sliding_window=sliding_window"
_LN = "attention.layer_norm_epsilon=layer_norm_eps"
_USED = "expert_used_count=num_experts_per_tok"
_EXPERTS, _LOCAL_EXPERTS = f"expert_count=num_experts {_USED}", f"expert_count=num_local_experts {_USED}"
_GRANITE = (
    "attention.scale=attention_multiplier embedding_scale=embedding_multiplier residual_scale=residual_multiplier "
    "logit_scale=logits_scaling"
)
_SILU: dict[str, Any] = {"hidden_act": "silu"}
_GELU: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}
_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}  # its older files say another hidden_act
_FULL = {**_SILU, "use_sliding_window": False}
_SPARSE = {**_SILU, "decoder_sparse_step": 1, "mlp_only_layers": []}
_SHARED = " ".join(f"ffn_{p}_shexp=mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))


def _family(
    types: str, names: str = "", keys: str = "", fixed: dict[str, Any] = _SILU, *, permuted: bool = False, **more: Any
) -> Family:
    """types: model_type, transformers' class without its ending, llama.cpp's architecture."""
    model_type, architecture, gguf = types.split()
    table: dict[str, Any] = {"names": _names(names), "keys": _spec(keys), "fixed": fixed, "permuted": permuted}
    return Family(model_type, f"{architecture}ForCausalLM", gguf, **table, **more)


FAMILIES = (
    _family("llama Llama llama", permuted=True),
    _family("mistral Mistral llama", permuted=True),
    _family("mixtral Mixtral llama", _experts("block_sparse_moe"), _LOCAL_EXPERTS, permuted=True),
    _family("qwen2 Qwen2 qwen2", fixed=_FULL),
    _family(
        "qwen2_moe Qwen2Moe qwen2moe",
        f"{_experts('mlp')} {_SHARED} ffn_gate_inp_shexp=mlp.shared_expert_gate",
        f"{_EXPERTS} expert_feed_forward_length=moe_intermediate_size "
        "expert_shared_feed_forward_length=shared_expert_intermediate_size",
        {**_SPARSE, "norm_topk_prob": False},
    ),
    _family("qwen3 Qwen3 qwen3", _QK_NORM, fixed=_FULL),
    _family(
        "qwen3_moe Qwen3Moe qwen3moe",
        f"{_QK_NORM} {_experts('mlp')}",
        f"{_EXPERTS} expert_feed_forward_length=moe_intermediate_size",
        {**_SPARSE, "norm_topk_prob": True},
    ),
    _family("gemma Gemma gemma", fixed=_GEMMA, norm_offset=1.0),
    _family(
        "gemma2 Gemma2 gemma2",
        _GEMMA_NORMS,
        "attn_logit_softcapping=attn_logit_softcapping final_logit_softcapping=final_logit_softcapping " + _WINDOW,
        _GEMMA,
        norm_offset=1.0,
    ),
    _family(
        "gemma3_text Gemma3 gemma3",
        f"{_GEMMA_NORMS} {_QK_NORM}",
        _WINDOW,
        {**_GEMMA, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        norm_offset=1.0,
    ),
    _family(
        "phi3 Phi3 phi3",
        "attn_qkv=self_attn.qkv_proj ffn_up=mlp.gate_up_proj -attn_q -attn_k -attn_v -ffn_gate",
        f"{_WINDOW} rope.scaling.original_context_length=original_max_position_embeddings",
    ),
    _family(
        "phi Phi phi2",
        "attn_output=self_attn.dense ffn_up=mlp.fc1 ffn_down=mlp.fc2 -ffn_gate -ffn_norm",
        _LN,
        {"hidden_act": "gelu_new", "qk_layernorm": False},
        final_norm="model.final_layernorm",
    ),
    _family("smollm3 SmolLM3 smollm3", fixed={**_SILU, "no_rope_layer_interval": 4}, permuted=True),
    _family("olmo2 Olmo2 olmo2", f"{_OLMO} -attn_norm"),
    _family("olmo3 Olmo3 olmo2", f"{_OLMO} -attn_norm", _WINDOW),
    _family(
        "olmoe Olmoe olmoe",
        f"{_QK_NORM} {_experts('mlp')}",
        _EXPERTS,
        {**_SILU, "norm_topk_prob": False, "clip_qkv": None},
    ),
    _family("granite Granite granite", keys=_GRANITE, permuted=True),
    _family(
        "granitemoe GraniteMoe granitemoe",
        _experts("block_sparse_moe", "router.layer"),
        f"{_GRANITE} {_LOCAL_EXPERTS}",
        permuted=True,
    ),
    _family(
        "gpt_oss GptOss gpt-oss",
        "post_attention_norm=post_attention_layernorm attn_sinks=self_attn.sinks -ffn_norm "
        + _experts("mlp", "router", "experts"),
        f"{_LOCAL_EXPERTS} {_WINDOW} expert_feed_forward_length=intermediate_size",
    ),
    _family(
        "starcoder2 Starcoder2 starcoder2",
        "ffn_up=mlp.c_fc ffn_down=mlp.c_proj -ffn_gate",
        "attention.layer_norm_epsilon=norm_epsilon",
        _GELU,
    ),
    _family(
        "stablelm StableLm stablelm",
        keys=f"{_LN} use_parallel_residual=use_parallel_residual",
        fixed={**_SILU, "qk_layernorm": False, "use_parallel_residual": False},
    ),
    _family(
        "nemotron Nemotron nemotron",
        "-ffn_gate",
        "attention.layer_norm_epsilon=norm_eps",
        {"hidden_act": "relu2"},
        norm_offset=1.0,
    ),
    _family("ernie4_5 Ernie4_5 ernie4_5"),
    _family("seed_oss SeedOss seed_oss", "post_attention_norm=post_attention_layernorm -ffn_norm"),
    _family(
        "glm4 Glm4 glm4",
        "ffn_up=mlp.gate_up_proj -ffn_gate "
        "post_attention_norm=post_self_attn_layernorm post_ffw_norm=post_mlp_layernorm",
    ),
    _family(
        "hunyuan_v1_dense HunYuanDenseV1 hunyuan-dense",
        "attn_q_norm=self_attn.query_layernorm attn_k_norm=self_attn.key_layernorm",
    ),
    _family("cohere Cohere command-r", "-ffn_norm", f"{_LN} logit_scale=logit_scale", {**_SILU, "use_qk_norm": False}),
    _family(
        "cohere2 Cohere2 cohere2",
        "-ffn_norm",
        f"{_LN} logit_scale=logit_scale {_WINDOW}",
        {**_SILU, "sliding_window_pattern": 4},
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
            HINT,
        )
    # One architecture for several: experts make a Mixtral of a llama, a sliding window an Olmo 3 of an Olmo 2.
    for family in matching:
        told = [key for key in family.keys if key in ("expert_count", "attention.sliding_window")]
        if told and all(file.get(f"{name}.{key}") for key in told):
            return family
    return matching[0]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: [heads * d, ...] with the rotary halves apart -> pairs adjacent.

    Rows move whole, so packed blocks and biases move the same way. heads: 0 for tensors that stay as they are.
    """
    if not heads:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def uninterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    if not heads:
        return rows
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
