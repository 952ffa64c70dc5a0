"""Settings of a config.json that mlx-lm's model of a family does not heed, with the values that it computes.

Found by changing every setting of every family and comparing logits with transformers (tests/sweep.py). A setting that
is missing has a default in transformers that mlx-lm computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (families, setting, values that mlx-lm computes)
_COMPUTED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    (
        "gemma gemma2 gemma3_text gemma4_text qwen3 qwen3_moe",
        "attention_bias",
        (False, None),
    ),
    ("gpt_oss phimoe", "attention_bias", (True,)),
    ("deepseek_v2", "mlp_bias", (False,)),
    ("starcoder2", "use_bias", (True,)),
    ("qwen2_moe", "qkv_bias", (True,)),
    ("phimoe", "lm_head_bias", (True,)),
    ("phi", "qk_layernorm", (False,)),
    (
        "deepseek_v2 deepseek_v3 glm4 glm4_moe gpt_oss helium phi phimoe qwen2_moe stablelm",
        "tie_word_embeddings",
        (False,),
    ),
    ("gpt_neox llama4_text", "tie_word_embeddings", (False,)),
    ("gpt_neox", "attention_bias", (True,)),
    ("cohere cohere2 gemma gemma2 gpt2 lfm2 lfm2_moe", "tie_word_embeddings", (True,)),
    ("gemma3_text", "final_logit_softcapping", (None,)),
    ("gemma3_text", "attn_logit_softcapping", (None,)),
    ("gemma3_text gemma4_text", "use_bidirectional_attention", (False, None, "vision")),
    ("gpt_bigcode", "multi_query", (True,)),
    ("gpt_bigcode", "scale_attn_weights", (True,)),
    ("qwen2_moe", "norm_topk_prob", (False,)),
    ("qwen2_moe", "decoder_sparse_step", (1,)),
    ("qwen2_moe", "mlp_only_layers", ([], None)),
    ("olmoe", "clip_qkv", (None,)),
    ("phimoe", "num_experts_per_tok", (2,)),
    ("gpt_oss", "swiglu_alpha", (1.702,)),
    ("gpt2", "scale_attn_weights", (True,)),
    ("gpt2", "scale_attn_by_inverse_layer_idx", (False,)),
    ("llama4_text", "rms_norm_eps", (1e-5, 1e-6)),  # of queries and keys: 1e-6, which 1e-5 cannot be told from
    ("mamba mamba2", "layer_norm_epsilon", (1e-5,)),
    ("falcon_h1 gpt_oss jamba llama4_text mamba mamba2 qwen3_5_text qwen3_next", "hidden_act", ("silu", "swish")),
    ("gemma4_text", "hidden_activation", ("gelu_pytorch_tanh",)),
)
# What a feed-forward layer is made to compute in these families, whatever activation mlx-lm has built in.
_ACTIVATED = (
    "cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe "
    "gpt2 gpt_bigcode gpt_neox granite granitemoe helium hunyuan_v1_dense llama ministral3 mistral mixtral nemotron "
    "olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2"
)
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")  # the first that is there
_MIXED = {  # families that mlx-lm runs only with layers of these kinds
    **dict.fromkeys(("cohere2", "gemma3_text", "gpt_oss", "olmo3"), ("sliding_attention", "full_attention")),
    "exaone4": ("full_attention",),
    **dict.fromkeys(("lfm2", "lfm2_moe"), ("conv", "full_attention")),
}
_TOO_MANY = "more experts are chosen than the kept groups hold: mlx-lm takes others than transformers"
_EVERY_NTH = ("cohere2", "gemma3_text")  # of whose layers every n-th sees all, in mlx-lm


def why(config: dict[str, Any]) -> str:
    """Which setting mlx-lm does not heed and what it computes instead, or "". config: a config.json."""
    return unable(config) or _first(config, _of_values, _of_heads, _of_order, _of_experts)


def unable(config: dict[str, Any]) -> str:
    """Why mlx-lm's model of a configuration cannot be run at all, though it is made, or "". config: as in `why`."""
    return _first(config, _of_caps, _of_kinds)


def _first(config: dict[str, Any], *rules: Callable[[dict[str, Any]], str]) -> str:
    """What the first rule that objects says, to a configuration or to its text part."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return next((reason for part in parts for rule in rules if (reason := rule(part))), "")


def _of_caps(config: dict[str, Any]) -> str:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get("model_type") == "gemma2" and key in config and config[key] is None:
            return f"it cannot do without {key}, the configuration says null"
    return ""


def _of_kinds(config: dict[str, Any]) -> str:
    layers = config.get("layer_types")
    for needed in _MIXED.get(str(config.get("model_type")), ()):
        if isinstance(layers, list) and needed not in layers:
            return f"it cannot do without a layer of type {needed}"
    return ""


def _of_values(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    for families, key, computed in _COMPUTED:
        if kind in families.split() and key in config and config[key] not in computed:
            return f"mlx-lm computes {key} = {computed[0]} only, the configuration says {config[key]}"
    named = next((config[key] for key in ACTIVATION_KEYS if config.get(key)), ACTIVATIONS[0])
    if kind in _ACTIVATED.split() and named not in ACTIVATIONS:
        return f"the activation {named} is computed neither by mlx-lm nor here"
    return ""


def _of_order(config: dict[str, Any]) -> str:
    turned = config.get("no_rope_layers")
    if config.get("model_type") == "llama4_text" and isinstance(turned, list) and turned != _all_but_every_4th(turned):
        return "mlx-lm rotates in all but every 4th layer, the configuration (no_rope_layers) in others"
    layers = config.get("layer_types")
    if config.get("model_type") not in _EVERY_NTH or not isinstance(layers, list) or "full_attention" not in layers:
        return ""
    nth = layers.index("full_attention") + 1
    regular = ["full_attention" if number % nth == 0 else "sliding_attention" for number in range(1, len(layers) + 1)]
    if layers == regular:
        return ""
    return f"mlx-lm lets every {nth}th layer see all of a row, the configuration has another order"


def _all_but_every_4th(layers: list[Any]) -> list[int]:
    return [int((number + 1) % 4 != 0) for number in range(len(layers))]


def _of_heads(config: dict[str, Any]) -> str:
    width, heads, hidden = (config.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if config.get("model_type") not in ("cohere2", "mixtral"):
        return ""
    if isinstance(width, int) and isinstance(heads, int) and width * heads != hidden:
        return f"mlx-lm's heads are hidden_size / num_attention_heads wide, the configuration says {width}"
    return ""


def _of_experts(config: dict[str, Any]) -> str:
    """Routers that choose among groups of experts."""
    if config.get("model_type") not in ("deepseek_v3", "glm4_moe"):
        return ""
    chosen, experts = config.get("num_experts_per_tok"), config.get("n_routed_experts")
    groups, kept = config.get("n_group"), config.get("topk_group")
    if chosen == 1 and config.get("norm_topk_prob", True):
        return "mlx-lm does not normalise the weight of a single expert, transformers does"
    if not (isinstance(chosen, int) and isinstance(experts, int) and isinstance(kept, int) and isinstance(groups, int)):
        return ""
    return _TOO_MANY if chosen > experts // max(groups, 1) * kept else ""
