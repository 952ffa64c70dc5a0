"""IBM's Granite models."""

from __future__ import annotations

from dataclasses import replace

from mlxtune_convert.families.family import Config, ModelFamily
from mlxtune_convert.gguf.family import LOCAL_EXPERTS, entry, experts
from mlxtune_convert.hf.family_rules import LAYER, conv, moe
from mlxtune_convert.hf.rules import Layout, Rule

_SCALES = (
    "attention.scale=attention_multiplier embedding_scale=embedding_multiplier residual_scale=residual_multiplier "
    "logit_scale=logits_scaling"
)
_LAYER_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers' word -> Granite's own


def _with_experts(*more: Rule) -> Layout:
    place = f"{LAYER}block_sparse_moe."
    halves = (f"{place}switch_mlp.gate_proj.weight", f"{place}switch_mlp.up_proj.weight")
    rules = (
        Rule(f"{place}input_linear.weight", halves, "halves"),
        Rule(f"{place}output_linear.weight", (f"{place}switch_mlp.down_proj.weight",)),
        *more,
    )
    router = ("block_sparse_moe.router.layer", "block_sparse_moe.router")
    return moe("block_sparse_moe", (), router, "block_sparse_moe.experts", rules)


def _hybrid_dense() -> Layout:
    """Models without experts: their only feed-forward layer is called the shared one in HF, and joins gate and up."""
    shared, mlp = f"{LAYER}shared_mlp.", f"{LAYER}mlp."
    dense = (
        Rule(f"{shared}input_linear.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "halves"),
        Rule(f"{shared}output_linear.weight", (f"{mlp}down_proj.weight",)),
    )
    layout = _with_experts(*dense, conv("conv1d"))
    down = (f"{mlp}down_proj", f"{shared}output_linear")
    return replace(layout, modules=(down, *layout.modules), not_in_peft=(".mlp.gate_proj", ".mlp.up_proj"))


_HYBRID_DENSE = _hybrid_dense()
_HYBRID_EXPERTS = _with_experts(conv("conv1d"))  # their shared layer stays what it is in MLX


def _hybrid(config: Config) -> Layout:
    return _HYBRID_EXPERTS if config.get("num_local_experts") else _HYBRID_DENSE


def _hybrid_config(config: Config) -> None:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        config["layer_types"] = [_LAYER_KINDS.get(str(kind), kind) for kind in kinds]
    if config.get("num_local_experts") == 0:
        # A dense model has the shared layer alone; mlx-lm reads its width from another key.
        config["intermediate_size"] = config.get("shared_intermediate_size", config.get("intermediate_size"))


FAMILIES = {
    "granite": ModelFamily(
        hf=Layout(),
        gguf=entry("granite", "Granite", "granite", keys=_SCALES, permuted=True),
        any_activation=True,
    ),
    "granitemoe": ModelFamily(
        hf=_with_experts(),
        gguf=entry(
            "granitemoe",
            "GraniteMoe",
            "granitemoe",
            experts("block_sparse_moe", "router.layer"),
            f"{_SCALES} {LOCAL_EXPERTS}",
            permuted=True,
        ),
        any_activation=True,
    ),
    "granitemoehybrid": ModelFamily(hf=_HYBRID_DENSE, hf_of=_hybrid, config_first=_hybrid_config),
}
