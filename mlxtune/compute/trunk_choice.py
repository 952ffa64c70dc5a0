"""Whether a run keeps what its frozen blocks give (`trunk_states`), and how much memory and disk that may take.

It pays where rows come more than once. Positions that go through the frozen blocks in a run of E epochs:

    as usual   E times what an epoch computes; rows that share a beginning compute it once, so this may be little
    kept       each row once, alone, with all its tokens

100 rows of 300 tokens, 200 of which a batch of 4 rows shares: 12,500 positions an epoch as usual, 30,000 once. With
2 epochs the frozen blocks have less to do as usual, with 3 they have less to do if kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.sizes import size

from mlxtune.compute import counted
from mlxtune.compute.fast_ways import in_pieces, whole_rows
from mlxtune.compute.loss import Way
from mlxtune.compute.memory import prediction
from mlxtune.compute.trunk import frozen_blocks, states_of
from mlxtune.compute.trunk_states import Budget
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Plan, lengths_of
from mlxtune.errors import UserError

MIN_SAVED = 0.1  # share of all that goes through blocks in a run; below, keeping states is not worth their bytes
SPARE_SHARE = 0.5  # of the memory that the plan leaves: the prediction may be off, and other programs want some
DISK_SHARE = 0.25  # of what is free on the disk, with `train.trunk_cache: auto`
OF_WHOLE_ROWS = "rows go through blocks in pieces, and what is kept is of whole rows"
ANY = mx.zeros((1, 2), mx.int32)  # tokens on which a model says what its blocks give; nothing is computed


def with_kept_trunk(
    way: Way, model: nn.Module, config: Config, rows: Plan, processes: int = 1
) -> tuple[Way, list[str]]:
    """(the way with as many blocks left out as give the same in every epoch, what a person must know about it).

    processes: that share the run. Raises UserError where `train.trunk_cache` asks for room that could have no use.
    """
    asked = config.train.trunk_cache
    if asked == "off":
        return way, []
    frozen = frozen_blocks(model)
    against, worth_saying, beside = _against(way, model, rows, frozen, processes), False, 0
    if not against and in_pieces(config.train) and not whole_rows(model, rows.examples, config.lora.dropout):
        how = config.train.checkpoint_layers
        against, worth_saying = f"with train.checkpoint_layers={how} {OF_WHOLE_ROWS}", True
    if not against and config.train.neftune_alpha:
        against, worth_saying = "with train.neftune_alpha each row has noise of its own in every epoch", True
    if not against:
        try:
            _, beside = states_of(model, frozen, ANY)
        except ValueError as error:
            against, worth_saying = str(error), True
    if not against:
        return replace(way, frozen=frozen, beside=beside), []
    if asked != "auto":
        raise UserError(f"train.trunk_cache {asked} has no effect: {against}", "Leave it out.")
    return way, [f"the first {frozen} blocks are computed anew in each epoch: {against}"] if worth_saying else []


def _against(way: Way, model: nn.Module, rows: Plan, frozen: int, processes: int) -> str:
    """What of the adapter and the rows speaks against keeping, in words; "": nothing does."""
    if not frozen:
        return "something trains in the first block or before it"
    if rows.passes <= 1:
        return "no row comes twice (train.epochs, train.steps)"
    # Each process keeps the rows that came to it: of n, a share of 1 - (1 - 1/n)^E has computed a row after E epochs.
    kept = _positions(rows) * processes * (1 - (1 - 1 / processes) ** rows.passes)
    return _too_little(way, model, rows, frozen, kept)


def _too_little(way: Way, model: nn.Module, rows: Plan, frozen: int, kept: float) -> str:
    """Why it is not worth it in words, where the states of `kept` positions are computed in a run; "": it is."""
    usual = rows.passes * counted.first_epoch(rows, way.prefix).computed
    # A trained block is passed forward and back.
    trained = len(model.layers) - frozen
    saved = frozen * (usual - kept) / ((frozen + 2 * trained) * usual)
    if saved < MIN_SAVED:
        return f"it would save less than {MIN_SAVED:.0%} of the work in the blocks"
    return ""


def against_room(way: Way, model: nn.Module, config: Config, rows: Plan, budget: Budget, wanted: int) -> str:
    """What speaks against keeping where not all states of rows have room, in words; "": nothing, or bytes were asked
    for. wanted: bytes of all states.

    What has no room is computed in each epoch, every row alone: 10 rows that share nothing, of which half have room,
    are computed 10 + 5 + 5 times in 3 epochs instead of 30.
    """
    found = budget.memory + budget.disk
    if config.train.trunk_cache != "auto" or found >= wanted:
        return ""
    share, positions = found / wanted, _positions(rows)
    against = _too_little(way, model, rows, way.frozen, positions * (share + (1 - share) * rows.passes))
    return f"with room for {share:.0%} of the rows {against}" if against else ""


def _positions(rows: Plan) -> int:
    """Of all rows, each once and without its last token."""
    return int(lengths_of(rows.examples).sum()) - len(rows.examples)


def bytes_of_all(rows: Plan, model_config: Mapping[str, Any], dtype: mx.Dtype) -> int:
    """That the states of all rows take; 0: the model's config.json does not say how wide it is."""
    sizes = prediction.sizes_of(model_config)
    return 0 if sizes is None else _positions(rows) * sizes["hidden_size"] * dtype.size


def budget_for(
    config: Config, rows: Plan, model_config: Mapping[str, Any], dtype: mx.Dtype, spare: int
) -> tuple[Budget, str]:
    """(what the states of all rows may take, the same in words). spare: bytes of memory that the run leaves below its
    limit.
    """
    wanted = bytes_of_all(rows, model_config, dtype)
    asked = config.train.trunk_cache
    most = min(wanted, asked) if isinstance(asked, int) else wanted
    memory = min(most, int(SPARE_SHARE * max(0, spare)))
    disk = most - memory
    if asked == "auto":
        disk = min(disk, int(DISK_SHARE * _free_disk()))
    text = f"kept for later epochs: up to {size(memory)} in memory, {size(disk)} on the disk"
    if memory + disk < wanted:
        text += f"; all rows would take {size(wanted)}, the others are computed in each epoch"
    return Budget(memory, disk), text


def _free_disk() -> int:
    """Bytes where temporary files go; 0: there is no such place."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0
