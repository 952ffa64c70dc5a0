"""Alibaba's Qwen models: dense, with experts, with linear attention, with vision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.families.changes import fixed
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import (
    EXPERT_WIDTH,
    EXPERTS,
    QK_NORM,
    SILU,
    entry,
    experts,
    shared_expert,
)
from mlxtune_convert.gguf.tensor_name import TensorName
from mlxtune_convert.hf.family_rules import (
    IN_MEMORY,
    LAYER,
    MOVED,
    PARTS,
    PREFIXED,
    conv,
    fused,
    moe,
    nested,
    shifted,
    turned,
)
from mlxtune_convert.hf.rules import Layout, Rule

# --- Hugging Face's files

_QWEN3_5 = Layout(
    (*shifted(MOVED), turned("model.{s}.conv1d.weight", f"{MOVED}model.{{s}}.conv1d.weight"), *PREFIXED),
    dropped=("mtp.",),
)


def _qwen3_5_moe() -> Layout:
    # Published files have fused experts, which mlx-lm reads; transformers saves them one by one.
    early = tuple(
        Rule(f"{LAYER}mlp.experts.{{e}}.{name}.weight", (f"{MOVED}{LAYER}mlp.switch_mlp.{name}.weight",), "stack")
        for name in PARTS
    )
    whole = fused(early)
    moved = tuple(replace(rule, mlx=tuple(MOVED + name for name in rule.mlx)) for rule in whole.rules)
    modules = tuple((MOVED + ours, theirs) for ours, theirs in whole.modules)
    return replace(_QWEN3_5, rules=(*moved, *_QWEN3_5.rules), modules=modules, early=early)


def _qwen3_vl_moe() -> Layout:
    # Published files have [E, H, 2f], transformers saves [E, 2f, H]: like it, we tell them by the model's width.
    layout = fused(axes=(0, 2, 1))
    gate_up, down = layout.rules
    early = (replace(gate_up, width_axis=-1), replace(down, width_axis=-2))
    return replace(layout, early=early)


_QWEN2_VL = Layout(PREFIXED, IN_MEMORY, ("visual.",), tower="visual.")

# --- GGUF


def _sections(config: Config) -> dict[str, Any]:
    """How many pairs of a head turn with time, height and width; on text the three are one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sections = [int(number) for number in rope.get("mrope_section") or (11, 11, 10)]
    return {"rope.dimension_sections": sections + [0] * (4 - len(sections))}


def _qwen3_vl_keys(config: Config) -> dict[str, Any]:
    deep = (config.get("vision_config") or {}).get("deepstack_visual_indexes") or ()
    return {**_sections(config), "n_deepstack_layers": len(deep)}


def _qwen3_5_keys(config: Config) -> dict[str, Any]:
    interval = int(config.get("full_attention_interval") or 4)
    for layer, kind in enumerate(config.get("layer_types") or ()):
        if (kind == "full_attention") != ((layer + 1) % interval == 0):
            raise UserError(
                f"llama.cpp's qwen35 architecture has full attention in every {interval}th layer alone",
                "`--to hf` exports the model all the same.",
            )
    return {
        **_sections(config),
        "full_attention_interval": interval,
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
    }


