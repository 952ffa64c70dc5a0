"""The correspondences of which the families' layouts are made: experts, convolutions, towers, renamed places.

`modules` of a layout say where PEFT finds a layer when transformers has another one in memory than in its files:
experts are there parameters gate_up_proj and down_proj, routers a parameter `weight`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mlxtune_convert.hf.rules import Layout, Rule

LAYER = "model.layers.{n}."
MOVED = "language_model."  # prefix of the text part of a model that mlx-lm knows with its vision tower
PARTS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")  # the same three, in other families
MTP = ("model.layers.{num_hidden_layers}.",)  # the block that predicts further tokens follows the last one


def renamed(place: str, theirs: tuple[str, ...], ours: tuple[str, ...], do: str = "move") -> tuple[Rule, ...]:
    """Matrices at one place of a block. theirs, ours: names in HF and MLX."""
    pairs = zip(theirs, ours, strict=True)
    return tuple(Rule(f"{LAYER}{place}.{hf}.weight", (f"{LAYER}{place}.{mlx}.weight",), do) for hf, mlx in pairs)


def turned(name: str, mlx: str = "", axes: tuple[int, ...] = (0, 2, 1)) -> Rule:
    """A tensor with other axes in MLX; a depthwise convolution, say, is [C, 1, K] in HF and [C, K, 1] in MLX."""
    return Rule(name, (mlx or name,), axes=axes)


def conv(name: str) -> Rule:
    return turned(f"{{s}}.{name}.weight")


def peft_experts(stacked: str, experts: str) -> tuple[tuple[str, str], ...]:
    """Where PEFT finds stacked experts. stacked, experts: places in a block of MLX and of transformers."""
    halves = ((f"{stacked}.{half}_proj", f"{experts}:gate_up_proj#{half}") for half in ("gate", "up"))
    # PEFT takes any module of these names in such a family for an expert; as parameters they are what they are.
    plain = ((f"{{s}}.{name}", f"{{s}}.{name}:weight") for name in PARTS)
    pairs = (*halves, (f"{stacked}.down_proj", f"{experts}:down_proj"), *plain)
    return tuple((LAYER + mlx, LAYER + peft) for mlx, peft in pairs)


def moe(
    place: str = "mlp",
    names: tuple[str, ...] = PARTS,
    router: tuple[str, str] = ("mlp.gate", "mlp.gate"),
    experts: str = "mlp.experts",
    rules: tuple[Rule, ...] = (),
    modules: tuple[tuple[str, str], ...] = (),
    dropped: tuple[str, ...] = (),
    switch: str = "switch_mlp",
) -> Layout:
    """Experts one by one in HF's files, stacked in MLX. place: of the experts in a block; names: of gate, up and down
    in HF, none where `rules` say it; router, experts: in MLX and PEFT, in PEFT; switch: the stack in MLX.
    """
    single = tuple(f"experts.{{e}}.{name}" for name in names)
    stacked = renamed(place, single, tuple(f"{switch}.{name}" for name in PARTS), "stack") if names else ()
    routers = (f"{LAYER}{router[0]}", f"{LAYER}{router[1]}:weight")
    return Layout((*stacked, *rules), (*modules, routers, *peft_experts(f"{place}.{switch}", experts)), dropped)


def mixtral(router: str) -> Layout:
    return moe("block_sparse_moe", NUMBERED, ("block_sparse_moe.gate", router))


def granitemoe(*more: Rule) -> Layout:
    place = f"{LAYER}block_sparse_moe."
    halves = (f"{place}switch_mlp.gate_proj.weight", f"{place}switch_mlp.up_proj.weight")
    rules = (
        Rule(f"{place}input_linear.weight", halves, "halves"),
        Rule(f"{place}output_linear.weight", (f"{place}switch_mlp.down_proj.weight",)),
        *more,
    )
    router = ("block_sparse_moe.router.layer", "block_sparse_moe.router")
    return moe("block_sparse_moe", (), router, "block_sparse_moe.experts", rules)


def gpt_oss() -> Layout:
    e = f"{LAYER}mlp.experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{e}gate_proj.weight", f"{e}up_proj.weight"), "interleaved", axes=(0, 2, 1)),
        Rule(f"{e}gate_up_proj_bias", (f"{e}gate_proj.bias", f"{e}up_proj.bias"), "interleaved"),
        turned(f"{e}down_proj", f"{e}down_proj.weight"),
        Rule(f"{e}down_proj_bias", (f"{e}down_proj.bias",)),
    )
    experts = (
        *((f"{e}{half}_proj", f"{LAYER}mlp.experts:gate_up_proj#{half}") for half in ("gate", "up")),
        (f"{e}down_proj", f"{LAYER}mlp.experts:down_proj"),
    )
    return Layout(rules, ((f"{LAYER}mlp.router", f"{LAYER}mlp.router:weight"), *experts), early=rules)


def deepseek_v3() -> Layout:
    attention = f"{LAYER}self_attn."
    parts = (f"{attention}embed_q.weight", f"{attention}unembed_out.weight")
    return moe(rules=(Rule(f"{attention}kv_b_proj.weight", parts, "kv_b"),), dropped=MTP)


def lfm2_moe() -> Layout:
    block = "feed_forward"
    dense = tuple(
        (f"{LAYER}{block}.{ours}", f"{LAYER}{block}.{hf}:weight") for ours, hf in zip(PARTS, NUMBERED, strict=True)
    )
    rules = (*renamed(block, NUMBERED, PARTS), conv("conv.conv"))
    return moe(block, NUMBERED, (f"{block}.gate", f"{block}.gate"), f"{block}.experts", rules, dense)


def shifted(moved: str = "") -> tuple[Rule, ...]:
    """Norms that MLX keeps with 1 added. moved: MLX's prefix."""
    inside = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    names = ("model.norm.weight", *(f"{LAYER}{norm}.weight" for norm in inside))
    return tuple(Rule(name, (f"{moved}{name}",), plus=1.0) for name in names)


