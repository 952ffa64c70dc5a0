"""Gemma 3n's later blocks attend to the keys and values of earlier ones.

Example: 4 blocks, the last 2 of which share (num_kv_shared_layers):

    block                  0      1      2          3
    attention              local  full   local      full
    keys and values        own    own    block 0's  block 1's
    mlx-lm without cache   own    own    own        own

mlx-lm hands these on in its cache alone: without one, as in training, every block would use its own, which is another
model. It also insists on the projections that the later blocks do not use; Google's files have them, those that
transformers saves do not.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.model.arrays import named
from mlxtune.model.prefix_cache import PrefixCache

UNUSED = ("k_proj", "v_proj", "k_norm")
NEARLY_ZERO = 1e-12  # its square is a number in float32 and bfloat16


@functools.cache
def _sharing(kind: Any) -> Any:
    class Sharing(kind):
        def __call__(self, inputs: Any = None, cache: Any = None, **others: Any) -> Any:
            if cache is None:
                cache = [PrefixCache() for _ in range(self.first_kv_shared_layer_idx)]
            embeddings = others.pop("input_embeddings", None)
            if embeddings is None:
                embeddings = _not_zero(self.embed_tokens(inputs) * self.hidden_size**0.5)
            return super().__call__(inputs, cache=cache, input_embeddings=embeddings, **others)

    return Sharing


def _not_zero(embeddings: mx.array) -> mx.array:
    """The same, but for rows of zeros (a padding token's), by whose size mlx-lm would divide."""
    empty = (embeddings == 0).all(axis=-1, keepdims=True)
    return mx.where(empty, mx.array(NEARLY_ZERO, embeddings.dtype), embeddings)


def handed_on(model: nn.Module) -> None:
    """Make a Gemma 3n share keys and values without a cache too; leave every other model as it is."""
    text = getattr(getattr(model, "model", None), "language_model", None)
    if text is not None and getattr(text, "first_kv_shared_layer_idx", None) is not None:
        kind: Any = type(text)
        text.__class__ = _sharing(kind)


def with_unused(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights, with zeros of the right shape for what a Gemma 3n's sharing blocks lack and do not use."""
    out = dict(weights)
    for number, block in enumerate(getattr(model, "layers", ())):
        if not shares(block):
            continue
        for name, array in named(block.self_attn.parameters()).items():
            path = f"model.language_model.layers.{number}.self_attn.{name}"
            if name.startswith(UNUSED) and path not in out and path.replace(".weight", ".scales") not in out:
                out[path] = mx.zeros(array.shape, array.dtype)
    return out


def shares(block: nn.Module) -> bool:
    """Whether a block uses the keys and values of an earlier one."""
    return bool(getattr(block.get("self_attn"), "is_kv_shared_layer", False))
