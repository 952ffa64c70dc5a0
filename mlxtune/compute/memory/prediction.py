"""How much memory a run will need, before it begins: from the graphs of its blocks, the widest batches and the options.

The blocks tell what they keep for the backward pass (`blocks`). On top comes the largest of several moments: a chunk of
the head, one block's forward or backward pass, or the optimizer's update, where old and new state are both alive.

What is left out, for it gives way: MLX's cache of free buffers, emptied before an allocation would pass 95% of the
working set (mlx/backend/metal/allocator.cpp, malloc); and what waits for up to ten command buffers of a
GPU, for evaluation stops for them as soon as the memory limit is passed (mlx/transforms.cpp, eval_impl).

Legend: B rows, T tokens, D width, V vocabulary; all sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlxtune_convert.sizes import size

from mlxtune.adapter import lora
from mlxtune.adapter.layers import EMBEDDING, dense_shape
from mlxtune.adapter.plan import block_paths, outside_blocks
from mlxtune.compute.memory import blocks
from mlxtune.compute.memory.kernels import Device
from mlxtune.model.arrays import named

FULL = 4  # bytes of a float32
# A compiled signature, measured on Qwen3's shape (12 blocks): host memory a block; small arrays a block, each a buffer.
GRAPH_BYTES, SCALARS = 500_000, 118
BUFFERS = 499_000  # that Metal gives a process
GRAPH_SHARE = 0.01  # of the machine's memory
LEAST_KEPT = 4


@dataclass(frozen=True)
class Shape:
    """The micro-batch that decides a model's memory. rows, width: of the tokens that the model is given; prefix: how
    many of each row are shared and computed once; targets: its supervised tokens.
    """

    rows: int
    width: int
    prefix: int
    targets: int


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them at the predicted peak; `total` is the peak. What belongs to another moment is 0.

    graphs: of compiled graphs, in the host's memory, not in the total; by_token: some blocks go token by token.
    """

    weights: int
    adapter: int
    optimizer: int  # two moments and the gradients
    activations: int  # what blocks keep, and need where the peak is in one
    head_chunk: int
    dense_copies: int  # of quantized matrices, on the CPU
    update: int  # the next adapter and moments, where the peak is there
    graphs: int = 0
    by_token: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of."""
        return {name: value for name, value in vars(self).items() if name not in ("graphs", "by_token")}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """For people."""
        parts = self.parts
        most = max(parts, key=lambda name: parts[name])
        why = " (some of its blocks are computed token by token)" if self.by_token and most == "activations" else ""
        shown = ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in parts.items())
        lines = [
            f"memory: {size(self.total)} predicted at the peak, most of it {most.replace('_', ' ')}{why}",
            f"  {shown}",
        ]
        if self.graphs:
            lines.append(f"  beside it, in the host's memory: compiled graphs, up to {size(self.graphs)}")
        return lines


@dataclass(frozen=True)
class NotPredicted:
    """In place of a prediction. reason: what could not be followed."""

    reason: str

    @property
    def note(self) -> str:
        return f"the memory of this model is not predicted: {self.reason}"


@dataclass(frozen=True)
class Options:
    """What of a run decides its memory. item: bytes of an activation; chunk: rows of a chunk of the head, 0: logits
    are computed for every token; recompute: every n-th block is checkpointed, 0: none; dropout: lora.dropout; device:
    what computes; compiled: as one graph; accumulated: gradients are summed over several micro-batches; ram: the
    machine's memory, which bounds how many compiled graphs are kept; updates: whether the optimizer's update follows.
    """

    item: int
    chunk: int
    recompute: int
    dropout: float
    device: Device
    compiled: bool = False
    accumulated: bool = False
    ram: int = 0
    updates: bool = True


def graph_bytes(count: int) -> int:
    """Host memory of one compiled signature of a model with `count` blocks."""
    return GRAPH_BYTES * count


def kept_signatures(count: int, ram: int) -> int:
    """How many compiled signatures of a model with `count` blocks are kept, on a machine with `ram` bytes.

    Together they take 1% of the memory, and half of the buffers that Metal allows a process, at most.
    """
    by_bytes = int(GRAPH_SHARE * ram / graph_bytes(count))
    by_buffers = BUFFERS // (2 * SCALARS * count)
    return max(LEAST_KEPT, min(by_bytes, by_buffers))


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config.json with its text_config unfolded; None when it does not say how wide the model and its head are."""
    sizes = {**config, **config.get("text_config", {})}
    sizes["hidden_size"] = sizes.get("hidden_size") or sizes.get("n_embd") or sizes.get("d_model")
    return sizes if sizes["hidden_size"] and sizes.get("vocab_size") else None