PREFIXED = tuple(Rule(f"{part}.{{s}}", (f"{MOVED}{part}.{{s}}",)) for part in ("model", "lm_head"))
# Where transformers has a text part in memory, when its files call it language_model.model or model.
IN_MEMORY = ((f"{MOVED}model.{{s}}", f"model.{MOVED}{{s}}"), (f"{MOVED}lm_head", "lm_head"))
# A vision model whose text part alone is in MLX, under the same names; in memory transformers has others.
VISION = Layout(modules=IN_MEMORY, dropped=("vision_tower.", "multi_modal_projector."), tower="vision_tower.")
QWEN2_VL = Layout(PREFIXED, IN_MEMORY, ("visual.",), tower="visual.")


def nested(text: Layout, tower: str, *others: str) -> Layout:
    """A vision model around a text model: model.X is model.language_model.X in HF and language_model.model.X in MLX.
    tower: part of the names of what every such model has beside its text; others: what some have.
    """

    def inside(name: str) -> str:
        return re.sub("^model[.]", f"model.{MOVED}", name)

    def moved(name: str) -> str:
        return name if name.startswith(MOVED) else MOVED + name

    def within(rule: Rule) -> Rule:
        return replace(rule, hf=inside(rule.hf), mlx=tuple(moved(name) for name in rule.mlx))

    def before(rule: Rule) -> Rule:
        return replace(rule, hf=inside(rule.hf), mlx=tuple(inside(name) for name in rule.mlx))

    modules = tuple((moved(ours), inside(theirs)) for ours, theirs in text.modules)
    rules = (*map(within, text.rules), *map(within, PREFIXED))
    return replace(
        text,
        rules=rules,
        modules=modules,
        dropped=(*text.dropped, tower, *others),
        early=tuple(map(before, text.early)),
        tower=tower,
    )


def llama4(prefix: str = "", **others: Any) -> Layout:
    """prefix: of HF's names."""
    block = f"{LAYER}feed_forward."
    e, to = f"{prefix}{block}experts.", f"{MOVED}{block}experts."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{to}gate_proj.weight", f"{to}up_proj.weight"), "halves", axes=(0, 2, 1)),
        turned(f"{e}down_proj", f"{to}down_proj.weight"),
        *(() if prefix else PREFIXED),
    )
    early = () if prefix else rules
    return Layout(rules, ((f"{MOVED}{block}router", f"{prefix}{block}router:weight"),), early=early, **others)


