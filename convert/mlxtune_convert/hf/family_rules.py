"""The correspondences of which the families' layouts are made: experts, convolutions, towers, renamed places.

`modules` of a layout say where PEFT finds a layer when transformers has another one in memory than in its files:
experts are there parameters gate_up_proj and down_proj, routers a parameter `weight`.
"""

from __future__ import annotations

import re
from dataclasses import replace

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
    pairs = [
        (f"{stacked}.gate_proj", f"{experts}:gate_up_proj#gate"),
        (f"{stacked}.up_proj", f"{experts}:gate_up_proj#up"),
        (f"{stacked}.down_proj", f"{experts}:down_proj"),
    ]
    # PEFT takes any module of these names in such a family for an expert; as parameters they are what they are.
    for name in PARTS:
        pairs.append((f"{{s}}.{name}", f"{{s}}.{name}:weight"))
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
    """Experts one by one in HF's files, stacked in MLX.

    place: of the experts in a block; names: of gate, up and down in HF, none where `rules` say it; router: in MLX and
    in PEFT; experts: in PEFT; switch: the stack in MLX; rules, modules, dropped: what more the layout has.
    """
    stacked: tuple[Rule, ...] = ()
    if names:
        single = tuple(f"experts.{{e}}.{name}" for name in names)
        together = tuple(f"{switch}.{name}" for name in PARTS)
        stacked = renamed(place, single, together, "stack")
    routers = (f"{LAYER}{router[0]}", f"{LAYER}{router[1]}:weight")
    return Layout((*stacked, *rules), (*modules, routers, *peft_experts(f"{place}.{switch}", experts)), dropped)


def mixtral(router: str) -> Layout:
    return moe("block_sparse_moe", NUMBERED, ("block_sparse_moe.gate", router))


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


CONV = Layout((conv("conv1d"),))