def predict(model: nn.Module, config: Mapping[str, Any], shape: Shape, options: Options) -> Memory | NotPredicted:
    """The plan for one model with its adapter attached; no weight is read. config: its config.json."""
    sizes = sizes_of(config)
    if sizes is None:
        return NotPredicted("its config.json does not say how wide it is")
    width, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    try:
        calls, by_token = _costs(model, shape, options)
    except Exception as error:  # whatever a model's own code raises
        return NotPredicted(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    tokens = shape.rows * (shape.width - shape.prefix) + shape.prefix
    rows = min(options.chunk, shape.targets) or tokens
    chunk = 4 * rows * vocabulary * FULL + 3 * (shape.targets if options.chunk else tokens) * width * options.item
    in_head, in_block = _dense(model, vocabulary) if options.device.kind == "cpu" else (0, 0)
    # (activations, head chunk, dense copies, update) of every moment
    moments = [(0, 0, 0, 0)]
    held = options.item * tokens * width  # the embeddings, which the first block keeps
    if options.device.powers:
        held += FULL * shape.width**2  # the causal mask, which `exponentials` keeps at hand
    again = set(range(0, len(calls), options.recompute)) if options.recompute else set()
    for place, costs in enumerate(calls):
        before = held
        held += sum(cost.given if place in again else cost.kept for cost in costs)
        moments.append((before + max((cost.forward for cost in costs), default=0), 0, in_block, 0))
        if place in again:
            moments.append(
                (before + max((_back(cost, cost.again, options) for cost in costs), default=0), 0, in_block, 0)
            )
        else:
            moments.append((held + max((_back(cost, cost.back, options) for cost in costs), default=0), 0, in_block, 0))
    moments.append((held, chunk, in_head, 0))
    trainable = sum(array.nbytes for array in named(model.trainable_parameters()).values())
    if options.updates:
        moments.append((0, 0, 0, 3 * trainable))  # the next adapter and moments, while the ones before are kept
    activations, head_chunk, dense, update = max(moments, key=sum)
    return Memory(
        weights=sum(array.nbytes for array in named(model.parameters()).values()) - trainable,
        adapter=trainable,
        optimizer=(4 if options.accumulated else 3) * trainable,
        activations=activations,
        head_chunk=head_chunk,
        dense_copies=dense,
        update=update,
        graphs=kept_signatures(len(calls), options.ram) * graph_bytes(len(calls)) if options.compiled else 0,
        by_token=by_token,
    )


def _back(cost: blocks.Cost, found: int, options: Options) -> int:
    """A block's backward pass. Where slices of its arrays are many, a compiled graph holds the gradients of all of them
    before it adds any (measured with mx.compile on the CPU), an eager one on the CPU few. What was published of GPUs
    lies between: there all are counted.
    """
    few = options.device.kind == "cpu" and not options.compiled
    return found if few else max(found, cost.slices + cost.given)


def _costs(model: nn.Module, shape: Shape, options: Options) -> tuple[list[list[blocks.Cost]], bool]:
    adapted = list(lora.adapters(model).values())
    keys = adapted[0]._dropout if adapted and options.dropout else None
    if keys is not None:
        keys.set(0, 0, range(shape.rows), [shape.width] * shape.rows, len(adapted))
    try:
        reached, prefix = _reached(model), shape.prefix
        return blocks.costs(model, shape.rows, shape.width, prefix, reached, options.device)
    finally:
        if keys is not None:
            keys.clear()


def _reached(model: nn.Module) -> list[bool]:
    """For each block, whether a gradient is wanted for its input: something before it trains."""
    paths = tuple(named(model.trainable_parameters()))
    embeddings = tuple(outside_blocks(model, EMBEDDING))
    reached = any(path.startswith(embeddings) for path in paths)
    out = []
    for block in block_paths(model):
        out.append(reached)
        reached = reached or any(path.startswith(f"{block}.") for path in paths)
    return out


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
