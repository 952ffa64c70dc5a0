"""Meta's Llama, Mistral AI's models, and others that are Llama in all but their settings."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.checks import heads_share_the_width
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import LOCAL_EXPERTS, SILU, entry, experts
from mlxtune_convert.hf.family_rules import LAYER, MOVED, PREFIXED, VISION, mixtral, turned
from mlxtune_convert.hf.rules import Layout, Rule


def _llama4(prefix: str = "", **others: Any) -> Layout:
    """Experts in two stacked parameters. prefix: of HF's names."""
    block = f"{LAYER}feed_forward."
    theirs, ours = f"{prefix}{block}experts.", f"{MOVED}{block}experts."
    rules: tuple[Rule, ...] = (
        Rule(f"{theirs}gate_up_proj", (f"{ours}gate_proj.weight", f"{ours}up_proj.weight"), "halves", axes=(0, 2, 1)),
        turned(f"{theirs}down_proj", f"{ours}down_proj.weight"),
    )
    router = ((f"{MOVED}{block}router", f"{prefix}{block}router:weight"),)
    if prefix:
        return Layout(rules, router, **others)
    rules += PREFIXED
    return Layout(rules, router, early=rules, **others)


def _ministral3_keys(config: Config) -> dict[str, Any]:
    beta = (config.get("rope_parameters") or {}).get("llama_4_scaling_beta")
    return {"attention.temperature_scale": None if beta is None else float(beta)}


def _not_mistral4(config: Config) -> str:
    if config.get("text_config", {}).get("model_type") == "mistral4":
        return "mlx-lm's Mistral 4 gives other logits than the one in transformers"
    return ""


def _rotated_layers(config: Config) -> str:
    rotated = config.get("no_rope_layers")  # 1 where a layer is rotated, in spite of the name
    if not isinstance(rotated, list):
        return ""
    all_but_every_4th = [int((number + 1) % 4 != 0) for number in range(len(rotated))]
    if rotated == all_but_every_4th:
        return ""
    return "mlx-lm rotates in all but every 4th layer, the configuration (no_rope_layers) in others"


FAMILIES = {
    "llama": ModelFamily(
        hf=Layout(),
        gguf=entry("llama", "Llama", "llama", permuted=True),
        no_biases=True,
        any_activation=True,
    ),
    "mistral": ModelFamily(
        hf=Layout(),
        gguf=entry("mistral", "Mistral", "llama", permuted=True),
        no_biases=True,
        any_activation=True,
    ),
    "mixtral": ModelFamily(
        hf=mixtral("mlp.gate"),
        gguf=entry("mixtral", "Mixtral", "llama", experts("block_sparse_moe"), LOCAL_EXPERTS, permuted=True),
        no_biases=True,
        any_activation=True,
        checks=(heads_share_the_width,),
    ),
    "ministral": ModelFamily(not_exported="mlx-lm has no such model"),
    "ministral3": ModelFamily(
        hf=Layout(),
        gguf=entry("ministral3", "Ministral3", "mistral3", more=_ministral3_keys, permuted=True, written_only=True),
        any_activation=True,
    ),
    "mistral3": ModelFamily(hf=VISION, differs=_not_mistral4),
    "llava": ModelFamily(hf=VISION),
    "llama4_text": ModelFamily(
        hf=_llama4(),
        text_of="llama4",
        computes={
            "tie_word_embeddings": (False,),
            "rms_norm_eps": (1e-5, 1e-6),  # of queries and keys: 1e-6, which 1e-5 cannot be told from
            "hidden_act": ("silu", "swish"),
        },
        checks=(_rotated_layers,),
    ),
    "llama4": ModelFamily(
        hf=_llama4(MOVED, dropped=("vision_model.", "multi_modal_projector."), tower="vision_model."),
    ),
    "smollm3": ModelFamily(
        hf=Layout(),
        gguf=entry("smollm3", "SmolLM3", "smollm3", fixed={**SILU, "no_rope_layer_interval": 4}, permuted=True),
        any_activation=True,
    ),
    "seed_oss": ModelFamily(
        hf=Layout(),
        gguf=entry("seed_oss", "SeedOss", "seed_oss", "post_attention_norm=post_attention_layernorm -ffn_norm"),
        any_activation=True,
    ),
    "internlm3": ModelFamily(hf=Layout()),
    "iquestcoder": ModelFamily(hf=Layout()),
}
