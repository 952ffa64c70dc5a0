"""Attention windows that transformers has and mlx-lm's model of the family leaves out.

With a window of 3, position 4 of a row sees these positions (x):

    transformers   . . x x x
    mlx-lm         x x x x x

so a row that is no longer than the window is the same either way. The families are those that mlx-lm runs with full
attention whatever the configuration says (`families.Family.lacks_windows`); it windows the others itself.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask

from mlxtune.model.corrections.families import family_of

ATTENTION = "self_attn"  # name of the attention in a block, in each family that lacks windows


def window(config: Any, layer: int) -> int | None:
    """How many positions, its own included, a position of this layer sees, where mlx-lm lets it see all; else None.

    config: transformers' configuration object, of the text part.
    """
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not family_of(config.model_type).lacks_windows or not size:
        return None
    return int(size) if not kinds or kinds[layer] == "sliding_attention" else None


def add(attention: nn.Module, size: int) -> None:
    """Let an attention layer, called with x, mask and cache, see `size` positions at most."""
    kind: Any = type(attention)
    form = signature(kind.__call__)

    def call(self: Any, *given: Any, **named: Any) -> mx.array:
        bound = form.bind(self, *given, **named)
        bound.apply_defaults()
        of = bound.arguments
        of["mask"] = narrowed(of["x"], of["mask"], of["cache"], size)
        out: mx.array = kind.__call__(*bound.args, **bound.kwargs)
        return out

    attention.__class__ = type(f"Windowed{kind.__name__}", (kind,), {"__call__": call, "window": size})


def has(attention: nn.Module) -> bool:
    """Whether `add` was applied to a layer."""
    return hasattr(type(attention), "window")


def narrowed(x: mx.array, mask: Any, cache: Any, size: int) -> Any:
    """The mask of a layer with a window. x: [B, T, D]; mask: "causal", None, or true where a position is seen."""
    before, tokens = 0 if cache is None else cache.offset, x.shape[1]
    if before + tokens <= size:
        return mask
    seen = create_causal_mask(tokens, before, window_size=size)
    return mask & seen if isinstance(mask, mx.array) else seen
