"""One table per architecture: its tensors in Hugging Face's files and in MLX's.

Most families have the same names and shapes on both sides. The others differ by stacked experts, a split gate_up, the
axes of a convolution, a prefix, or norms that MLX keeps with 1 added. `modules` says where PEFT finds a layer when
transformers has another one in memory than in its files: experts are there parameters gate_up_proj and down_proj,
routers a parameter `weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.rules import Layout, Rule

Config = dict[str, Any]


def _stacked(
    config: Config, experts: str, stacked: str, names: str = "gate up down", key: str = "num_experts"
) -> tuple[Rule, ...]:
    """Experts one by one in HF, together in MLX. names: HF's of gate, up and down."""
    count = int(config.get(key) or config.get("num_experts") or config.get("num_local_experts") or 1)
    given = [name if name[0] == "w" else f"{name}_proj" for name in names.split()]
    return tuple(
        Rule(
            f"model.layers.{{n}}.{experts}.{{e}}.{theirs}.weight",
            (f"model.layers.{{n}}.{stacked}.{ours}.weight",),
            "stack",
            count=count,
        )
        for theirs, ours in zip(given, ("gate_proj", "up_proj", "down_proj"), strict=True)
    )


def _experts(stacked: str, experts: str, router: str = "", peft_router: str = "") -> tuple[tuple[str, str], ...]:
    """Where PEFT finds stacked experts and their router."""
    prefix = "model.layers.{n}."
    out = [(f"{prefix}{stacked}.{half}_proj", f"{prefix}{experts}:gate_up_proj#{half}") for half in ("gate", "up")]
    out.append((f"{prefix}{stacked}.down_proj", f"{prefix}{experts}:down_proj"))
    if router:
        out.append((f"{prefix}{router}", f"{prefix}{peft_router or router + ':weight'}"))
    # PEFT takes any module of these names in such a family for an expert; as parameters they are what they are.
    out += [(f"{prefix}{{s}}.{name}_proj", f"{prefix}{{s}}.{name}_proj:weight") for name in ("gate", "up", "down")]
    return tuple(out)


def _moe(config: Config, key: str = "num_experts", dropped: tuple[str, ...] = ()) -> Layout:
    """Qwen-style: experts under mlp."""
    return Layout(
        _stacked(config, "mlp.experts", "mlp.switch_mlp", key=key),
        _experts("mlp.switch_mlp", "mlp.experts", "mlp.gate"),
        dropped,
    )


def _mixtral(config: Config, router: str = "mlp.gate:weight") -> Layout:
    inside = "block_sparse_moe"
    return Layout(
        _stacked(config, f"{inside}.experts", f"{inside}.switch_mlp", "w1 w3 w2", "num_local_experts"),
        _experts(f"{inside}.switch_mlp", "mlp.experts", f"{inside}.gate", router),
    )


def _granitemoe(config: Config) -> Layout:
    moe = "model.layers.{n}.block_sparse_moe."
    halves = tuple(f"{moe}switch_mlp.{half}_proj.weight" for half in ("gate", "up"))
    return Layout(
        (
            Rule(f"{moe}input_linear.weight", halves, "halves"),
            Rule(f"{moe}output_linear.weight", (f"{moe}switch_mlp.down_proj.weight",)),
        ),
        _experts(
            "block_sparse_moe.switch_mlp",
            "block_sparse_moe.experts",
            "block_sparse_moe.router.layer",
            "block_sparse_moe.router:weight",
        ),
    )


def _gpt_oss(config: Config) -> Layout:
    e = "model.layers.{n}.mlp.experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{e}gate_proj.weight", f"{e}up_proj.weight"), "interleaved", axes=(0, 2, 1)),
        Rule(f"{e}gate_up_proj_bias", (f"{e}gate_proj.bias", f"{e}up_proj.bias"), "interleaved"),
        Rule(f"{e}down_proj", (f"{e}down_proj.weight",), axes=(0, 2, 1)),
        Rule(f"{e}down_proj_bias", (f"{e}down_proj.bias",)),
    )
    return Layout(rules, (("model.layers.{n}.mlp.router", "model.layers.{n}.mlp.router:weight"),), early=rules)


