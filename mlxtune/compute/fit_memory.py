"""A run made to fit the memory: checkpointing first, then smaller micro-batches and more of them in a step.

What a step learns from stays the same, only how much of it is in memory at a time. `train.batch_rows: 6`, predicted to
need 9 GB, with `train.memory_limit: 3gb`:

    tried                                                  predicted
    batch_rows 6, accumulate 1                             9.0 GB
    the same, checkpoint_layers: all                       4.4 GB
    batch_rows 3, accumulate 2, checkpoint_layers: all     2.6 GB    fits: a step still has 6 rows

Checkpointing comes first, for it leaves the batches as they are. Where not even one example fits, an error names the
settings that would help.

The same prediction says how much a proof may take (`proof_room`) and how large the batches of an evaluation may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.sizes import size

from mlxtune.compute import head_loss, pieces, prefix
from mlxtune.compute.fast_ways import Blocks, checkpointed, in_pieces, whole_rows
from mlxtune.compute.loss import Way
from mlxtune.compute.memory import prediction as memory
from mlxtune.compute.memory.kernels import Device
from mlxtune.compute.memory.step import RunOptions, StepSizes
from mlxtune.compute.precision import copies, in_float32
from mlxtune.compute.proof import FEWEST_TOKENS, MAX_TOKENS, Room
from mlxtune.compute.smaller_settings import smaller_settings
from mlxtune.compute.trunk_choice import OF_WHOLE_ROWS, against_room, budget_for, bytes_of_all
from mlxtune.compute.trunk_states import NOTHING, Budget
from mlxtune.config.resolve import Config
from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import EVALUATION_TOKENS, Plan, collate, lengths_of
from mlxtune.data.dataset.forest import Forest, Pass
from mlxtune.data.rows.sides import Side
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.arrays import named

LOOKED_AT = 64  # micro-batches, some milliseconds each, for the one through which most tokens go
DEPTHS, WIDTH_GRAIN = (
    8,
    16,
)  # of a forest's branches: to how many depths, and to what multiple of tokens, for its memory
PAST_WINDOW = 64  # tokens of the proof's rows beyond a sliding window, where the data has them
PROOF_SHARE = 0.85  # of the run's predicted peak, that a proof may take: a prediction may be off by 15%
SHARE = 0.8  # of the device's working set: the rest is for the system, and for what the prediction does not see


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
    budget: Budget = NOTHING  # what the states of rows may take, where the way leaves blocks out


def predict_run(given: Given, way: Way, config: Config, rows: Plan) -> memory.Memory | memory.NotPredicted:
    """The predicted peak of a run that is computed as `way` says."""
    sizes = memory.sizes_of(given.model_config)
    if sizes is None:
        return memory.NotPredicted("its config.json does not say how wide it is")
    options = replace(
        _options(way, sizes, given.dtype),
        dropout=config.lora.dropout,
        accumulated=config.train.accumulate > 1,
        ram=backend.memory_bytes(),
        updates=True,
    )
    return memory.predict(given.model, given.model_config, _heaviest(way, rows), options)


def _heaviest(way: Way, rows: Plan) -> StepSizes:
    """The micro-batch of the first epoch through which most tokens go, with the most targets that any has.

    Where examples share, those that would be the largest without it are looked at one after the other, until the next
    one is smaller even whole.
    """
    shapes = rows.shapes()
    targets = max(targets for _, _, targets in shapes)
    if way.prefix is None:
        count, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
        return _step_sizes(way, count, width, targets)

    def positions(examples: list[int]) -> int:
        return len(examples) * (rows.width(examples) - 1)

    most, heaviest = 0, StepSizes(1, rows.widths[-1] - 1, 0, targets)
    for examples in sorted(rows.micro_batches(), key=positions, reverse=True)[:LOOKED_AT]:
        if positions(examples) <= most:
            break
        width = rows.width(examples)
        passes = prefix.forest_of_batch(collate(rows.examples, examples, width), way.prefix)
        if passes.computed > most:
            most = passes.computed
            if prefix.is_simple(passes):
                heaviest = StepSizes(len(examples), width - 1, passes.passes[-1].start, targets)
            else:
                heaviest = StepSizes(len(examples), width - 1, 0, targets, _of_few_shapes(passes))
    return heaviest


def _of_few_shapes(passes: Forest) -> Forest:
    """A forest whose passes are rounded to few widths and depths, for each shape's graph is looked through."""
    rounded: list[Pass] = []
    for each in passes.passes:
        if each.leaves is None or each.is_trunk:
            rounded.append(each)
            continue
        trunk = passes.passes[each.leaves]
        end = trunk.start + trunk.width
        start = end
        if each.start < end:
            start = min(end, _rounded(each.start, max(FEWEST_TOKENS, end // DEPTHS)))
        rounded.append(replace(each, start=start, width=_rounded(each.width, WIDTH_GRAIN)))
    return Forest(tuple(rounded))


def _rounded(number: int, grain: int) -> int:
    """To the nearest multiple, but not to zero."""
    return max(1, round(number / grain)) * grain


def _step_sizes(way: Way, count: int, width: int, targets: int) -> StepSizes:
    """Of a micro-batch of `count` rows of `width` tokens."""
    shared = prefix.if_it_gains(way.prefix or 0, count, width)
    return StepSizes(count, width - 1, shared, targets)


def _options(way: Way, sizes: Mapping[str, Any], dtype: mx.Dtype) -> RunOptions:
    chunk = 0
    if way.split is not None:
        chunk = head_loss.chunk_rows(sizes["hidden_size"], sizes["vocab_size"], way.small_chunks)
    return RunOptions(
        item=dtype.size,
        chunk=chunk,
        head_trained=way.head_trained,
        recompute=way.recompute,
        dropout=0.0,
        device=Device.here(way.powers, way.queries, way.parts),
        tokens=way.tokens,
        nested=way.nested,
        compiled=way.compiled,
        updates=False,
        frozen=way.frozen,
    )


def limit_of(section: TrainSection) -> int | None:
    """train.memory_limit in bytes on this device; None: off."""
    allowed = section.memory_limit
    if allowed == "off":
        return None
    return int(SHARE * backend.working_set_bytes()) if allowed == "auto" else int(allowed)


def fit(given: Given, way: Way, config: Config, rows: Plan, blocks: Blocks = Blocks.IN_PIECES) -> Fitted:
    """The run made to fit `given.limit` when it is computed as `way` says. How many blocks are checkpointed is the
    configuration's; blocks: how any may be. A run without a limit, or whose memory cannot be predicted, stays as it is.

    Raises UserError, naming the setting to change, when no batch is small enough.
    """
    limit = given.limit
    if way.prefix is None:
        rows = rows.computed_whole()
    needed = 0
    taken = way
    widest = rows.widths[-1]
    checkpoints = blocks is not Blocks.NOT
    may_divide = False
    about_pieces = []
    if checkpoints and (widest > pieces.TOKENS or in_pieces(config.train)):
        reason = "in pieces they are not proven"
        if blocks is Blocks.IN_PIECES:
            reason = whole_rows(given.model, rows.examples, config.lora.dropout)
        may_divide = not reason
        if reason and in_pieces(config.train):
            about_pieces.append(f"blocks are checkpointed with whole rows: {reason}")
    for number, section in enumerate(smaller_settings(config.train, widest, checkpoints, may_divide)):
        if number == 0:
            batches = rows
        else:
            section, batches = _with_batches(section, config, rows)
        tried = config.model_copy(update={"train": section})
        taken = checkpointed(way, section, given.model, may_divide) if checkpoints else replace(way, recompute=0)
        predicted = predict_run(given, taken, tried, batches)
        if isinstance(predicted, memory.NotPredicted):
            notes = list(about_pieces)
            if limit is not None:
                notes.append(f"{predicted.note}; train.memory_limit does nothing")
            return _with_budget(given, Fitted(taken, config, rows, predicted, notes), blocks)
        needed = predicted.total
        if limit is None or needed <= limit:
            notes = about_pieces + _changed(config.train, section, limit)
            if way.frozen and not taken.frozen:
                notes.append(f"the first {way.frozen} blocks are computed anew in each epoch: {OF_WHOLE_ROWS}")
            return _with_budget(given, Fitted(taken, tried, batches, predicted, notes), blocks)
    assert limit is not None
    raise _does_not_fit(given, taken, rows, needed, limit, checkpoints)


def _with_budget(given: Given, run: Fitted, blocks: Blocks) -> Fitted:
    """The run with what the states of its rows may take: of the memory, a part of what it leaves of its limit."""
    if not run.way.frozen:
        return run
    spare = 0
    if isinstance(run.memory, memory.Memory):
        spare = (given.limit or int(SHARE * backend.working_set_bytes())) - run.memory.total
    budget, kept = budget_for(run.config, run.rows, given.model_config, given.dtype, spare)
    wanted = bytes_of_all(run.rows, given.model_config, given.dtype)
    if against := against_room(run.way, given.model, run.config, run.rows, budget, wanted):
        whole = fit(given, replace(run.way, frozen=0, beside=0), run.config, run.rows, blocks)
        anew = f"the first {run.way.frozen} blocks are computed anew in each epoch: {against}"
        return replace(whole, notes=[*run.notes, *whole.notes, anew])
    if isinstance(run.memory, memory.Memory):
        run = replace(run, memory=replace(run.memory, trunk_cache=budget.memory))
    return replace(run, budget=budget, notes=[*run.notes, f"what the first {run.way.frozen} blocks give is {kept}"])


def _with_batches(section: TrainSection, config: Config, rows: Plan) -> tuple[TrainSection, Plan]:
    """Settings that were made smaller, with a step of as many rows as before, and their batches."""
    batches = rows.with_settings(section)
    if section.batch_tokens == config.train.batch_tokens or batches.rows == len(rows.examples):
        return section, batches
    # A row of many examples may fill several budgets, and fills as many more of half the size.
    wanted = rows.rows_per_batch * config.train.accumulate / batches.rows_per_batch
    section = section.model_copy(update={"accumulate": max(1, round(wanted))})
    return section, rows.with_settings(section)


def _does_not_fit(given: Given, way: Way, rows: Plan, needed: int, limit: int, checkpoints: bool) -> UserError:
    """way: the last that was tried; needed: bytes of its smallest batch."""
    least, count = "row" if rows.rows == len(rows.examples) else "example", 1
    if (rows.examples.sides == Side.CHOSEN).any():
        least, count = "pair", 2
    means = " and checkpointing" if checkpoints else ""
    longest = _longest_row(given, way, rows.widths[-1], limit, count)
    shorter = f"Lower data.max_tokens to {longest}" if longest else "Lower data.max_tokens"
    smaller = "a smaller model" if "quantization" in given.model_config else "a smaller or a 4-bit model"
    narrower = f"set {given.narrower}, " if given.narrower else ""
    return UserError(
        f"training needs {size(needed)} of memory even with one {least} at a time{means}; "
        f"train.memory_limit allows {size(limit)}",
        f"{shorter}, take {smaller}, {narrower}or set train.memory_limit: off.",
    )


def _changed(asked: TrainSection, taken: TrainSection, limit: int | None) -> list[str]:
    """A note on the settings that were changed to fit, if any were."""
    changed = []
    for key, value in taken.model_dump().items():
        if value != getattr(asked, key):
            changed.append(f"train.{key}={value}")
    if limit is None or not changed:
        return []
    return [f"to fit {size(limit)} of memory: {', '.join(changed)}"]


def _longest_row(given: Given, way: Way, width: int, limit: int, count: int) -> int:
    """Tokens of a row of which `count` fit, all of them targets, in halves of `width`; 0: not even FEWEST_TOKENS."""
    sizes = memory.sizes_of(given.model_config)
    if sizes is None:
        return 0
    options = _options(way, sizes, given.dtype)
    width //= 2
    while width >= FEWEST_TOKENS:
        sizes_of_rows = _step_sizes(way, count, width, count * width)
        predicted = memory.predict(given.model, given.model_config, sizes_of_rows, options)
        if isinstance(predicted, memory.Memory) and predicted.total <= limit:
            return width
        width //= 2
    return 0


def proof_room(given: Given, run: Fitted) -> Room:
    """What a proof may take: no more than the run itself is predicted to, so that the proof is never its peak. First
    blocks are computed again, then the rows are cut.

    Where not even the fewest tokens fit into that in float32, they may take what the limit allows; else the proof is of
    the run's own type.
    """
    most = _most_tokens(given, run)
    sizes = memory.sizes_of(given.model_config)
    if sizes is None or isinstance(run.memory, memory.NotPredicted):
        return Room(most, checkpointed=_float32_passes_limit(given))
    of_the_run = PROOF_SHARE * run.memory.total
    outside, _ = copies(given.model)
    beside = outside // 2  # the 16-bit numbers that are raised stay beside their copies, which are twice as large
    with in_float32(given.model):  # the copies of the blocks are then in their graphs
        tokens = most
        while True:
            for checkpointed in (False, True):
                if beside + _needed_by_proof(given, run.way, sizes, tokens, checkpointed) <= of_the_run:
                    return Room(tokens, checkpointed)
            if tokens <= FEWEST_TOKENS:
                break
            tokens = max(FEWEST_TOKENS, tokens // 2)
        least = beside + _needed_by_proof(given, run.way, sizes, tokens, checkpointed=True)
    fits = given.limit is None or least <= given.limit
    return Room(tokens, checkpointed=True, raised=fits or given.dtype == mx.float32)


def _most_tokens(given: Given, run: Fitted) -> int:
    """Of a row of the proof: of the longest row, and past a sliding window where the data goes past it."""
    longest = int(lengths_of(run.rows.examples).max())
    window = window_of(given.model_config)
    if window >= longest:
        return min(longest, MAX_TOKENS)
    return min(longest, max(MAX_TOKENS, window + PAST_WINDOW))


def _float32_passes_limit(given: Given) -> bool:
    """Whether the weights and the float32 copies of all of them together are more than the limit."""
    if given.limit is None:
        return False
    outside, blocks = copies(given.model)
    weights = sum(array.nbytes for array in named(given.model.parameters()).values())
    return weights + outside + sum(blocks) > given.limit


def _needed_by_proof(given: Given, way: Way, sizes: Mapping[str, Any], tokens: int, checkpointed: bool) -> float:
    """Bytes of the larger of the two: the plain way on one row, `way` on both; infinite where they are not predicted.
    The model is in float32 already.
    """
    plain = Way(recompute=int(checkpointed))
    fast = replace(way, recompute=way.recompute or int(checkpointed))
    largest = 0
    for each, count in ((plain, 1), (fast, 2)):
        batch = _step_sizes(each, count, tokens, count * tokens)
        predicted = memory.predict(given.model, given.model_config, batch, _options(each, sizes, mx.float32))
        if isinstance(predicted, memory.NotPredicted):
            return math.inf
        largest = max(largest, predicted.total)
    return largest


def evaluation_tokens(model: nn.Module, way: Way, rows: Plan) -> int:
    """Padded tokens of a batch of an evaluation, so that it takes no more memory than a step.

    It keeps nothing for a backward pass. A step keeps what all blocks need, or where each is computed again, one's.
    Where beginnings are shared, as many as a step computes: a smaller batch would compute them several times.
    """
    largest = max(count * width for count, width, _ in rows.shapes())
    if rows.shares and way.prefix is not None:
        return largest
    times = 1 if way.recompute == 1 else max(1, len(model.layers) // 2)
    return min(EVALUATION_TOKENS, times * largest)


def window_of(model_config: Mapping[str, Any]) -> int:
    """Tokens that a sliding window sees, by config.json; 0: it has none."""
    sizes = {**model_config, **model_config.get("text_config", {})}
    used = sizes.get("use_sliding_window") is not False
    return int(sizes.get("sliding_window") or 0) if used else 0
