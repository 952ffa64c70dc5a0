"""Models that go back to OpenAI's GPT-2 in form or in name."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.changes import copied
from mlxtune_convert.families.checks import BOTH_KINDS
from mlxtune_convert.families.family import ModelFamily
from mlxtune_convert.gguf.family import LOCAL_EXPERTS, WINDOW, entry, experts
from mlxtune_convert.hf.family_rules import LAYER, turned
from mlxtune_convert.hf.rules import Layout, Rule

_GELU: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}


def _gpt2() -> Layout:
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = tuple(turned(f"transformer.h.{{n}}.{n}.weight", f"model.h.{{n}}.{n}.weight", (1, 0)) for n in names)
    # mlx-lm turns and prefixes them itself, from the names that older checkpoints have.
    return Layout((*matrices, Rule("transformer.{s}", ("model.{s}",))), early=(Rule("transformer.{s}", ("{s}",)),))


_GPT_NEOX = Layout(
    (
        Rule("gpt_neox.layers.{s}", ("model.h.{s}",)),
        Rule("embed_out.weight", ("model.embed_out.weight",)),
        Rule("gpt_neox.{s}", ("model.{s}",)),
    ),
    (("model.embed_out", "lm_head"),),
)


def _gpt_oss() -> Layout:
    """Its experts are parameters with the rows of gate and up alternating, and with biases."""
    e = f"{LAYER}mlp.experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{e}gate_proj.weight", f"{e}up_proj.weight"), "interleaved", axes=(0, 2, 1)),
        Rule(f"{e}gate_up_proj_bias", (f"{e}gate_proj.bias", f"{e}up_proj.bias"), "interleaved"),
        turned(f"{e}down_proj", f"{e}down_proj.weight"),
        Rule(f"{e}down_proj_bias", (f"{e}down_proj.bias",)),
    )
    modules = (
        (f"{LAYER}mlp.router", f"{LAYER}mlp.router:weight"),
        (f"{e}gate_proj", f"{LAYER}mlp.experts:gate_up_proj#gate"),
        (f"{e}up_proj", f"{LAYER}mlp.experts:gate_up_proj#up"),
        (f"{e}down_proj", f"{LAYER}mlp.experts:down_proj"),
    )
    return Layout(rules, modules, early=rules)


def _nanochat() -> Layout:
    to = "transformer.h.{n}."
    rules = (
        Rule("model.embed_tokens.weight", ("transformer.wte.weight",)),
        Rule(f"{LAYER}self_attn.q_proj.weight", (f"{to}attn.c_q.weight",)),
        Rule(f"{LAYER}self_attn.k_proj.weight", (f"{to}attn.c_k.weight",)),
        Rule(f"{LAYER}self_attn.v_proj.weight", (f"{to}attn.c_v.weight",)),
        Rule(f"{LAYER}self_attn.o_proj.weight", (f"{to}attn.c_proj.weight",)),
        Rule(f"{LAYER}mlp.fc1.weight", (f"{to}mlp.c_fc.weight",)),
        Rule(f"{LAYER}mlp.fc2.weight", (f"{to}mlp.c_proj.weight",)),
    )
    return Layout(rules, early=rules)


FAMILIES = {
    "gpt2": ModelFamily(
        hf=_gpt2(),
        config_last=copied(n_ctx="n_positions"),  # an older name of one number
        any_activation=True,
        computes={
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "gpt_neox": ModelFamily(
        hf=_GPT_NEOX,
        any_activation=True,
        computes={"tie_word_embeddings": (False,), "attention_bias": (True,)},
    ),
    "gptj": ModelFamily(hf=Layout((Rule("transformer.{s}", ("model.{s}",)),))),
    "gpt_bigcode": ModelFamily(
        hf=Layout(),
        any_activation=True,
        computes={"multi_query": (True,), "scale_attn_weights": (True,)},
    ),
    "starcoder2": ModelFamily(
        hf=Layout(),
        gguf=entry(
            "starcoder2",
            "Starcoder2",
            "starcoder2",
            "ffn_up=mlp.c_fc ffn_down=mlp.c_proj -ffn_gate",
            "attention.layer_norm_epsilon=norm_epsilon",
            _GELU,
        ),
        any_activation=True,
        computes={"use_bias": (True,)},
    ),
    "gpt_oss": ModelFamily(
        hf=_gpt_oss(),
        gguf=entry(
            "gpt_oss",
            "GptOss",
            "gpt-oss",
            "post_attention_norm=post_attention_layernorm attn_sinks=self_attn.sinks -ffn_norm "
            + experts("mlp", "router", "experts"),
            f"{LOCAL_EXPERTS} {WINDOW} expert_feed_forward_length=intermediate_size",
        ),
        mxfp4=True,
        computes={
            "attention_bias": (True,),
            "tie_word_embeddings": (False,),
            "swiglu_alpha": (1.702,),
            "hidden_act": ("silu", "swish"),
        },
        needs_layers=BOTH_KINDS,
    ),
    "nanochat": ModelFamily(hf=_nanochat()),
}