def _deepseek_v3(config: Config) -> Layout:
    moe = _moe(config, "n_routed_experts", (f"model.layers.{config.get('num_hidden_layers')}.",))
    attention = "model.layers.{n}.self_attn."
    split = Rule(
        f"{attention}kv_b_proj.weight",
        (f"{attention}embed_q.weight", f"{attention}unembed_out.weight"),
        "kv_b",
        heads=config.get("num_attention_heads", 1),
        nope=config.get("qk_nope_head_dim", 1),
    )
    return Layout((*moe.rules, split), moe.modules, moe.dropped)


def _conv(name: str) -> Rule:
    """A depthwise convolution: [C, 1, K] in HF, [C, K, 1] in MLX."""
    return Rule(f"{{s}}.{name}.weight", (f"{{s}}.{name}.weight",), axes=(0, 2, 1))


def _lfm2_moe(config: Config) -> Layout:
    block = "model.layers.{n}.feed_forward."
    dense = tuple(
        Rule(f"{block}{theirs}.weight", (f"{block}{ours}_proj.weight",))
        for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    )
    stacked = _stacked(config, "feed_forward.experts", "feed_forward.switch_mlp", "w1 w3 w2")
    named = tuple(
        (f"{block}{ours}_proj", f"{block}{theirs}:weight")
        for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    )
    return Layout(
        (*stacked, *dense, _conv("conv.conv")),
        (*named, *_experts("feed_forward.switch_mlp", "feed_forward.experts", "feed_forward.gate")),
    )


def _shifted(prefix: tuple[str, str] = ("", "")) -> tuple[Rule, ...]:
    """Norms that MLX keeps with 1 added. prefix: HF's and MLX's."""
    names = (
        "model.norm",
        *(
            f"model.layers.{{n}}.{norm}"
            for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        ),
    )
    return tuple(Rule(f"{prefix[0]}{name}.weight", (f"{prefix[1]}{name}.weight",), plus=1.0) for name in names)


def _qwen3_next(config: Config) -> Layout:
    moe = _moe(config, dropped=("mtp.",))
    return Layout((*moe.rules, _conv("conv1d"), *_shifted()), moe.modules, moe.dropped)


def _qwen3_5_text(config: Config) -> Layout:
    inner = "language_model."
    conv = Rule("model.{s}.conv1d.weight", (f"{inner}model.{{s}}.conv1d.weight",), axes=(0, 2, 1))
    return Layout((*_shifted(("", inner)), conv, *_prefixed(inner)), dropped=("mtp.",))


def _prefixed(mlx: str, hf: str = "") -> tuple[Rule, ...]:
    return Rule(f"{hf}model.{{s}}", (f"{mlx}model.{{s}}",)), Rule(f"{hf}lm_head.{{s}}", (f"{mlx}lm_head.{{s}}",))


def _vision(config: Config) -> Layout:
    """A vision model whose text part alone is in MLX, under the same names; in memory transformers has others."""
    return Layout(
        modules=(
            ("language_model.model.{s}", "model.language_model.{s}"),
            ("language_model.lm_head", "lm_head"),
        ),
        dropped=("vision_tower.", "multi_modal_projector."),
        needs_dropped=True,
    )


def _llama4_text(config: Config) -> Layout:
    e, moved = "model.layers.{n}.feed_forward.experts.", "language_model."
    rules = (
        Rule(
            f"{e}gate_up_proj", (f"{moved}{e}gate_proj.weight", f"{moved}{e}up_proj.weight"), "halves", axes=(0, 2, 1)
        ),
        Rule(f"{e}down_proj", (f"{moved}{e}down_proj.weight",), axes=(0, 2, 1)),
        *_prefixed(moved),
    )
    router = "model.layers.{n}.feed_forward.router"
    return Layout(rules, ((f"{moved}{router}", f"{router}:weight"),), early=rules)


