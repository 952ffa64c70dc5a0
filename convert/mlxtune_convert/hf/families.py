"""One table per architecture: its tensors in Hugging Face's files and in MLX's.

Most families have the same names and shapes on both sides. The others differ by stacked experts, a split gate_up, the
axes of a convolution, a prefix, norms that MLX keeps with 1 added, or towers beside their text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.hf import family_rules as make
from mlxtune_convert.hf import unheeded
from mlxtune_convert.hf.rules import Layout

IDENTITY = (
    "llama mistral ministral3 qwen2 qwen3 phi phi3 gemma gemma2 gemma3_text granite cohere cohere2 olmo2 "
    "olmo3 smollm3 starcoder2 stablelm helium seed_oss ernie4_5 glm glm4 gpt_bigcode exaone4 nemotron hunyuan_v1_dense "
    "internlm3 iquestcoder"
)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(IDENTITY.split(), Layout()),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "mellum"), make.moe()),
    **dict.fromkeys(("mamba", "mamba2"), replace(make.CONV, not_in_peft=(".out_proj",))),
    "falcon_mamba": replace(make.CONV, not_in_peft=(".out_proj", ".dt_proj")),
    "apertus": make.APERTUS,
    "mixtral": make.mixtral("mlp.gate"),
    "phimoe": make.mixtral("mlp.router"),
    "granitemoe": make.granitemoe(),
    "gpt_oss": make.gpt_oss(),
    "deepseek_v3": make.deepseek_v3(),
    "glm4_moe": make.moe(dropped=make.MTP),
    "lfm2": Layout((make.conv("conv.conv"),)),
    "lfm2_moe": make.lfm2_moe(),
    "jamba": make.CONV,
    "qwen3_next": make.moe(rules=(make.conv("conv1d"), *make.shifted()), dropped=("mtp.",)),
    "qwen3_5_text": make.QWEN3_5,
    "qwen3_5_moe_text": make.qwen3_5_moe(),
    "qwen3_5": make.nested(make.QWEN3_5, "visual."),
    "qwen3_5_moe": make.nested(make.qwen3_5_moe(), "visual."),
    "qwen3_vl": make.nested(Layout(), "visual."),
    "qwen3_vl_moe": make.nested(make.qwen3_vl_moe(), "visual."),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), make.QWEN2_VL),
    "gemma4_text": make.gemma4(),
    **dict.fromkeys(("gemma4", "gemma4_unified"), make.nested(make.gemma4(), "embed_vision.", *make.GEMMA_TOWERS)),
    "gemma3n_text": Layout(make.GEMMA3N, early=make.GEMMA3N),
    "gemma3n": Layout(dropped=("embed_vision.", *make.GEMMA_TOWERS), tower="embed_vision."),
    **dict.fromkeys(("gemma3", "mistral3", "llava"), make.VISION),
    "llama4_text": make.llama4(),
    "llama4": make.llama4(make.MOVED, dropped=("vision_model.", "multi_modal_projector."), tower="vision_model."),
    "afmoe": make.moe(router=("mlp.router.gate", "mlp.router.gate"), switch="experts"),
    "dots1": make.moe(switch="experts"),
    "exaone": make.exaone(),
    "exaone_moe": make.exaone_moe(),
    "glm4_moe_lite": make.deepseek_v3(),
    "granitemoehybrid": make.granitemoehybrid(),
    "laguna": make.laguna(),
    "minimax_m2": make.mixtral("mlp.gate"),
    "muse_glimmer": make.MUSE_GLIMMER,
    "nanochat": make.nanochat(),
    "nemotron_h": make.nemotron_h(),
    "olmo_hybrid": make.olmo_hybrid(),
    "recurrent_gemma": Layout((make.conv("conv_1d"),)),
    "solar_open": make.moe(dropped=make.MTP),
    "gpt2": make.gpt2(),
    "gpt_neox": make.GPT_NEOX,
    "gptj": make.GPTJ,
}
# Families that both libraries have, and why their models leave as MLX folders only.
NOT_EXPORTED = {
    "bailing_hybrid": "mlx-lm's is Ling with lightning attention, transformers' another model",
    "bitnet": "its weights are ternary codes in mlx-lm, which nothing here trains",
    "dbrx": "mlx-lm takes its stacked experts apart",
    "deepseek_v32": "mlx-lm's indexer chooses other positions than transformers' in rows longer than index_topk",
    "glm_moe_dsa": "mlx-lm's indexer chooses other positions than transformers' in rows longer than index_topk",
    "kimi_k25": "transformers saves its text part under the names of its tower",
    "kimi_linear": "mlx-lm reads the first configurations of the family, not those of transformers",
    "longcat_flash": "mlx-lm reads the first configurations of the family, not those of transformers",
    "mimo_v2_flash": "mlx-lm reads the first configurations of the family, not those of transformers",
    "minicpm3": "mlx-lm reads longrope alone, and gives other logits there than transformers",
    "minimax": "mlx-lm's is MiniMax-M2, transformers' MiniMax-Text-01",
    "minimax_m3_vl": "nobody compared mlx-lm's model with the one in transformers yet",
    "ministral": "mlx-lm has no such model",
    "muse_spark": "mlx-lm joins its projections and stores its norms in another form",
    "olmo": "mlx-lm runs it by the package ai2-olmo, and reads the files of that alone",
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
    if kind == "mistral3" and config.get("text_config", {}).get("model_type") == "mistral4":
        return "mlx-lm's Mistral 4 gives other logits than the one in transformers"
    return unheeded.why(config)


def of(config: dict[str, Any]) -> Layout:
    """The entry of the table for a configuration, whether or not an export can be; an empty one where there is none."""
    kind = str(config.get("model_type"))
    if kind == "granitemoehybrid" and config.get("num_local_experts"):
        return make.granitemoehybrid(with_experts=True)
    return LAYOUTS.get(kind, Layout())


def by_model_type(config: dict[str, Any]) -> Layout:
    """The layout of a config.json. Raises UserError naming why an export cannot be, and what works instead."""
    kind = str(config.get("model_type"))
    why = differs(config)
    if why:
        raise UserError(
            f"models of type {kind} cannot be exported: {why}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )
    if kind in NOT_EXPORTED:
        raise UserError(
            f"models of type {kind} cannot be exported: {NOT_EXPORTED[kind]}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )
    if kind not in LAYOUTS:
        raise UserError(
            f"models of type {kind} cannot be exported yet (covered: {', '.join(sorted(LAYOUTS))})",
            "`mlxtune fuse` makes a merged MLX model of any type.",
        )
    layout = of(config)
    try:
        return replace(layout, dropped=tuple(part.format_map(config) for part in layout.dropped))
    except KeyError as error:
        raise UserError(f"config.json of a model of type {kind} lacks {error}", "Name a whole one.") from error
