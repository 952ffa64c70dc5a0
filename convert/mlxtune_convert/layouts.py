"""One table per architecture: its tensors in Hugging Face's files and in MLX's.

Most families have the same names and shapes on both sides. The others differ by stacked experts, a split gate_up, the
axes of a convolution, a prefix, or norms that MLX keeps with 1 added. `modules` says where PEFT finds a layer when
transformers has another one in memory than in its files: experts are there parameters gate_up_proj and down_proj,
routers a parameter `weight`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtune_convert import unheeded
from mlxtune_convert.errors import UserError
from mlxtune_convert.rules import Layout, Rule

LAYER = "model.layers.{n}."
MOVED = "language_model."  # prefix of the text part of a model that mlx-lm knows with its vision tower
PARTS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")  # the same three, in other families
MTP = ("model.layers.{num_hidden_layers}.",)  # the block that predicts further tokens follows the last one


def _renamed(place: str, theirs: tuple[str, ...], ours: tuple[str, ...], do: str = "move") -> tuple[Rule, ...]:
    """Matrices at one place of a block. theirs, ours: names in HF and MLX."""
    pairs = zip(theirs, ours, strict=True)
    return tuple(Rule(f"{LAYER}{place}.{hf}.weight", (f"{LAYER}{place}.{mlx}.weight",), do) for hf, mlx in pairs)


def _turned(name: str, mlx: str = "", axes: tuple[int, ...] = (0, 2, 1)) -> Rule:
    """A tensor with other axes in MLX; a depthwise convolution, say, is [C, 1, K] in HF and [C, K, 1] in MLX."""
    return Rule(name, (mlx or name,), axes=axes)


def _conv(name: str) -> Rule:
    return _turned(f"{{s}}.{name}.weight")


def _peft_experts(stacked: str, experts: str) -> tuple[tuple[str, str], ...]:
    """Where PEFT finds stacked experts. stacked, experts: places in a block of MLX and of transformers."""
    halves = ((f"{stacked}.{half}_proj", f"{experts}:gate_up_proj#{half}") for half in ("gate", "up"))
    # PEFT takes any module of these names in such a family for an expert; as parameters they are what they are.
    plain = ((f"{{s}}.{name}", f"{{s}}.{name}:weight") for name in PARTS)
    pairs = (*halves, (f"{stacked}.down_proj", f"{experts}:down_proj"), *plain)
    return tuple((LAYER + mlx, LAYER + peft) for mlx, peft in pairs)


def _moe(
    place: str = "mlp",
    names: tuple[str, ...] = PARTS,
    router: tuple[str, str] = ("mlp.gate", "mlp.gate"),
    experts: str = "mlp.experts",
    rules: tuple[Rule, ...] = (),
    modules: tuple[tuple[str, str], ...] = (),
    dropped: tuple[str, ...] = (),
) -> Layout:
    """Experts one by one in HF's files, stacked in MLX. place: of the experts in a block; names: of gate, up and down
    in HF, none where `rules` say it; router, experts: in MLX and PEFT, in PEFT.
    """
    single = tuple(f"experts.{{e}}.{name}" for name in names)
    stacked = _renamed(place, single, tuple(f"switch_mlp.{name}" for name in PARTS), "stack") if names else ()
    routers = (f"{LAYER}{router[0]}", f"{LAYER}{router[1]}:weight")
    return Layout((*stacked, *rules), (*modules, routers, *_peft_experts(f"{place}.switch_mlp", experts)), dropped)


def _mixtral(router: str) -> Layout:
    return _moe("block_sparse_moe", NUMBERED, ("block_sparse_moe.gate", router))


def _granitemoe() -> Layout:
    moe = f"{LAYER}block_sparse_moe."
    halves = (f"{moe}switch_mlp.gate_proj.weight", f"{moe}switch_mlp.up_proj.weight")
    rules = (
        Rule(f"{moe}input_linear.weight", halves, "halves"),
        Rule(f"{moe}output_linear.weight", (f"{moe}switch_mlp.down_proj.weight",)),
    )
    router = ("block_sparse_moe.router.layer", "block_sparse_moe.router")
    return _moe("block_sparse_moe", (), router, "block_sparse_moe.experts", rules)


def _gpt_oss() -> Layout:
    e = f"{LAYER}mlp.experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{e}gate_proj.weight", f"{e}up_proj.weight"), "interleaved", axes=(0, 2, 1)),
        Rule(f"{e}gate_up_proj_bias", (f"{e}gate_proj.bias", f"{e}up_proj.bias"), "interleaved"),
        _turned(f"{e}down_proj", f"{e}down_proj.weight"),
        Rule(f"{e}down_proj_bias", (f"{e}down_proj.bias",)),
    )
    experts = (
        *((f"{e}{half}_proj", f"{LAYER}mlp.experts:gate_up_proj#{half}") for half in ("gate", "up")),
        (f"{e}down_proj", f"{LAYER}mlp.experts:down_proj"),
    )
    return Layout(rules, ((f"{LAYER}mlp.router", f"{LAYER}mlp.router:weight"), *experts), early=rules)


def _deepseek_v3() -> Layout:
    attention = f"{LAYER}self_attn."
    parts = (f"{attention}embed_q.weight", f"{attention}unembed_out.weight")
    return _moe(rules=(Rule(f"{attention}kv_b_proj.weight", parts, "kv_b"),), dropped=MTP)


def _lfm2_moe() -> Layout:
    block = "feed_forward"
    dense = tuple(
        (f"{LAYER}{block}.{ours}", f"{LAYER}{block}.{hf}:weight") for ours, hf in zip(PARTS, NUMBERED, strict=True)
    )
    rules = (*_renamed(block, NUMBERED, PARTS), _conv("conv.conv"))
    return _moe(block, NUMBERED, (f"{block}.gate", f"{block}.gate"), f"{block}.experts", rules, dense)


def _shifted(moved: str = "") -> tuple[Rule, ...]:
    """Norms that MLX keeps with 1 added. moved: MLX's prefix."""
    inside = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    names = ("model.norm.weight", *(f"{LAYER}{norm}.weight" for norm in inside))
    return tuple(Rule(name, (f"{moved}{name}",), plus=1.0) for name in names)