def _value_heads(config: Config, width: int) -> np.ndarray | None:
    """llama.cpp's order of the value heads: [value heads * width] int, MLX's row of each of its rows; None: the same.

    width: rows of one head. Here the heads of one key head are together; llama.cpp has the first of every key head,
    then the second of every one: with 2 key heads of 2 value heads each, 0 1 | 2 3 comes out as 0 2 | 1 3.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if keys == values:
        return None
    rows = np.arange(values * width).reshape(keys, values // keys, width)
    return rows.swapaxes(0, 1).reshape(-1)  # [values / keys, keys, width] -> flat


def _qwen3_5_rows(name: TensorName, config: Config) -> np.ndarray | None:
    if name.block is None:
        return None
    if name.stem in ("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt"):  # one row for a head
        return _value_heads(config, 1)
    values = _value_heads(config, config["linear_value_head_dim"])
    if values is None or name.stem == "attn_gate":
        return values if name.stem == "attn_gate" else None
    if name.stem in ("attn_qkv", "ssm_conv1d"):  # queries and keys, which stay, then values
        before = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
        return np.concatenate([np.arange(before), before + values])
    return None


def _qwen3_5_columns(name: TensorName, config: Config) -> np.ndarray | None:
    return _value_heads(config, config["linear_value_head_dim"]) if name.stem == "ssm_out" else None


def _decay(name: TensorName, array: np.ndarray) -> np.ndarray:
    """llama.cpp keeps the decay itself, transformers the logarithm of its negative; any shape."""
    return -np.exp(array) if name.stem == "ssm_a" else array


_QWEN3_5_GGUF: dict[str, Any] = {
    "parameters": "ssm_a=linear_attn.A_log ssm_dt.bias=linear_attn.dt_bias",
    "more": _qwen3_5_keys,
    "rows": _qwen3_5_rows,
    "columns": _qwen3_5_columns,
    "value": _decay,
    "written_only": True,
}
_QWEN3_5_NAMES = (
    f"{QK_NORM} attn_gate=linear_attn.in_proj_z attn_qkv=linear_attn.in_proj_qkv ssm_beta=linear_attn.in_proj_b "
    "ssm_alpha=linear_attn.in_proj_a ssm_conv1d=linear_attn.conv1d ssm_norm=linear_attn.norm "
    "ssm_out=linear_attn.out_proj post_attention_norm=post_attention_layernorm -ffn_norm"
)
_QWEN3_5_TABLE = (
    "ssm.conv_kernel=linear_conv_kernel_dim ssm.state_size=linear_key_head_dim "
    "ssm.group_count=linear_num_key_heads ssm.time_step_rank=linear_num_value_heads"
)
_SHARED_GATE = "ffn_gate_inp_shexp=mlp.shared_expert_gate"
_SHARED_WIDTH = "expert_shared_feed_forward_length=shared_expert_intermediate_size"
_NO_WINDOW = {**SILU, "use_sliding_window": False}
_ALL_SPARSE = {**SILU, "decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES = {
    "qwen2": ModelFamily(
        hf=Layout(),
        gguf=entry("qwen2", "Qwen2", "qwen2", fixed=_NO_WINDOW),
        any_activation=True,
    ),
    "qwen2_moe": ModelFamily(
        hf=moe(),
        gguf=entry(
            "qwen2_moe",
            "Qwen2Moe",
            "qwen2moe",
            f"{experts('mlp')} {shared_expert('mlp.shared_expert')} {_SHARED_GATE}",
            f"{EXPERTS} {EXPERT_WIDTH} {_SHARED_WIDTH}",
            {**_ALL_SPARSE, "norm_topk_prob": False},
        ),
        any_activation=True,
        computes={
            "qkv_bias": (True,),
            "tie_word_embeddings": (False,),
            "norm_topk_prob": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        },
    ),
    "qwen3": ModelFamily(
        hf=Layout(),
        gguf=entry("qwen3", "Qwen3", "qwen3", QK_NORM, fixed=_NO_WINDOW),
        any_activation=True,
        computes={"attention_bias": (False, None)},
    ),
    "qwen3_moe": ModelFamily(
        hf=moe(),
        gguf=entry(
            "qwen3_moe",
            "Qwen3Moe",
            "qwen3moe",
            f"{QK_NORM} {experts('mlp')}",
            f"{EXPERTS} {EXPERT_WIDTH}",
            {**_ALL_SPARSE, "norm_topk_prob": True},
        ),
        any_activation=True,
        computes={"attention_bias": (False, None)},
    ),
    "qwen3_next": ModelFamily(
        hf=moe(rules=(conv("conv1d"), *shifted()), dropped=("mtp.",)),
        computes={"hidden_act": ("silu", "swish")},
    ),
    "qwen3_5_text": ModelFamily(
        hf=_QWEN3_5,
        gguf=entry("qwen3_5_text", "Qwen3_5", "qwen35", _QWEN3_5_NAMES, _QWEN3_5_TABLE, **_QWEN3_5_GGUF),
        text_of="qwen3_5",
        computes={"hidden_act": ("silu", "swish")},
    ),
    "qwen3_5_moe_text": ModelFamily(
        hf=_qwen3_5_moe(),
        gguf=entry(
            "qwen3_5_moe_text",
            "Qwen3_5Moe",
            "qwen35moe",
            f"{_QWEN3_5_NAMES} {experts('mlp')} {shared_expert('mlp.shared_expert')} {_SHARED_GATE}",
            f"{_QWEN3_5_TABLE} {EXPERTS} {EXPERT_WIDTH} {_SHARED_WIDTH}",
            **_QWEN3_5_GGUF,
        ),
        text_of="qwen3_5_moe",
    ),
    "qwen3_5": ModelFamily(hf=nested(_QWEN3_5, "visual.")),
    "qwen3_5_moe": ModelFamily(hf=nested(_qwen3_5_moe(), "visual.")),
    "qwen3_vl_text": ModelFamily(
        gguf=entry("qwen3_vl_text", "Qwen3VL", "qwen3vl", QK_NORM, more=_qwen3_vl_keys, written_only=True),
    ),
    "qwen3_vl_moe_text": ModelFamily(
        gguf=entry(
            "qwen3_vl_moe_text",
            "Qwen3VLMoe",
            "qwen3vlmoe",
            f"{QK_NORM} {experts('mlp')}",
            f"{EXPERTS} {EXPERT_WIDTH}",
            more=_qwen3_vl_keys,
            written_only=True,
        ),
        config_first=fixed(norm_topk_prob=True),
    ),
    "qwen3_vl": ModelFamily(hf=nested(Layout(), "visual.")),
    "qwen3_vl_moe": ModelFamily(hf=nested(_qwen3_vl_moe(), "visual.")),
    "qwen2_vl": ModelFamily(hf=_QWEN2_VL),
    "qwen2_5_vl": ModelFamily(hf=_QWEN2_VL),
}
