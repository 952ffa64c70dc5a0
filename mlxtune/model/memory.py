"""How much memory a run will need, before it begins: from the model's shapes, the widest batches and the options.

What a block keeps for the backward pass was counted on MLX's own gradients (arrays alive after the forward pass): of a
token, three times the width, three times the queries, twice the keys and values, five times the feed-forward width
(gate, its sigmoid, their product, up, and what goes down), and a row of attention probabilities per head. A
checkpointed block keeps its input. On top comes the larger of two moments: a chunk of the head, or one block's
backward pass.

Legend: B rows, T tokens, D width, V vocabulary, r rank; all sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.nn as nn

from mlxtune.model import lora
from mlxtune.model.arrays import named
from mlxtune.model.layers import dense_shape

FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory. tokens: processed by the trunk for one micro-batch; scores: query-key pairs of
    it, per head; targets: its supervised tokens."""

    tokens: int
    scores: int
    targets: int


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them; `total` is the predicted peak."""

    weights: int
    adapter: int
    optimizer: int  # two moments and the gradients
    activations: int
    head_chunk: int
    dense_copies: int  # of quantized matrices, on the CPU

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def lines(self) -> list[str]:
        """For people, in MB."""
        parts = [f"{field.name.replace('_', ' ')} {getattr(self, field.name) / 1e6:,.0f}" for field in fields(self)]
        return [f"memory: {self.total / 1e6:,.0f} MB predicted at the peak", f"  {', '.join(parts)} MB"]


NEEDED = ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")  # of config.json


@dataclass(frozen=True)
class Options:
    """What of a run decides its memory. item: bytes of an activation; chunk: rows of a chunk of the head, 0: logits
    are computed for every token; recompute: every n-th block is checkpointed, 0: none; on_cpu: quantized matrices are
    made dense for their products."""

    item: int
    chunk: int
    recompute: int
    dropout: bool
    on_cpu: bool


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config.json with its text_config unfolded; None when it does not describe blocks of attention and MLP."""
    sizes = {**config, **config.get("text_config", {})}
    return sizes if all(sizes.get(key) for key in NEEDED) else None


def predict(model: nn.Module, config: Mapping[str, Any], shape: Shape, options: Options) -> Memory:
    """The plan for one model with its adapter attached; no weight is read. config: its config.json, with sizes."""
    sizes = sizes_of(config)
    assert sizes is not None
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head = sizes.get("head_dim") or width // heads
    query, pair = heads * head, (sizes.get("num_key_value_heads") or heads) * head
    wide = sizes.get("moe_intermediate_size") or sizes["intermediate_size"]
    wide *= sizes.get("num_experts_per_tok") or 1
    blocks = len(model.layers)
    adapted = list(lora.adapters(model).values())
    ranks = sum(layer.lora_a.shape[-1] for layer in adapted) // blocks
    dropped = sum(dense_shape(layer.linear)[-1] for layer in adapted) // blocks if options.dropout else 0

    norms = [module.weight.size for _, module in model.layers[0].named_modules() if list(module) == ["weight"]]
    norms = [size for size in norms if size in (width, head, query, pair)]
    kept = (3 + max(0, norms.count(width) - 2)) * width + 3 * query + 2 * pair + ranks
    if options.dropout:  # of every adapted input a mask and the masked input, instead of the input itself
        kept += 2 * dropped - 2 * width - query - wide
    kept += (query + pair) * (len(norms) > norms.count(width))  # norms of queries and keys
    kept += (7 if "gelu" in str(sizes.get("hidden_activation") or sizes.get("hidden_act")) else 5) * wide
    block = options.item * (shape.tokens * kept + shape.scores * heads)
    # Going back through a block: gradients of its widest arrays beside what it kept, and three copies of its scores.
    back = options.item * (shape.tokens * (3 * wide + 2 * width) + 3 * shape.scores * heads)
    again = len(range(0, blocks, options.recompute)) if options.recompute else 0
    held = (blocks - again) * block + again * options.item * shape.tokens * width
    vocabulary = sizes["vocab_size"]
    rows = min(options.chunk, shape.targets) or shape.tokens
    chunk = 4 * rows * vocabulary * FULL
    chunk += 3 * (shape.targets if options.chunk else shape.tokens) * width * options.item
    trainable = sum(array.nbytes for array in named(model.trainable_parameters()).values())
    in_head, in_block = _dense(model, vocabulary) if options.on_cpu else (0, 0)
    going_back = back + (block if again else 0)
    at_head = chunk + in_head >= going_back + in_block
    return Memory(
        weights=sum(array.nbytes for array in named(model.parameters()).values()) - trainable,
        adapter=trainable,
        optimizer=3 * trainable,
        activations=held + (0 if at_head else going_back),
        head_chunk=chunk if at_head else 0,
        dense_copies=in_head if at_head else in_block,
    )


def _dense(model: nn.Module, vocabulary: int) -> tuple[int, int]:
    """Bytes of the dense copies of a quantized head and of the largest quantized matrix in the blocks: MLX's CPU code
    unpacks in several steps, twice for a chunk.
    """
    head = block = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            *_, outputs, inputs = dense_shape(module)
            if outputs == vocabulary:
                head = 4 * FULL * outputs * inputs
            else:
                block = max(block, 4 * FULL * outputs * inputs)
    return head, block
