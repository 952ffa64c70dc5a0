"""Google's Gemma models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxtune_convert.families.changes import fixed
from mlxtune_convert.families.checks import BOTH_KINDS, regular_windows
from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import QK_NORM, WINDOW, GgufFamily, entry
from mlxtune_convert.hf.family_rules import LAYER, MOVED, VISION, conv, nested
from mlxtune_convert.hf.rules import Layout, Rule

# What Gemma's vision models have beside their text: images, and in some sound.
_TOWERS = ("vision_tower.", "audio_tower.", "embed_audio.", "vision_embedder.")
_GEMMA3N = (Rule("model.{s}", (f"model.{MOVED}{{s}}",)),)
_NORMS = (
    "post_attention_norm=post_attention_layernorm ffn_norm=pre_feedforward_layernorm "
    "post_ffw_norm=post_feedforward_layernorm"
)
_GELU: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}  # its older files say another hidden_act
_BIDIRECTIONAL = (False, None, "vision")


def _gemma4_layout() -> Layout:
    theirs = f"{LAYER}experts."
    ours = f"{theirs}switch_glu."
    rules = (
        Rule(f"{theirs}gate_up_proj", (f"{ours}gate_proj.weight", f"{ours}up_proj.weight"), "halves"),
        Rule(f"{theirs}down_proj", (f"{ours}down_proj.weight",)),
    )
    modules = (
        (f"{ours}gate_proj", f"{LAYER}experts:gate_up_proj#gate"),
        (f"{ours}up_proj", f"{LAYER}experts:gate_up_proj#up"),
        (f"{ours}down_proj", f"{LAYER}experts:down_proj"),
    )
    return Layout(rules, modules)


def _query_scalar(large: int) -> Callable[[Config], int]:
    """Scores are divided by the root of the head's width; in the 27B model, of `large` layers, by that of its part of
    the model's width (gemma2 and gemma3 in llama.cpp's llama-model.cpp).
    """

    def scalar(config: Config) -> int:
        heads = config["num_attention_heads"]
        if config["num_hidden_layers"] == large:
            return int(config["hidden_size"] // heads)
        return int(config.get("head_dim") or config["hidden_size"] // heads)

    return scalar


def _gemma2_caps(config: Config) -> str:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in config and config[key] is None:
            return f"it cannot do without {key}, the configuration says null"
    return ""


def _gemma4_keys(config: Config) -> dict[str, Any]:
    """Layers with a window and layers without have other heads, and the last ones share the keys of earlier ones."""
    layers = config["num_hidden_layers"]
    windowed = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    shared = int(config.get("num_kv_shared_layers") or 0)
    whole_head, window_head = int(config.get("global_head_dim") or config["head_dim"]), int(config["head_dim"])
    window_kv = config["num_key_value_heads"]
    whole_kv = config.get("num_global_key_value_heads") or window_kv
    wide = bool(config.get("use_double_wide_mlp", True)) and shared > 0  # layers that share keys are twice as wide
    widths = []
    for layer in range(layers):
        doubled = wide and layer >= layers - shared
        widths.append(config["intermediate_size"] * (2 if doubled else 1))
    rope = config["rope_parameters"]
    return {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "attention.sliding_window_pattern": windowed,
        "attention.key_length": whole_head,
        "attention.value_length": whole_head,
        "attention.key_length_swa": window_head,
        "attention.value_length_swa": window_head,
        "rope.dimension_count": whole_head,
        "rope.dimension_count_swa": window_head,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "feed_forward_length": widths,
        "attention.head_count_kv": [window_kv if window else whole_kv for window in windowed],
        "final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),  # without it: 30
    }


def _gemma4_gguf(model_type: str) -> GgufFamily:
    return entry(
        model_type,
        "Gemma4",
        "gemma4",
        f"{QK_NORM} {_NORMS} "
        "inp_gate=per_layer_input_gate proj=per_layer_projection post_norm=post_per_layer_input_norm",
        WINDOW,
        {**_GELU, "enable_moe_block": False},
        parameters="layer_output_scale.weight=layer_scalar",
        outside="per_layer_token_embd=model.embed_tokens_per_layer "
        "per_layer_model_proj=model.per_layer_model_projection per_layer_proj_norm=model.per_layer_projection_norm",
        more=_gemma4_keys,
        written_only=True,
    )


_GEMMA4_NESTED = nested(_gemma4_layout(), "embed_vision.", *_TOWERS)

FAMILIES = {
    "gemma": ModelFamily(
        hf=Layout(),
        gguf=entry("gemma", "Gemma", "gemma", fixed=_GELU, norm_offset=1.0),
        any_activation=True,
        computes={"attention_bias": (False, None), "tie_word_embeddings": (True,)},
    ),
    "gemma2": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "gemma2",
            "Gemma2",
            "gemma2",
            _NORMS,
            "attn_logit_softcapping=attn_logit_softcapping final_logit_softcapping=final_logit_softcapping " + WINDOW,
            _GELU,
            norm_offset=1.0,
            query_scalar=_query_scalar(46),
        ),
        any_activation=True,
        computes={"attention_bias": (False, None), "tie_word_embeddings": (True,)},
        cannot_run=_gemma2_caps,
    ),
    "gemma3_text": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "gemma3_text",
            "Gemma3",
            "gemma3",
            f"{_NORMS} {QK_NORM}",
            WINDOW,
            {**_GELU, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
            norm_offset=1.0,
            query_scalar=_query_scalar(62),
        ),
        any_activation=True,
        computes={
            "attention_bias": (False, None),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": _BIDIRECTIONAL,
        },
        checks=(regular_windows,),
        needs_layers=BOTH_KINDS,
    ),
    "gemma3": ModelFamily(hf=VISION),
    "gemma3n_text": ModelFamily(hf=Layout(_GEMMA3N, early=_GEMMA3N), text_of="gemma3n"),
    "gemma3n": ModelFamily(hf=Layout(dropped=("embed_vision.", *_TOWERS), tower="embed_vision.")),
    "gemma4_text": ModelFamily(
        hf=_gemma4_layout(),
        gguf=_gemma4_gguf("gemma4_text"),
        rope_sets=True,
        no_rope_scaling=True,
        computes={
            "attention_bias": (False, None),
            "use_bidirectional_attention": _BIDIRECTIONAL,
            "hidden_activation": ("gelu_pytorch_tanh",),
        },
    ),
    "gemma4": ModelFamily(hf=_GEMMA4_NESTED, rope_sets=True, no_rope_scaling=True),
    "gemma4_unified_text": ModelFamily(
        gguf=_gemma4_gguf("gemma4_unified_text"),
        config_first=fixed(hidden_size_per_layer_input=0),
        rope_sets=True,
        no_rope_scaling=True,
    ),
    "gemma4_unified": ModelFamily(hf=_GEMMA4_NESTED),
    "recurrent_gemma": ModelFamily(hf=Layout((conv("conv_1d"),))),
}
