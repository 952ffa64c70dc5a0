"""How much memory a run will need, before it begins: from the graphs of its blocks, the widest batches and the options.

The blocks tell what they keep for the backward pass (`blocks`). On top comes the largest of several moments. A model of
three blocks, each of which keeps 100 MB for its backward pass and needs 30 MB on the way:

    forward through block 1, 2, 3      0 + 130, 100 + 130, 200 + 130
    a chunk of the head                300 + 40 (its logits)
    backward through block 3, 2, 1     300 + 30, 200 + 30, 100 + 30
    the optimizer's update             nothing is kept any more; old and new state are both alive

So the peak is 340 MB, beside weights, adapter and optimizer. `predict` makes a list of the moments and takes the
largest. Where blocks are checkpointed each keeps its input alone, say 5 MB, and the peak is in one block's backward
pass, which computes everything again: 15 + 130 or so.

What is left out, for it gives way: MLX's cache of free buffers, emptied before an allocation would pass 95% of the
working set (mlx/backend/metal/allocator.cpp, malloc); and what waits for up to ten command buffers of a
GPU, for evaluation stops for them as soon as the memory limit is passed (mlx/transforms.cpp, eval_impl).

Legend: B rows, T tokens, N targets, C rows of a chunk, D width, V vocabulary; all sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn
from mlxtune_convert.sizes import size

from mlxtune.adapter import attach
from mlxtune.adapter.layers import EMBEDDING, dense_shape
from mlxtune.adapter.plan import block_paths, outside_blocks
from mlxtune.compute.memory import blocks, head_chunk, in_pieces
from mlxtune.compute.memory.block_call import Cost
from mlxtune.compute.memory.in_pieces import WholePass
from mlxtune.compute.memory.step import FULL, Moment, RunOptions, StepSizes
from mlxtune.compute.prefix import as_computed, is_simple
from mlxtune.data.dataset.forest import Forest
from mlxtune.model import linux_cpu
from mlxtune.model.arrays import named

# In units of what trains: AdamW's two moments and the gradients stay; at the update the next values and moments come,
# while the ones before are kept for the case that the step fails (`train.last_whole`).
MOMENTS, GRADIENTS, NEXT_STATE = 2, 1, 3
# Of what the second of two branches needs that go back through a block at once, measured on the CPU.
AT_ONCE = 0.5
# Passes whose gradients wait to be added up, at most, measured on the CPU with forests of 2 to 16 passes.
NOT_ADDED_YET = 4
# MLX's CPU code unpacks a quantized matrix in several steps, twice for a chunk of the head: forward and backward.
DENSE_COPIES = 4
# A compiled signature, measured on Qwen3's shape (12 blocks): host memory a block; small arrays a block, each a buffer.
GRAPH_BYTES, SCALARS = 500_000, 118
BUFFERS = 499_000  # that Metal gives a process
GRAPH_SHARE = 0.01  # of the machine's memory, that compiled signatures may take
LEAST_KEPT = 4  # compiled signatures, however little memory there is: fewer would be compiled again and again


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them at the predicted peak; `total` is the peak. What belongs to another moment is 0."""

    weights: int  # of the base
    adapter: int  # what trains
    optimizer: int  # two moments and the gradients
    activations: int  # what blocks keep, and need where the peak is in one
    head_chunk: int  # the logits of a chunk, and the hidden rows that go with them
    dense_copies: int  # of quantized matrices, on the CPU
    update: int  # the next adapter and moments, where the peak is there
    trunk_cache: int = 0  # states of rows that are kept in memory
    graphs: int = 0  # compiled graphs, in the host's memory, so not in the total
    by_token: bool = False  # some blocks go token by token

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of."""
        parts = dict(vars(self))
        del parts["graphs"], parts["by_token"]
        return parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """For people."""
        parts = self.parts
        most = max(parts, key=lambda name: parts[name])
        why = ""
        if self.by_token and most == "activations":
            why = " (some of its blocks are computed token by token)"
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
    """In place of a prediction."""

    reason: str  # what could not be followed, for people

    @property
    def note(self) -> str:
        return f"the memory of this model is not predicted: {self.reason}"


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
    if not sizes["hidden_size"] or not sizes.get("vocab_size"):
        return None
    return sizes


def predict(
    model: nn.Module, config: Mapping[str, Any], shape: StepSizes, options: RunOptions
) -> Memory | NotPredicted:
    """The plan for one model with its adapter attached; no weight is read. config: its config.json."""
    sizes = sizes_of(config)
    if sizes is None:
        return NotPredicted("its config.json does not say how wide it is")
    try:
        if shape.forest is not None:
            shape = replace(shape, forest=as_computed(model, shape.forest))
        calls, in_parts, by_token = list[list[Cost]](), list[list[WholePass]](), False
        if options.tokens:
            in_parts = _in_pieces(model, shape, options, sizes["hidden_size"])
        else:
            calls, by_token = _costs(model, shape, options)
    except Exception as error:  # whatever a model's own code raises
        lines = str(error).splitlines() or [""]
        return NotPredicted(f"{type(error).__name__}: {lines[0]}")
    trainable = sum(array.nbytes for array in named(model.trainable_parameters()).values())
    moments = [Moment(), *_in_blocks_and_head(model, calls, in_parts, shape, options, sizes)]
    if options.updates:
        moments.append(Moment(update=NEXT_STATE * trainable))
    peak = max(moments, key=sum)
    graphs = 0
    if options.compiled:
        graphs = kept_signatures(len(calls), options.ram) * graph_bytes(len(calls))
    return Memory(
        weights=sum(array.nbytes for array in named(model.parameters()).values()) - trainable,
        adapter=trainable,
        optimizer=(MOMENTS + GRADIENTS + int(options.accumulated)) * trainable,  # the sum of the gradients so far
        activations=peak.activations,
        head_chunk=peak.head_chunk,
        dense_copies=peak.dense_copies,
        update=peak.update,
        graphs=graphs,
        by_token=by_token,
    )


def _in_blocks_and_head(
    model: nn.Module,
    calls: list[list[Cost]],
    in_parts: list[list[WholePass]],
    shape: StepSizes,
    options: RunOptions,
    sizes: Mapping[str, Any],
) -> Iterator[Moment]:
    """Every block on its way forward and back, then a chunk of the head. calls: what the calls of each block cost;
    in_parts: the same where they are computed in pieces; one of the two is empty.
    """
    width = sizes["hidden_size"]
    in_head, in_block = 0, 0
    if options.device.kind == "cpu":
        in_head, in_block = _dense(model, sizes["vocab_size"])
    held = options.item * shape.tokens * width  # the embeddings, which the first block keeps
    if options.frozen:
        held = options.item * shape.rows * shape.width * width  # the states, of all rows' tokens
    if options.device.powers and shape.width <= linux_cpu.SQUARE:
        held += FULL * shape.width**2  # the causal mask, which `linux_cpu` keeps at hand
    if options.tokens:
        yield from in_pieces.moments(in_parts, shape.passes, held, options, in_block)
        held += in_pieces.kept(in_parts, shape.passes, options)
    for place, costs in enumerate(calls):
        before = held
        forward = max((cost.forward for cost in costs), default=0)
        if place < options.frozen:  # for one row, after which the states of all are joined
            yield Moment(activations=before + max(forward, before), dense_copies=in_block)
            continue
        several = _gradients_of_trunks(costs, shape.passes) + _gradients_of_passes(model.layers[place], costs)
        yield Moment(activations=before + forward, dense_copies=in_block)
        if options.recompute and place % options.recompute == 0:  # it is checkpointed
            held += sum(cost.given for cost in costs)
            backward = before + several + _in_turns(costs, options) + _of_block_behind(calls, place, options)
        else:
            held += sum(cost.kept for cost in costs)
            backward = held + several + _at_once([_back(cost, cost.back, options) for cost in costs], shape.passes)
        yield Moment(activations=backward, dense_copies=in_block)
    chunk = head_chunk.needed(model, sizes, shape, options)
    yield Moment(activations=held, head_chunk=chunk, dense_copies=in_head)


def _in_turns(costs: list[Cost], options: RunOptions) -> int:
    """The most bytes at a time that the passes need on their way back through one checkpointed block. costs: of the
    block's calls, one for each pass; there may be none.

    One pass after the other is computed again (`checkpointing.Turns`). Of all others the gradients of their results
    wait, or those of their inputs are there already, which are as large.
    """
    results = sum(cost.given - cost.recorded for cost in costs)
    needed = [_back(cost, cost.again, options) - (cost.given - cost.recorded) for cost in costs]
    return results + max(needed, default=0)


def _of_block_behind(calls: list[list[Cost]], place: int, options: RunOptions) -> int:
    """The bytes that the block behind a checkpointed one still needs on its way back, where it keeps its activations:
    MLX begins to compute the checkpointed one again before the other is done.

    How much of it is still there differs from model to model (measured: none to all of it), so all is counted: with
    `train.checkpoint_layers: n` a prediction may be a fifth too high, but not too low.
    """
    if options.recompute == 1 or place + 1 >= len(calls):
        return 0
    return max((_back(cost, cost.back, options) for cost in calls[place + 1]), default=0)


def _at_once(going_back: list[int], passes: Forest) -> int:
    """The most bytes at a time that the passes need on their way back through a block that is not checkpointed, of what
    each needs: branches do not wait for each other, and MLX comes to two of them at once, though not where both need
    most.
    """
    leaving = []
    for needed, each in zip(going_back, passes.passes, strict=False):  # a block that is never called needs nothing
        if each.leaves is not None and not each.is_trunk:
            leaving.append(needed)
    leaving.sort(reverse=True)
    together = sum(leaving[:1]) + int(AT_ONCE * sum(leaving[1:2]))
    return max(max(going_back, default=0), together)


def _gradients_of_trunks(costs: list[Cost], passes: Forest) -> int:
    """Bytes of what the branches of a forest give back to their trunks' keys and values in one block: all of it is
    there before it is added up, of each branch as much as the whole trunk has.

    costs: of the block's calls, one for each pass.
    """
    return sum(costs[each.leaves].recorded for each in passes.passes if each.leaves is not None)


def _gradients_of_passes(block: nn.Module, costs: list[Cost]) -> int:
    """Bytes of the gradients of what trains in a block, one for each pass until they are added up; without those of one
    pass, which are counted with the optimizer. costs: of the block's calls, one for each pass.
    """
    trainable = sum(array.nbytes for array in named(block.trainable_parameters()).values())
    return min(max(0, len(costs) - 1), NOT_ADDED_YET) * trainable


def _back(cost: Cost, traced: int, options: RunOptions) -> int:
    """Bytes of a block's backward pass; traced: by its graph.

    Where slices of its arrays are many, a compiled graph holds the gradients of all of them before it adds any
    (measured with mx.compile on the CPU), an eager one on the CPU few. What was published of GPUs lies between: there
    all are counted.
    """
    if options.device.kind == "cpu" and not options.compiled:
        return traced
    return max(traced, cost.slices + cost.given)


def _costs(model: nn.Module, shape: StepSizes, options: RunOptions) -> tuple[list[list[Cost]], bool]:
    """What the calls of each block cost, as `blocks.costs` says it. With dropout its masks are in the graphs too."""
    adapted = list(attach.adapted_layers(model).values())
    keys = None
    if adapted and options.dropout:
        keys = adapted[0]._dropout
    if keys is not None:
        keys.set(0, 0, range(shape.rows), [shape.width] * shape.rows, len(adapted))
    last_whole = bool(options.recompute) and (len(model.layers) - 1) % options.recompute == 0
    at_the_end = "last_block" in options.device.parts and is_simple(shape.passes)
    targets = shape.targets if at_the_end else 0
    try:
        return blocks.costs(model, shape.passes, _reached(model), options.device, last_whole, targets, options.frozen)
    finally:
        if keys is not None:
            keys.clear()


def _in_pieces(model: nn.Module, shape: StepSizes, options: RunOptions, width: int) -> list[list[WholePass]]:
    """Of each block what its passes need that are computed in pieces."""
    of_passes = []
    for each in shape.passes.passes:
        before_last = in_pieces.before_last_piece(shape, each, options)
        calls, _ = _costs(model, before_last, options)
        of_passes.append([in_pieces.whole_pass(of_block, before_last, each, options, width) for of_block in calls])
    return [list(block) for block in zip(*of_passes, strict=True)]


def _reached(model: nn.Module) -> list[bool]:
    """For each block, whether a gradient is wanted for its input: something before it trains."""
    paths = tuple(named(model.trainable_parameters()))
    embeddings = tuple(outside_blocks(model, EMBEDDING))
    reached = any(path.startswith(embeddings) for path in paths)
    reached_blocks = []
    for block in block_paths(model):
        reached_blocks.append(reached)
        reached = reached or any(path.startswith(f"{block}.") for path in paths)
    return reached_blocks


def _dense(model: nn.Module, vocabulary: int) -> tuple[int, int]:
    """Bytes of the dense copies of (a quantized head, the largest quantized matrix in the blocks)."""
    head = block = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            *_, outputs, inputs = dense_shape(module)
            copies = DENSE_COPIES * FULL * outputs * inputs
            if outputs == vocabulary:
                head = copies
            else:
                block = max(block, copies)
    return head, block