PREFIXED = tuple(Rule(f"{part}.{{s}}", (f"{MOVED}{part}.{{s}}",)) for part in ("model", "lm_head"))
# A vision model whose text part alone is in MLX, under the same names; in memory transformers has others.
VISION = Layout(
    modules=((f"{MOVED}model.{{s}}", f"model.{MOVED}{{s}}"), (f"{MOVED}lm_head", "lm_head")),
    dropped=("vision_tower.", "multi_modal_projector."),
    needs_dropped=True,
)


def _llama4_text() -> Layout:
    block = f"{LAYER}feed_forward."
    e, to = f"{block}experts.", f"{MOVED}{block}experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{to}gate_proj.weight", f"{to}up_proj.weight"), "halves", axes=(0, 2, 1)),
        _turned(f"{e}down_proj", f"{to}down_proj.weight"),
        *PREFIXED,
    )
    return Layout(rules, ((f"{MOVED}{block}router", f"{block}router:weight"),), early=rules)


def _gpt2() -> Layout:
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    turned = (_turned(f"transformer.h.{{n}}.{n}.weight", f"model.h.{{n}}.{n}.weight", (1, 0)) for n in names)
    # mlx-lm turns and prefixes them itself, from the names that older checkpoints have.
    return Layout((*turned, Rule("transformer.{s}", ("model.{s}",))), early=(Rule("transformer.{s}", ("{s}",)),))


GPT_NEOX = Layout(
    (
        Rule("gpt_neox.layers.{s}", ("model.h.{s}",)),
        Rule("embed_out.weight", ("model.embed_out.weight",)),
        Rule("gpt_neox.{s}", ("model.{s}",)),
    ),
    (("model.embed_out", "lm_head"),),
)
CONV = Layout((_conv("conv1d"),))
IDENTITY = (
    "llama mistral ministral3 qwen2 qwen3 phi phi3 gemma gemma2 gemma3_text gemma4_text granite cohere cohere2 olmo2 "
    "olmo3 smollm3 starcoder2 stablelm helium seed_oss ernie4_5 glm glm4 gpt_bigcode exaone4 nemotron hunyuan_v1_dense"
)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(IDENTITY.split(), Layout()),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"), _moe()),
    **dict.fromkeys(("mamba", "mamba2"), replace(CONV, not_in_peft=(".out_proj",))),
    "mixtral": _mixtral("mlp.gate"),
    "phimoe": _mixtral("mlp.router"),
    "granitemoe": _granitemoe(),
    "gpt_oss": _gpt_oss(),
    "deepseek_v3": _deepseek_v3(),
    "glm4_moe": _moe(dropped=MTP),
    "lfm2": Layout((_conv("conv.conv"),)),
    "lfm2_moe": _lfm2_moe(),
    "jamba": CONV,
    "qwen3_next": _moe(rules=(_conv("conv1d"), *_shifted()), dropped=("mtp.",)),
    "qwen3_5_text": Layout(
        (*_shifted(MOVED), _turned("model.{s}.conv1d.weight", f"{MOVED}model.{{s}}.conv1d.weight"), *PREFIXED),
        dropped=("mtp.",),
    ),
    "gemma3": VISION,
    "mistral3": VISION,
    "llama4_text": _llama4_text(),
    "gpt2": _gpt2(),
    "gpt_neox": GPT_NEOX,
}


def differs(config: dict[str, Any]) -> str:
    """Why mlx-lm's model of this configuration is not the one in transformers, or "". Found by comparing logits."""
    kind = config.get("model_type")
    if kind == "jamba" and config.get("num_experts", 1) > 1:
        return "mlx-lm normalises the router over the chosen experts, transformers over all"
    if kind == "ernie4_5_moe":
        return "mlx-lm leaves out the router's e_score_correction_bias"
    if kind == "falcon_h1":
        return "mlx-lm leaves key_multiplier out, and attention_in_multiplier where it makes the values"
    if kind == "mamba2" and config.get("n_groups", 1) > 1:
        return "transformers repeats the groups of B and C in another order"
    return unheeded.why(config)


def by_model_type(config: dict[str, Any]) -> Layout:
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
    layout = LAYOUTS[kind]
    return replace(layout, dropped=tuple(part.format_map(config) for part in layout.dropped))
