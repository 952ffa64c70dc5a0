"""A run made to fit the memory: checkpointing first, then smaller micro-batches and more of them in a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import backend
from mlxtune.config import Config, TrainSection
from mlxtune.data.batches import DEFAULT_ROWS, Plan
from mlxtune.errors import UserError
from mlxtune.model import memory, prefix
from mlxtune.model.kernels import Device
from mlxtune.train import loss
from mlxtune.train.fast import every_nth

SHARE = 0.8  # of the device's working set: the rest is for the system, and for what the plan does not see


def plan(
    model: nn.Module, config: Config, model_config: Mapping[str, Any], dtype: mx.Dtype, rows: Plan
) -> memory.Memory | memory.NotPredicted:
    """The predicted peak of a run whose adapter is attached, with the fast ways that its configuration allows."""
    sizes = memory.sizes_of(model_config)
    if sizes is None:
        return memory.NotPredicted("its config.json does not say how wide it is")
    shapes = rows.shapes()
    count, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
    shared = 0
    if (
        config.fast.prefix == "auto"
        and not (config.lora.dropout or config.train.neftune_alpha)
        and prefix.caches(model) is not None
    ):
        shared = prefix.of_run(rows.examples)
        shared = shared if width <= prefix.longest_worth_it(shared, count) else 0
    targets = max(targets for _, _, targets in shapes)
    shape = memory.Shape(count, width - 1, shared, targets)
    chunk = loss.chunk_rows(sizes["hidden_size"], sizes["vocab_size"]) if config.fast.head == "auto" else 0
    recompute = every_nth(config.train)
    device = Device.here(fast=config.fast.head == "auto" or shared > 0)
    options = memory.Options(
        item=dtype.size,
        chunk=chunk,
        recompute=recompute,
        dropout=config.lora.dropout,
        device=device,
        compiled=backend.compiles() and prefix.caches(model) is not None,
        accumulated=config.train.accumulate > 1,
        ram=backend.memory_bytes(),
    )
    return memory.predict(model, model_config, shape, options)


def limit_of(section: TrainSection) -> int | None:
    """train.memory_limit in bytes on this device; None: off."""
    allowed = section.memory_limit
    if allowed == "off":
        return None
    return int(SHARE * backend.working_set_bytes()) if allowed == "auto" else int(allowed)


def fitted(
    model: nn.Module,
    config: Config,
    model_config: Mapping[str, Any],
    dtype: mx.Dtype,
    rows: Plan,
    limit: int | None,
) -> tuple[Config, Plan, list[str]]:
    """(configuration, its plan of batches, notes) that fit the limit, bytes.

    Raises UserError, naming the setting to change, when no batch is small enough.
    """
    if limit is None:
        return config, rows, []
    needed = 0
    for number, section in enumerate(_smaller(config.train, rows.widths[-1])):
        batches = rows if number == 0 else Plan(rows.examples, section, config.data.group_by_prefix)
        if section.batch_tokens != config.train.batch_tokens and batches.rows < len(rows.examples):
            # A row of many examples may fill several budgets, and fills as many more of half the size.
            wanted = rows.rows_per_batch * config.train.accumulate / batches.rows_per_batch
            section = section.model_copy(update={"accumulate": max(1, round(wanted))})
            batches = Plan(rows.examples, section, config.data.group_by_prefix)
        tried = config.model_copy(update={"train": section})
        predicted = plan(model, tried, model_config, dtype, batches)
        if isinstance(predicted, memory.NotPredicted):
            return config, rows, [predicted.note]
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
    fits = _longest_row(model, config, model_config, dtype, rows.widths[-1], limit)
    shorter = f"Lower data.max_tokens to {fits}" if fits else "Lower data.max_tokens"
    raise UserError(
        f"training needs {needed / 1e6:,.0f} MB of memory even with one {least} at a time and checkpointing; "
        f"train.memory_limit allows {limit / 1e6:,.0f} MB",
        f"{shorter}, take a smaller or a 4-bit model, or set train.memory_limit: off.",
    )


def _longest_row(
    model: nn.Module, config: Config, model_config: Mapping[str, Any], dtype: mx.Dtype, width: int, limit: int
) -> int:
    """Tokens of a row that fits alone, all of them targets, in halves of `width`; 0: not even 64."""
    sizes = memory.sizes_of(model_config)
    if sizes is None:
        return 0
    chunk = loss.chunk_rows(sizes["hidden_size"], sizes["vocab_size"]) if config.fast.head == "auto" else 0
    options = memory.Options(dtype.size, chunk, 1, config.lora.dropout, Device.here())
    while (width := width // 2) >= 64:
        found = memory.predict(model, model_config, memory.Shape(1, width, 0, width), options)
        if isinstance(found, memory.Memory) and found.total <= limit:
            return width
    return 0


def proof_tokens(
    model: nn.Module, model_config: Mapping[str, Any], dtype: mx.Dtype, limit: int | None, most: int
) -> int:
    """How many tokens of one row the plain way may compute within the limit, in halves of `most`, at least 64."""
    if limit is None:
        return most
    options = memory.Options(dtype.size, 0, 0, 0.0, Device.here(fast=False))

    def needed(tokens: int) -> int:
        found = memory.predict(model, model_config, memory.Shape(1, tokens, 0, tokens), options)
        return 0 if isinstance(found, memory.NotPredicted) else found.total

    while most > 64 and needed(most) > limit:
        most //= 2
    return most


def _smaller(section: TrainSection, widest: int) -> Iterator[TrainSection]:
    """The section as it is, then with checkpointing, then with ever smaller micro-batches and more of them, down to one
    example of the widest. A step keeps its number of rows.
    """
    yield section
    rows, tokens, accumulate = section.batch_rows or DEFAULT_ROWS, section.batch_tokens, section.accumulate
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
