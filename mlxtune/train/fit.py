"""A run made to fit the memory: checkpointing first, then smaller micro-batches and more of them in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import backend
from mlxtune.config import Config, TrainSection
from mlxtune.data.batches import DEFAULT_ROWS, EVALUATION_TOKENS, Plan, lengths_of
from mlxtune.errors import UserError
from mlxtune.model import memory, prefix
from mlxtune.model.arrays import named
from mlxtune.model.kernels import Device
from mlxtune.model.precision import copies, in_float32
from mlxtune.train import loss
from mlxtune.train.fast import every_nth
from mlxtune.train.loss import Path
from mlxtune.train.proof import FEWEST_TOKENS, MAX_TOKENS, Room

PAST_WINDOW = 64  # tokens of the proof's rows beyond a sliding window, where the data has them
PROOF_SHARE = 0.85  # of the run's predicted peak: a prediction may be off by 15%
FULL = mx.float32
SHARE = 0.8  # of the device's working set: the rest is for the system, and for what the plan does not see


def plan(
    model: nn.Module, path: Path, config: Config, model_config: Mapping[str, Any], dtype: mx.Dtype, rows: Plan
) -> memory.Memory | memory.NotPredicted:
    """The predicted peak of a run whose adapter is attached, computed as `path` says."""
    sizes = memory.sizes_of(model_config)
    if sizes is None:
        return memory.NotPredicted("its config.json does not say how wide it is")
    shapes = rows.shapes()
    count, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
    targets = max(targets for _, _, targets in shapes)
    options = replace(
        _options(path, sizes, dtype),
        dropout=config.lora.dropout,
        accumulated=config.train.accumulate > 1,
        ram=backend.memory_bytes(),
        updates=True,
    )
    return memory.predict(model, model_config, _shape(path, count, width, targets), options)


def _shape(path: Path, count: int, width: int, targets: int) -> memory.Shape:
    """Of a micro-batch of `count` rows of `width` tokens."""
    shared = path.prefix or 0
    shared = shared if width <= prefix.longest_worth_it(shared, count) else 0
    return memory.Shape(count, width - 1, shared, targets)


def _options(path: Path, sizes: Mapping[str, Any], dtype: mx.Dtype) -> memory.Options:
    return memory.Options(
        item=dtype.size,
        chunk=0 if path.split is None else loss.chunk_rows(sizes["hidden_size"], sizes["vocab_size"]),
        recompute=path.recompute,
        dropout=0.0,
        device=Device.here(fast=path.powers),
        compiled=path.compiled,
        updates=False,
    )


def limit_of(section: TrainSection) -> int | None:
    """train.memory_limit in bytes on this device; None: off."""
    allowed = section.memory_limit
    if allowed == "off":
        return None
    return int(SHARE * backend.working_set_bytes()) if allowed == "auto" else int(allowed)


def fitted(
    model: nn.Module,
    path: Path,
    config: Config,
    model_config: Mapping[str, Any],
    dtype: mx.Dtype,
    rows: Plan,
    limit: int | None,
    checkpoints: bool = True,
    narrower: str = "",
) -> tuple[Config, Plan, list[str]]:
    """(configuration, its plan of batches, notes) that fit the limit, bytes, when the run is computed as `path` says.
    How many blocks are checkpointed is the configuration's; checkpoints: whether any may be; narrower: as
    `floats.narrower`.

    Raises UserError, naming the setting to change, when no batch is small enough.
    """
    if limit is None:
        return config, rows, []
    needed = 0
    for number, section in enumerate(_smaller(config.train, rows.widths[-1], checkpoints)):
        batches = rows if number == 0 else Plan(rows.examples, section, config.data.group_by_prefix)
        if section.batch_tokens != config.train.batch_tokens and batches.rows < len(rows.examples):
            # A row of many examples may fill several budgets, and fills as many more of half the size.
            wanted = rows.rows_per_batch * config.train.accumulate / batches.rows_per_batch
            section = section.model_copy(update={"accumulate": max(1, round(wanted))})
            batches = Plan(rows.examples, section, config.data.group_by_prefix)
        tried = config.model_copy(update={"train": section})
        way = replace(path, recompute=every_nth(section) if checkpoints else 0)
        predicted = plan(model, way, tried, model_config, dtype, batches)
        if isinstance(predicted, memory.NotPredicted):
            return config, rows, [f"{predicted.note}; train.memory_limit does nothing"]
        needed = predicted.total
        if needed <= limit:
            changed = [
                f"train.{key}={value}"
                for key, value in section.model_dump().items()
                if value != getattr(config.train, key)
            ]
            note = f"to fit {limit / 1e6:,.0f} MB of memory: {', '.join(changed)}"
            return tried, batches, [note] if changed else []
    least = "row" if rows.rows == len(rows.examples) else "example"
    fits = _longest_row(model, replace(path, recompute=int(checkpoints)), model_config, dtype, rows.widths[-1], limit)
    smaller = "a smaller model" if "quantization" in model_config else "a smaller or a 4-bit model"
    shorter = f"Lower data.max_tokens to {fits}" if fits else "Lower data.max_tokens"
    raise UserError(
        f"training needs {needed / 1e6:,.0f} MB of memory even with one {least} at a time"
        f"{' and checkpointing' if checkpoints else ''}; train.memory_limit allows {limit / 1e6:,.0f} MB",
        f"{shorter}, take {smaller}, {f'set {narrower}, ' if narrower else ''}or set train.memory_limit: off.",
    )


def _longest_row(
    model: nn.Module, path: Path, model_config: Mapping[str, Any], dtype: mx.Dtype, width: int, limit: int
) -> int:
    """Tokens of a row that fits alone, all of them targets, in halves of `width`; 0: not even FEWEST_TOKENS."""
    sizes = memory.sizes_of(model_config)
    while sizes is not None and (width := width // 2) >= FEWEST_TOKENS:
        found = memory.predict(model, model_config, _shape(path, 1, width, width), _options(path, sizes, dtype))
        if isinstance(found, memory.Memory) and found.total <= limit:
            return width
    return 0


def proof_room(
    model: nn.Module,
    path: Path,
    config: Config,
    model_config: Mapping[str, Any],
    dtype: mx.Dtype,
    rows: Plan,
    limit: int | None,
) -> Room:
    """What a proof may take: no more than the run itself is predicted to, so that the proof is never its peak. First
    blocks are computed again, then the rows are cut.

    Where not even the fewest tokens fit into that in float32, they may take what the limit allows, bytes; else the
    proof is of the run's own type.
    """
    outside, blocks = copies(model)
    longest = int(lengths_of(rows.examples).max())
    window = window_of(model_config)
    most = min(longest, MAX_TOKENS if window >= longest else max(MAX_TOKENS, window + PAST_WINDOW))
    sizes = memory.sizes_of(model_config)
    run = plan(model, path, config, model_config, dtype, rows)
    if sizes is None or isinstance(run, memory.NotPredicted):
        weights = sum(array.nbytes for array in named(model.parameters()).values())
        return Room(most, checkpointed=limit is not None and weights + outside + sum(blocks) > limit)

    def needed(tokens: int, checkpointed: bool) -> float:
        """Of the larger of the two: the plain way on one row, the fast one on both."""
        plain, fast = Path(recompute=int(checkpointed)), replace(path, recompute=path.recompute or int(checkpointed))
        alone = memory.predict(model, model_config, _shape(plain, 1, tokens, tokens), _options(plain, sizes, FULL))
        both = memory.predict(model, model_config, _shape(fast, 2, tokens, 2 * tokens), _options(fast, sizes, FULL))
        if isinstance(alone, memory.NotPredicted) or isinstance(both, memory.NotPredicted):
            return math.inf
        return outside // 2 + max(alone.total, both.total)  # the numbers that were raised stay beside their copies

    with in_float32(model):  # the copies of the blocks are then in their graphs
        tokens = most
        while True:
            for checkpointed in (False, True):
                if needed(tokens, checkpointed) <= PROOF_SHARE * run.total:
                    return Room(tokens, checkpointed)
            if tokens <= FEWEST_TOKENS:
                break
            tokens = max(FEWEST_TOKENS, tokens // 2)
        fits = limit is None or needed(tokens, checkpointed=True) <= limit
    return Room(tokens, checkpointed=True, raised=fits or dtype == mx.float32)


def evaluation_tokens(model: nn.Module, path: Path, rows: Plan) -> int:
    """Padded tokens of a batch of an evaluation, so that it takes no more memory than a step.

    It keeps nothing for a backward pass. A step keeps what all blocks need, or where each is computed again, one's.
    """
    largest = max(count * width for count, width, _ in rows.shapes())
    times = 1 if path.recompute == 1 else max(1, len(model.layers) // 2)
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
