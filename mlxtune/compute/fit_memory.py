"""A run made to fit the memory: checkpointing first, then smaller micro-batches and more of them in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.sizes import size

from mlxtune.compute import loss, prefix
from mlxtune.compute.fast_ways import every_nth
from mlxtune.compute.loss import Way
from mlxtune.compute.memory import prediction as memory
from mlxtune.compute.memory.kernels import Device
from mlxtune.compute.precision import copies, in_float32
from mlxtune.compute.proof import FEWEST_TOKENS, MAX_TOKENS, Room
from mlxtune.config.resolve import Config, TrainSection
from mlxtune.data.dataset.batches import DEFAULT_ROWS, EVALUATION_TOKENS, Plan, lengths_of
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.arrays import named

PAST_WINDOW = 64  # tokens of the proof's rows beyond a sliding window, where the data has them
PROOF_SHARE = 0.85  # of the run's predicted peak: a prediction may be off by 15%
FULL = mx.float32
SHARE = 0.8  # of the device's working set: the rest is for the system, and for what the plan does not see


@dataclass(frozen=True)
class Given:
    """What a run is made of and its batches cannot change."""

    model: nn.Module  # its adapter attached
    model_config: Mapping[str, Any]  # its normalised config.json
    dtype: mx.Dtype  # of the run's activations
    limit: int | None = None  # bytes of memory that the run may take; None: any
    narrower: str = ""  # the setting that would make activations smaller, as `floats.narrower` names it; "": none


@dataclass(frozen=True)
class Fitted:
    """A run that fits: how it computes its loss, with which batches, and what is known of its memory."""

    way: Way  # with as many blocks checkpointed as fitting it took
    config: Config  # the configuration with the settings that fitting it took
    rows: Plan  # the batches of `config`
    memory: memory.Memory | memory.NotPredicted  # its predicted peak
    notes: list[str]  # what a person must know


def plan(given: Given, way: Way, config: Config, rows: Plan) -> memory.Memory | memory.NotPredicted:
    """The predicted peak of a run that is computed as `way` says."""
    sizes = memory.sizes_of(given.model_config)
    if sizes is None:
        return memory.NotPredicted("its config.json does not say how wide it is")
    shapes = rows.shapes()
    count, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
    targets = max(targets for _, _, targets in shapes)
    options = replace(
        _options(way, sizes, given.dtype),
        dropout=config.lora.dropout,
        accumulated=config.train.accumulate > 1,
        ram=backend.memory_bytes(),
        updates=True,
    )
    return memory.predict(given.model, given.model_config, _shape(way, count, width, targets), options)


def _shape(way: Way, count: int, width: int, targets: int) -> memory.Shape:
    """Of a micro-batch of `count` rows of `width` tokens."""
    shared = way.prefix or 0
    shared = shared if width <= prefix.longest_worth_it(shared, count) else 0
    return memory.Shape(count, width - 1, shared, targets)


def _options(way: Way, sizes: Mapping[str, Any], dtype: mx.Dtype) -> memory.Options:
    return memory.Options(
        item=dtype.size,
        chunk=0 if way.split is None else loss.chunk_rows(sizes["hidden_size"], sizes["vocab_size"]),
        recompute=way.recompute,
        dropout=0.0,
        device=Device.here(fast=way.powers),
        compiled=way.compiled,
        updates=False,
    )


def limit_of(section: TrainSection) -> int | None:
    """train.memory_limit in bytes on this device; None: off."""
    allowed = section.memory_limit
    if allowed == "off":
        return None
    return int(SHARE * backend.working_set_bytes()) if allowed == "auto" else int(allowed)


def fitted(given: Given, way: Way, config: Config, rows: Plan, checkpoints: bool = True) -> Fitted:
    """The run made to fit `given.limit` when it is computed as `way` says. How many blocks are checkpointed is the
    configuration's; checkpoints: whether any may be. A run without a limit, or whose memory cannot be predicted, stays
    as it is.

    Raises UserError, naming the setting to change, when no batch is small enough.
    """
    limit = given.limit
    needed = 0
    for number, section in enumerate(_smaller(config.train, rows.widths[-1], checkpoints)):
        batches = rows if number == 0 else Plan(rows.examples, section, config.data.group_by_prefix)
        if section.batch_tokens != config.train.batch_tokens and batches.rows < len(rows.examples):
            # A row of many examples may fill several budgets, and fills as many more of half the size.
            wanted = rows.rows_per_batch * config.train.accumulate / batches.rows_per_batch
            section = section.model_copy(update={"accumulate": max(1, round(wanted))})
            batches = Plan(rows.examples, section, config.data.group_by_prefix)
        tried = config.model_copy(update={"train": section})
        taken = replace(way, recompute=every_nth(section) if checkpoints else 0)
        predicted = plan(given, taken, tried, batches)
        if isinstance(predicted, memory.NotPredicted):
            idle = f"{predicted.note}; train.memory_limit does nothing"
            return Fitted(taken, config, rows, predicted, [] if limit is None else [idle])
        needed = predicted.total
        if limit is None or needed <= limit:
            return Fitted(taken, tried, batches, predicted, _changed(config.train, section, limit))
    assert limit is not None
    least = "row" if rows.rows == len(rows.examples) else "example"
    fits = _longest_row(given, replace(way, recompute=int(checkpoints)), rows.widths[-1], limit)
    smaller = "a smaller model" if "quantization" in given.model_config else "a smaller or a 4-bit model"
    shorter = f"Lower data.max_tokens to {fits}" if fits else "Lower data.max_tokens"
    raise UserError(
        f"training needs {size(needed)} of memory even with one {least} at a time"
        f"{' and checkpointing' if checkpoints else ''}; train.memory_limit allows {size(limit)}",
        f"{shorter}, take {smaller}, {f'set {given.narrower}, ' if given.narrower else ''}"
        "or set train.memory_limit: off.",
    )


def _changed(asked: TrainSection, taken: TrainSection, limit: int | None) -> list[str]:
    """A note on the settings that were changed to fit, if any were."""
    changed = [f"train.{key}={value}" for key, value in taken.model_dump().items() if value != getattr(asked, key)]
    if limit is None or not changed:
        return []
    return [f"to fit {size(limit)} of memory: {', '.join(changed)}"]


def _longest_row(given: Given, way: Way, width: int, limit: int) -> int:
    """Tokens of a row that fits alone, all of them targets, in halves of `width`; 0: not even FEWEST_TOKENS."""
    sizes = memory.sizes_of(given.model_config)
    while sizes is not None and (width := width // 2) >= FEWEST_TOKENS:
        options = _options(way, sizes, given.dtype)
        found = memory.predict(given.model, given.model_config, _shape(way, 1, width, width), options)
        if isinstance(found, memory.Memory) and found.total <= limit:
            return width
    return 0


def proof_room(given: Given, run: Fitted) -> Room:
    """What a proof may take: no more than the run itself is predicted to, so that the proof is never its peak. First
    blocks are computed again, then the rows are cut.

    Where not even the fewest tokens fit into that in float32, they may take what the limit allows, bytes; else the
    proof is of the run's own type.
    """
    model, model_config, way, limit = given.model, given.model_config, run.way, given.limit
    outside, blocks = copies(model)
    longest = int(lengths_of(run.rows.examples).max())
    window = window_of(model_config)
    most = min(longest, MAX_TOKENS if window >= longest else max(MAX_TOKENS, window + PAST_WINDOW))
    sizes = memory.sizes_of(model_config)
    if sizes is None or isinstance(run.memory, memory.NotPredicted):
        weights = sum(array.nbytes for array in named(model.parameters()).values())
        return Room(most, checkpointed=limit is not None and weights + outside + sum(blocks) > limit)

    def needed(tokens: int, checkpointed: bool) -> float:
        """Of the larger of the two: the plain way on one row, the fast one on both."""
        plain, fast = Way(recompute=int(checkpointed)), replace(way, recompute=way.recompute or int(checkpointed))
        alone = memory.predict(model, model_config, _shape(plain, 1, tokens, tokens), _options(plain, sizes, FULL))
        both = memory.predict(model, model_config, _shape(fast, 2, tokens, 2 * tokens), _options(fast, sizes, FULL))
        if isinstance(alone, memory.NotPredicted) or isinstance(both, memory.NotPredicted):
            return math.inf
        return outside // 2 + max(alone.total, both.total)  # the numbers that were raised stay beside their copies

    with in_float32(model):  # the copies of the blocks are then in their graphs
        tokens = most
        while True:
            for checkpointed in (False, True):
                if needed(tokens, checkpointed) <= PROOF_SHARE * run.memory.total:
                    return Room(tokens, checkpointed)
            if tokens <= FEWEST_TOKENS:
                break
            tokens = max(FEWEST_TOKENS, tokens // 2)
        fits = limit is None or needed(tokens, checkpointed=True) <= limit
    return Room(tokens, checkpointed=True, raised=fits or given.dtype == mx.float32)


def evaluation_tokens(model: nn.Module, way: Way, rows: Plan) -> int:
    """Padded tokens of a batch of an evaluation, so that it takes no more memory than a step.

    It keeps nothing for a backward pass. A step keeps what all blocks need, or where each is computed again, one's.
    """
    largest = max(count * width for count, width, _ in rows.shapes())
    times = 1 if way.recompute == 1 else max(1, len(model.layers) // 2)
    return min(EVALUATION_TOKENS, times * largest)


def window_of(model_config: Mapping[str, Any]) -> int:
    """Tokens that a sliding window sees, by config.json; 0: it has none."""
    sizes = {**model_config, **model_config.get("text_config", {})}
    used = sizes.get("use_sliding_window") is not False
    return int(sizes.get("sliding_window") or 0) if used else 0


def _smaller(section: TrainSection, widest: int, checkpoints: bool = True) -> Iterator[TrainSection]:
    """The section as it is, then with checkpointing if that may be, then with ever smaller micro-batches and more of
    them, down to one example of the widest. A step keeps its number of rows.
    """
    yield section
    rows, tokens, accumulate = section.batch_rows or DEFAULT_ROWS, section.batch_tokens, section.accumulate
    if checkpoints:
        section = section.model_copy(update={"checkpoint_layers": "all"})
        yield section
    while tokens >= 2 * widest if tokens else rows > 1:
        if tokens:
            tokens, accumulate = tokens // 2, accumulate * 2
            yield section.model_copy(update={"batch_tokens": tokens, "accumulate": accumulate})
            continue
        part = 2 if rows % 2 == 0 else rows
        rows, accumulate = rows // part, accumulate * part
        yield section.model_copy(update={"batch_rows": rows, "accumulate": accumulate})