def fused(early: tuple[Rule, ...] = (), axes: tuple[int, ...] = ()) -> Layout:
    """Experts as transformers has them in memory too: gate_up_proj and down_proj, [E, 2f, H] and [E, H, f]. axes: where
    the files have them otherwise.
    """
    e, to = f"{LAYER}mlp.experts.", f"{LAYER}mlp.switch_mlp."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{to}gate_proj.weight", f"{to}up_proj.weight"), "halves", axes=axes),
        Rule(f"{e}down_proj", (f"{to}down_proj.weight",), axes=axes),
    )
    return replace(moe(names=(), rules=rules), early=early)


def qwen3_5_moe() -> Layout:
    # Published files have fused experts, which mlx-lm reads; transformers saves them one by one.
    early = tuple(
        Rule(f"{LAYER}mlp.experts.{{e}}.{name}.weight", (f"{MOVED}{LAYER}mlp.switch_mlp.{name}.weight",), "stack")
        for name in PARTS
    )
    whole = fused(early)
    moved = tuple(replace(rule, mlx=tuple(MOVED + name for name in rule.mlx)) for rule in whole.rules)
    modules = tuple((MOVED + ours, theirs) for ours, theirs in whole.modules)
    return replace(QWEN3_5, rules=(*moved, *QWEN3_5.rules), modules=modules, early=early)


def qwen3_vl_moe() -> Layout:
    # Published files have [E, H, 2f], transformers saves [E, 2f, H]: like it, we tell them by the model's width.
    layout = fused(axes=(0, 2, 1))
    gate_up, down = layout.rules
    early = (replace(gate_up, width_axis=-1), replace(down, width_axis=-2))
    return replace(layout, early=early)


def gemma4() -> Layout:
    e = f"{LAYER}experts."
    to = f"{e}switch_glu."
    rules = (
        Rule(f"{e}gate_up_proj", (f"{to}gate_proj.weight", f"{to}up_proj.weight"), "halves"),
        Rule(f"{e}down_proj", (f"{to}down_proj.weight",)),
    )
    halves = tuple((f"{to}{half}_proj", f"{LAYER}experts:gate_up_proj#{half}") for half in ("gate", "up"))
    return Layout(rules, (*halves, (f"{to}down_proj", f"{LAYER}experts:down_proj")))


