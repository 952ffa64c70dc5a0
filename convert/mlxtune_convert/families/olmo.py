"""Ai2's OLMo models."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.checks import BOTH_KINDS
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import EXPERTS, QK_NORM, SILU, WINDOW, entry, experts
from mlxtune_convert.gguf.windows import windowed_layers
from mlxtune_convert.hf.family_rules import LAYER, conv, moe
from mlxtune_convert.hf.rules import Layout, Rule

_NAMES = (
    "post_attention_norm=post_attention_layernorm post_ffw_norm=post_feedforward_layernorm -ffn_norm "
    f"{QK_NORM} -attn_norm"
)


def _olmo3_defaults(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window_pattern": windowed_layers(config, every=4)}


def _olmo_hybrid() -> Layout:
    # transformers reads both spellings of the norms; mlx-lm reads its names in memory.
    early = (
        Rule(f"{LAYER}attention_layer_norm.weight", (f"{LAYER}input_layernorm.weight",)),
        Rule(f"{LAYER}feedforward_layer_norm.weight", (f"{LAYER}post_attention_layernorm.weight",)),
    )
    return Layout(tuple(conv(f"linear_attn.{letter}_conv1d") for letter in "qkv"), early=early)


FAMILIES = {
    "olmo": ModelFamily(not_exported="mlx-lm runs it by the package ai2-olmo, and reads the files of that alone"),
    "olmo2": ModelFamily(hf=Layout(), gguf=entry("olmo2", "Olmo2", "olmo2", _NAMES), any_activation=True),
    "olmo3": ModelFamily(
        hf=Layout(),
        gguf=entry("olmo3", "Olmo3", "olmo2", _NAMES, WINDOW, defaults=_olmo3_defaults),
        any_activation=True,
        needs_layers=BOTH_KINDS,
    ),
    "olmoe": ModelFamily(
        hf=moe(),
        gguf=entry(
            "olmoe",
            "Olmoe",
            "olmoe",
            f"{QK_NORM} {experts('mlp')}",
            EXPERTS,
            {**SILU, "norm_topk_prob": False, "clip_qkv": None},
        ),
        any_activation=True,
        computes={"clip_qkv": (None,)},
    ),
    "olmo_hybrid": ModelFamily(hf=_olmo_hybrid()),
}
