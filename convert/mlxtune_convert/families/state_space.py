"""Models whose layers carry a state along the row (Mamba and its like), alone or beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtune_convert.families.changes import copied
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import entry
from mlxtune_convert.hf.family_rules import CONV, LAYER, NUMBERED, PARTS, conv, moe, renamed
from mlxtune_convert.hf.rules import Layout, Rule

_MAMBA = replace(CONV, not_in_peft=(".out_proj",))


def _lfm2_moe() -> Layout:
    block = "feed_forward"
    dense = tuple(
        (f"{LAYER}{block}.{ours}", f"{LAYER}{block}.{theirs}:weight")
        for ours, theirs in zip(PARTS, NUMBERED, strict=True)
    )
    rules = (*renamed(block, NUMBERED, PARTS), conv("conv.conv"))
    return moe(block, NUMBERED, (f"{block}.gate", f"{block}.gate"), f"{block}.experts", rules, dense)


def _nemotron_h() -> Layout:
    mixer = "backbone.layers.{n}.mixer."
    rules = (
        Rule(f"{mixer}experts.{{e}}.up_proj.weight", (f"{mixer}switch_mlp.fc1.weight",), "stack"),
        Rule(f"{mixer}experts.{{e}}.down_proj.weight", (f"{mixer}switch_mlp.fc2.weight",), "stack"),
        conv("conv1d"),
    )
    modules = ((f"{mixer}gate", "model.layers.{n}.mixer.gate:weight"), ("backbone.{s}", "model.{s}"))
    return Layout(rules, modules, ("mtp.",), not_in_peft=(".fc1", ".fc2", ".out_proj"))


def _mamba2_config(config: Config) -> None:
    if "expand" in config and "hidden_size" in config:
        config.setdefault("intermediate_size", int(config["expand"] * config["hidden_size"]))


def _one_group(config: Config) -> str:
    if config.get("n_groups", 1) > 1:
        return "transformers repeats the groups of B and C in another order"
    return ""


def _no_experts(config: Config) -> str:
    if config.get("num_experts", 1) > 1:
        return "mlx-lm normalises the router over the chosen experts, transformers over all"
    return ""


def _falcon_h1(config: Config) -> str:
    return "mlx-lm leaves key_multiplier out, and attention_in_multiplier where it makes the values"


def _lfm2_keys(config: Config) -> dict[str, Any]:
    kinds = config["layer_types"]
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):  # as the model itself makes it: two thirds, rounded up to a multiple
        width = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        multiple = int(config["block_multiple_of"])
        width = multiple * -(-width // multiple)
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": [config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in kinds],
        "attention.layer_norm_rms_epsilon": float(config.get("norm_eps", 1e-5)),
    }


_LFM2_NAMES = (
    "attn_norm=operator_norm ffn_norm=ffn_norm attn_output=self_attn.out_proj attn_q_norm=self_attn.q_layernorm "
    "attn_k_norm=self_attn.k_layernorm shortconv.conv=conv.conv shortconv.in_proj=conv.in_proj "
    "shortconv.out_proj=conv.out_proj ffn_gate=feed_forward.w1 ffn_up=feed_forward.w3 ffn_down=feed_forward.w2"
)
_LFM2_LAYERS = ("conv", "full_attention")
_SILU_ALONE = ("silu", "swish")

FAMILIES = {
    "mamba": ModelFamily(
        hf=_MAMBA,
        computes={"layer_norm_epsilon": (1e-5,), "hidden_act": _SILU_ALONE},
    ),
    "mamba2": ModelFamily(
        hf=_MAMBA,
        config_last=_mamba2_config,
        differs=_one_group,
        computes={"layer_norm_epsilon": (1e-5,), "hidden_act": _SILU_ALONE},
    ),
    "falcon_mamba": ModelFamily(hf=replace(CONV, not_in_peft=(".out_proj", ".dt_proj"))),
    "falcon_h1": ModelFamily(differs=_falcon_h1, computes={"hidden_act": _SILU_ALONE}),
    "jamba": ModelFamily(hf=CONV, differs=_no_experts, computes={"hidden_act": _SILU_ALONE}),
    "lfm2": ModelFamily(
        hf=Layout((conv("conv.conv"),)),
        gguf=entry(
            "lfm2",
            "Lfm2",
            "lfm2",
            _LFM2_NAMES,
            "shortconv.l_cache=conv_L_cache",
            {},
            outside="token_embd_norm=model.embedding_norm",
            more=_lfm2_keys,
            written_only=True,
        ),
        config_last=copied(block_dim="hidden_size"),  # an older name of one number
        computes={"tie_word_embeddings": (True,)},
        needs_layers=_LFM2_LAYERS,
    ),
    "lfm2_moe": ModelFamily(
        hf=_lfm2_moe(),
        computes={"tie_word_embeddings": (True,)},
        needs_layers=_LFM2_LAYERS,
    ),
    "nemotron_h": ModelFamily(hf=_nemotron_h()),
    "bailing_hybrid": ModelFamily(
        not_exported="mlx-lm's is Ling with lightning attention, transformers' another model",
    ),
}