def granitemoehybrid(with_experts: bool = False) -> Layout:
    """with_experts: of a model whose shared layer stays what it is in MLX; the layer of the dense ones is another."""
    if with_experts:
        return granitemoe(conv("conv1d"))
    shared, mlp = f"{LAYER}shared_mlp.", f"{LAYER}mlp."  # the dense models' only feed-forward layer
    dense = (
        Rule(f"{shared}input_linear.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "halves"),
        Rule(f"{shared}output_linear.weight", (f"{mlp}down_proj.weight",)),
    )
    layout = granitemoe(*dense, conv("conv1d"))
    down = (f"{mlp}down_proj", f"{shared}output_linear")
    return replace(layout, modules=(down, *layout.modules), not_in_peft=(".mlp.gate_proj", ".mlp.up_proj"))


def nemotron_h() -> Layout:
    mixer = "backbone.layers.{n}.mixer."
    stacked = tuple(
        Rule(f"{mixer}experts.{{e}}.{theirs}.weight", (f"{mixer}switch_mlp.{ours}.weight",), "stack")
        for theirs, ours in (("up_proj", "fc1"), ("down_proj", "fc2"))
    )
    modules = ((f"{mixer}gate", "model.layers.{n}.mixer.gate:weight"), ("backbone.{s}", "model.{s}"))
    return Layout((*stacked, conv("conv1d")), modules, ("mtp.",), not_in_peft=(".fc1", ".fc2", ".out_proj"))


def laguna() -> Layout:
    router = (
        Rule(f"{LAYER}mlp.gate.weight", (f"{LAYER}mlp.gate.proj.weight",)),
        Rule(f"{LAYER}mlp.experts.e_score_correction_bias", (f"{LAYER}mlp.gate.e_score_correction_bias",)),
    )
    # PEFT renames keys as transformers does when it loads, and garbles what is already named as in memory.
    garbled = tuple(f".shared_expert.{name}" for name in PARTS)
    return replace(moe(router=("mlp.gate.proj", "mlp.gate"), rules=router), not_in_peft=garbled)


def nanochat() -> Layout:
    to = "transformer.h.{n}."
    attention = zip(("q_proj", "k_proj", "v_proj", "o_proj"), ("c_q", "c_k", "c_v", "c_proj"), strict=True)
    rules = (
        Rule("model.embed_tokens.weight", ("transformer.wte.weight",)),
        *(Rule(f"{LAYER}self_attn.{hf}.weight", (f"{to}attn.{mlx}.weight",)) for hf, mlx in attention),
        Rule(f"{LAYER}mlp.fc1.weight", (f"{to}mlp.c_fc.weight",)),
        Rule(f"{LAYER}mlp.fc2.weight", (f"{to}mlp.c_proj.weight",)),
    )
    return Layout(rules, early=rules)


def olmo_hybrid() -> Layout:
    # transformers reads both spellings of the norms; mlx-lm reads its names in memory.
    early = (
        Rule(f"{LAYER}attention_layer_norm.weight", (f"{LAYER}input_layernorm.weight",)),
        Rule(f"{LAYER}feedforward_layer_norm.weight", (f"{LAYER}post_attention_layernorm.weight",)),
    )
    return Layout(tuple(conv(f"linear_attn.{letter}_conv1d") for letter in "qkv"), early=early)


def exaone() -> Layout:
    ours, theirs = "transformer.h.{n}.", LAYER
    return Layout(
        modules=(
            (f"{ours}attn.attention.out_proj", f"{theirs}self_attn.o_proj"),
            (f"{ours}attn.attention.{{s}}", f"{theirs}self_attn.{{s}}"),
            (f"{ours}mlp.c_fc_0", f"{theirs}mlp.gate_proj"),
            (f"{ours}mlp.c_fc_1", f"{theirs}mlp.up_proj"),
            (f"{ours}mlp.c_proj", f"{theirs}mlp.down_proj"),
            (f"{ours}ln_1", f"{theirs}input_layernorm"),
            (f"{ours}ln_2", f"{theirs}post_attention_layernorm"),
            ("transformer.wte", "model.embed_tokens"),
            ("transformer.ln_f", "model.norm"),
        )
    )


def exaone_moe() -> Layout:
    mlp = f"{LAYER}mlp."
    return moe(
        rules=(Rule(f"{mlp}e_score_correction_bias", (f"{mlp}gate.e_score_correction_bias",)),), dropped=("mtp.",)
    )


def gpt2() -> Layout:
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = (turned(f"transformer.h.{{n}}.{n}.weight", f"model.h.{{n}}.{n}.weight", (1, 0)) for n in names)
    # mlx-lm turns and prefixes them itself, from the names that older checkpoints have.
    return Layout((*matrices, Rule("transformer.{s}", ("model.{s}",))), early=(Rule("transformer.{s}", ("{s}",)),))


GPT_NEOX = Layout(
    (
        Rule("gpt_neox.layers.{s}", ("model.h.{s}",)),
        Rule("embed_out.weight", ("model.embed_out.weight",)),
        Rule("gpt_neox.{s}", ("model.{s}",)),
    ),
    (("model.embed_out", "lm_head"),),
)
APERTUS = Layout(tuple(Rule(f"{{s}}.alpha_{sign}", (f"{{s}}.alpha_{sign}",), "number") for sign in "pn"))
CONV = Layout((conv("conv1d"),))
QWEN3_5 = Layout(
    (*shifted(MOVED), turned("model.{s}.conv1d.weight", f"{MOVED}model.{{s}}.conv1d.weight"), *PREFIXED),
    dropped=("mtp.",),
)
# What Gemma's vision models have beside their text: images, and in some sound.
GEMMA_TOWERS = ("vision_tower.", "audio_tower.", "embed_audio.", "vision_embedder.")
GEMMA3N = (Rule("model.{s}", (f"model.{MOVED}{{s}}",)),)
MUSE_GLIMMER = Layout(
    (Rule(f"model.{MOVED}{{s}}", ("model.{s}",)),),
    dropped=("vision_tower.", "vision_adapter.", "vision_projection."),
    tower="vision_tower.",
)
GPTJ = Layout((Rule("transformer.{s}", ("model.{s}",)),))