def _gpt2(config: Config) -> Layout:
    layer = "transformer.h.{n}."
    turned = tuple(
        Rule(f"{layer}{name}.weight", (f"model.h.{{n}}.{name}.weight",), axes=(1, 0))
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    # mlx-lm turns and prefixes them itself, from the names that older checkpoints have.
    return Layout((*turned, Rule("transformer.{s}", ("model.{s}",))), early=(Rule("transformer.{s}", ("{s}",)),))


def _gpt_neox(config: Config) -> Layout:
    return Layout(
        (
            Rule("gpt_neox.layers.{s}", ("model.h.{s}",)),
            Rule("embed_out.weight", ("model.embed_out.weight",)),
            Rule("gpt_neox.{s}", ("model.{s}",)),
        ),
        (("model.embed_out", "lm_head"),),
    )


def _same(config: Config) -> Layout:
    return Layout()


IDENTITY = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "granite"),
    *(
        "cohere",
        "cohere2",
        "olmo2",
        "olmo3",
        "smollm3",
        "starcoder2",
        "stablelm",
        "helium",
        "seed_oss",
        "ernie4_5",
        "glm",
    ),
    *("glm4", "gpt_bigcode", "exaone4", "nemotron", "hunyuan_v1_dense", "gemma4_text"),
)
LAYOUTS: dict[str, Callable[[Config], Layout]] = {
    **dict.fromkeys(IDENTITY, _same),
    "mixtral": _mixtral,
    "phimoe": lambda config: _mixtral(config, "mlp.router:weight"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), _moe),
    "granitemoe": _granitemoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": lambda config: _moe(config, "n_routed_experts"),
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": lambda config: _moe(config, "n_routed_experts", (f"model.layers.{config.get('num_hidden_layers')}.",)),
    "ernie4_5_moe": lambda config: _moe(config, "moe_num_experts", ("e_score_correction_bias", "mtp_")),
    "lfm2": lambda config: Layout((_conv("conv.conv"),)),
    "lfm2_moe": _lfm2_moe,
    "mamba": lambda config: Layout((_conv("conv1d"),), not_in_peft=(".out_proj",)),
    "mamba2": lambda config: Layout((_conv("conv1d"),), not_in_peft=(".out_proj",)),
    "jamba": lambda config: Layout((_conv("conv1d"),)),
    "qwen3_next": _qwen3_next,
    "qwen3_5_text": _qwen3_5_text,
    "gemma3": _vision,
    "mistral3": _vision,
    "llama4_text": _llama4_text,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}


def differs(config: Config) -> str:
    """Why mlx-lm's model of this configuration is not the one in transformers, or "". Found by comparing logits."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or config
    if kind == "glm" and rope.get("partial_rotary_factor", 0.5) != 1:
        return "mlx-lm rotates all of a head, transformers a part (partial_rotary_factor)"
    if kind == "jamba" and config.get("num_experts", 1) > 1:
        return "mlx-lm normalises the router over the chosen experts, transformers over all"
    if kind == "ernie4_5_moe":
        return "mlx-lm leaves out the router's e_score_correction_bias"
    if kind == "falcon_h1":
        return "mlx-lm leaves key_multiplier out, and attention_in_multiplier where it makes the values"
    if kind == "mamba2" and config.get("n_groups", 1) > 1:
        return "transformers repeats the groups of B and C in another order"
    return ""


def by_model_type(config: Config) -> Layout:
    """The layout of a config.json. Raises UserError naming why an export cannot be, and what works instead."""
    kind = str(config.get("model_type"))
    why = differs(config)
    if why:
        raise UserError(
            f"models of type {kind} cannot be exported: {why}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )
    if kind not in LAYOUTS:
        raise UserError(
            f"models of type {kind} cannot be exported yet (covered: {', '.join(sorted(LAYOUTS))})",
            "`mlxtune fuse` makes a merged MLX model of any type.",
        )
    return LAYOUTS[kind](config)
