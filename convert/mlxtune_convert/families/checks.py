"""Settings that mlx-lm's models of several families do not heed: each check says which, or ""."""

from __future__ import annotations

from mlxtune_convert.families.family import Config

BOTH_KINDS = ("sliding_attention", "full_attention")


def regular_windows(config: Config) -> str:
    """mlx-lm counts: after every n-1 layers with a window one sees all."""
    layers = config.get("layer_types")
    if not isinstance(layers, list) or "full_attention" not in layers:
        return ""
    nth = layers.index("full_attention") + 1
    regular = ["full_attention" if number % nth == 0 else "sliding_attention" for number in range(1, len(layers) + 1)]
    if layers == regular:
        return ""
    return f"mlx-lm lets every {nth}th layer see all of a row, the configuration has another order"


def heads_share_the_width(config: Config) -> str:
    """mlx-lm has no head_dim of its own for the family."""
    width, heads = config.get("head_dim"), config.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or width * heads == config.get("hidden_size"):
        return ""
    return f"mlx-lm's heads are hidden_size / num_attention_heads wide, the configuration says {width}"


def groups_of_experts(config: Config) -> str:
    """Routers that choose some groups of experts, and experts out of those."""
    chosen, experts = config.get("num_experts_per_tok"), config.get("n_routed_experts")
    groups, kept = config.get("n_group"), config.get("topk_group")
    if chosen == 1 and config.get("norm_topk_prob", True):
        return "mlx-lm does not normalise the weight of a single expert, transformers does"
    if not (isinstance(chosen, int) and isinstance(experts, int) and isinstance(kept, int) and isinstance(groups, int)):
        return ""
    if chosen > experts // max(groups, 1) * kept:
        return "more experts are chosen than the kept groups hold: mlx-lm takes others than transformers"
    return ""
