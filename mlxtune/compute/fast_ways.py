"""The ways in which a run may compute its loss: what its configuration and model allow, and what to try after that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.adapter.plan import block_paths, heads
from mlxtune.compute import attention, parts, pieces, prefix
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.precision import in_float32
from mlxtune.config.resolve import Config
from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import lengths_of
from mlxtune.data.dataset.forest import MIN_SUFFIX
from mlxtune.data.dataset.measured import measured
from mlxtune.machine import backend
from mlxtune.model import linux_cpu
from mlxtune.model.arrays import named
from mlxtune.model.corrections import extent

SPLIT_TOKENS = 32  # on which the head apart from the trunk must give the model's own logits


class Blocks(Enum):
    """How a way's blocks may be checkpointed, to fit the memory or because the settings say so."""

    IN_PIECES = "as a whole or in pieces of a row"
    WHOLE = "as a whole"
    NOT = "not at all"


def ways_to_try(wanted: Way) -> list[tuple[Way, Blocks]]:
    """(way, how its blocks may be checkpointed): what to try, the fastest first, the plain way last. Always as many.

    A model whose blocks cannot be computed in pieces may have no other fault: so the way itself is tried once more with
    whole blocks, before anything else of it is left out.
    """
    whole = replace(wanted, frozen=0)
    without_parts = replace(whole, parts=())
    slower = replace(without_parts, powers=False, compiled=False, queries=0)
    head_alone = replace(slower, prefix=None)
    plain = Way()
    slower_ways = [*_without_one(wanted), *_without_one(whole), without_parts, slower, head_alone, plain]
    return [
        (wanted, Blocks.IN_PIECES),
        (wanted, Blocks.WHOLE),
        (whole, Blocks.IN_PIECES),
        # Of `wanted` first: where one part is wrong, frozen blocks may still be left out.
        *((way, Blocks.IN_PIECES) for way in slower_ways),
        (head_alone, Blocks.WHOLE),
        (plain, Blocks.WHOLE),
        (head_alone, Blocks.NOT),
        (plain, Blocks.NOT),
    ]


def _without_one(way: Way) -> list[Way]:
    """The way without its prefix, then without each part; also those that are not on, so that the list is as long on
    every rank.
    """
    ways = [replace(way, prefix=None)]
    for part in parts.PARTS:
        ways.append(replace(way, parts=tuple(name for name in way.parts if name != part)))
    return ways


HEAD_ON_FEW = "the head on supervised tokens only"


def describe(way: Way) -> str:
    """For people: what a way leaves out."""
    short_cuts = []
    if way.split is not None:
        short_cuts.append(HEAD_ON_FEW)
    if way.prefix:
        short_cuts.append(f"the shared prefix of {way.prefix} tokens and what else rows share once")
    elif way.prefix == 0:
        short_cuts.append("what rows share once")
    if way.frozen:
        short_cuts.append(f"the first {way.frozen} blocks once for each row")
    if way.recompute == 1:
        short_cuts.append("every block checkpointed")
    elif way.recompute:
        short_cuts.append(f"one in {way.recompute} blocks checkpointed")
    if way.tokens:
        short_cuts.append(f"in pieces of up to {way.tokens} tokens")
    if way.nested:
        short_cuts.append(f"one input kept of {way.nested} blocks")
    if way.queries:
        short_cuts.append("no scores of attention kept")
    short_cuts += [parts.PARTS[name].says for name in way.parts]
    if way.powers:
        short_cuts.append("exponentials as powers of two")
    if way.compiled:
        short_cuts.append("compiled")
    return ", ".join(short_cuts) or "everything, no short cut"


def fastest_way(
    model: nn.Module, examples: Sequence[Example], config: Config, shares: bool = False
) -> tuple[Way, list[str]]:
    """(the fastest way that the configuration and the model allow, what a person must know about it).

    shares: as `shared_prefix` takes it. Raises UserError where a part was asked for that cannot be used.
    """
    notes = []
    split, trained, note = _split(model, examples[0], config)
    if note:
        notes.append(note)
    length, reason = shared_prefix(model, examples, config, shares)
    if reason:
        notes.append(f"no shared prefix: {reason}")
    way = Way(split, trained, length, every_nth(config.train))
    return _for_device(way, model, examples, config), notes


def _split(model: nn.Module, example: Example, config: Config) -> tuple[Split | None, bool, str]:
    """(how the head runs apart from the trunk, whether it is trained, what a person must know about it)."""
    if config.fast.head != "auto":
        return None, False, ""
    ids = mx.array(np.asarray(example.ids[:SPLIT_TOKENS])[None])  # [1, T]
    split = Split.of(model, ids)
    if split is None:
        note = "this model's head cannot be run apart from its trunk: logits are computed for every token"
        return None, False, note
    with in_float32(model):
        trained = split.head_is_trained(model, split.hidden(ids)[0, -1:])
    if trained and config.lora.dropout:
        return None, False, "the head is trained with dropout: logits are computed for every token"
    return split, trained, ""


def expected_way(model: nn.Module, examples: Sequence[Example], config: Config, shares: bool = False) -> Way:
    """The way that a run will take when nothing goes wrong, no weight being read. shares: as in `shared_prefix`. Raises
    UserError where a part was asked for that cannot be used.
    """
    split = Split(model, "") if config.fast.head == "auto" else None
    trained = split is not None and head_trains(model)
    if trained and config.lora.dropout:
        split, trained = None, False
    length, _ = shared_prefix(model, examples, config, shares)
    return _for_device(Way(split, trained, length, every_nth(config.train)), model, examples, config)


def head_trains(model: nn.Module) -> bool:
    """Whether something of the head trains, told by the names of what trains outside the blocks: of its own matrix, or
    of the embedding that it is tied to. (`Split.head_is_trained` asks a gradient, which takes weights.)
    """
    inside = tuple(f"{path}." for path in block_paths(model))
    outside = [path for path in named(model.trainable_parameters()) if not path.startswith(inside)]
    own = tuple(f"{path.removesuffix('.linear').removesuffix('.frozen')}." for path in heads(model))
    if own:
        return any(path.startswith(own) for path in outside)
    return any("norm" not in path.lower() for path in outside)


def _for_device(way: Way, model: nn.Module, examples: Sequence[Example], config: Config) -> Way:
    """The way with what makes it fast on this device."""
    fast = way.split is not None or way.prefix is not None  # where neither is wanted, the plain way is
    powers = linux_cpu.worth_it() and fast
    queries = 0
    if fast and config.fast.attention == "auto" and lengths_of(examples).max() > attention.LONG:
        queries = attention.queries_at_once()
    compiled = (
        backend.policy().compiled
        and way.split is not None
        and not _noise(config)
        and not measured(examples).sides.any()  # the loss of answers is another function for every micro-batch
        and prefix.keeps_keys_alone(model)  # others may go token by token: such graphs grow with the row
    )
    of_model: tuple[str, ...] = ()
    if fast:
        of_model = parts.of_model(model, config.fast, bool(config.lora.dropout))
    elif config.fast.thin == "on":
        raise parts.without_effect("thin", "neither the head nor a prefix is computed apart, so the plain way is taken")
    return replace(way, powers=powers, compiled=compiled, queries=queries, parts=of_model)


def _noise(config: Config) -> str:
    """The setting by which each row sees noise of its own, drawn anew in every step; "": none."""
    if config.lora.dropout:
        return "lora.dropout"
    if config.train.neftune_alpha:
        return "train.neftune_alpha"
    return ""


def every_nth(section: TrainSection) -> int:
    """train.checkpoint_layers as a number; 0: none."""
    every = section.checkpoint_layers
    return every if isinstance(every, int) else {"none": 0, "all": 1, "pieces": 1, "nested": 1}[every]


def in_pieces(section: TrainSection) -> bool:
    """Whether checkpointed blocks are to be computed in pieces (`pieces`)."""
    return section.checkpoint_layers in ("pieces", "nested")


def whole_rows(model: nn.Module, examples: Sequence[Example], dropout: float) -> str:
    """Why a model's blocks cannot be computed in pieces of a row, for people; "": they can. dropout: of the adapter."""
    if dropout:
        return "with lora.dropout each row must see a mask of its own"
    if not prefix.keeps_keys_alone(model):
        return "some of this model's layers keep more than keys and values"
    limit = extent.longest_alike(model)
    if limit is not None and lengths_of(examples).max() > limit:
        return f"rows of more than {limit} tokens are rotated otherwise"
    return pieces.against(model)


def checkpointed(way: Way, section: TrainSection, model: nn.Module, may_divide: bool) -> Way:
    """The way with as many blocks checkpointed as the settings say, each as they say.

    may_divide: whether blocks can be computed in pieces; where not, they are checkpointed as a whole.
    """
    every = every_nth(section)
    way = replace(
        way,
        recompute=every,
        tokens=0,
        nested=0,
        parts=tuple(parts.in_use(way.parts, every)),
        small_chunks=every == parts.ALL_BLOCKS and may_have_small_chunks(way),
    )
    if not in_pieces(section) or not may_divide:
        return way
    nested = 0
    if section.checkpoint_layers == "nested":
        # n blocks in groups of g keep n / g inputs, and g more while a group goes back: least where g * g = n.
        nested = max(2, round(math.sqrt(len(model.layers))))
    return divided(way, nested)


def may_have_small_chunks(way: Way) -> bool:
    """Whether small chunks of the head save memory. Where every block is checkpointed a chunk's logits may be the peak.
    But the gradients of a trained head, one from each chunk, wait for each other: more chunks would take more.
    """
    return way.split is not None and not way.head_trained


def divided(way: Way, nested: int = 0) -> Way:
    """The way with every block checkpointed and in pieces. nested: as in `Way`."""
    # The last block and what is kept of frozen ones count tokens in whole rows, so neither is used. Not compiled: a
    # compiled graph has the pieces one by one, and gives its stages up.
    used = parts.in_use(way.parts, parts.ALL_BLOCKS)
    of_whole_rows = tuple(name for name in used if name != "last_block")
    return replace(
        way,
        recompute=parts.ALL_BLOCKS,
        small_chunks=may_have_small_chunks(way),
        tokens=pieces.TOKENS,
        nested=nested,
        compiled=False,
        parts=of_whole_rows,
        frozen=0,
    )


def shared_prefix(
    model: nn.Module, examples: Sequence[Example], config: Config, shares: bool = False
) -> tuple[int | None, str]:
    """(tokens that all rows of the run begin with, or None: not to be computed once; why not, if worth saying).

    shares: some rows meet because they begin alike for longer than all do (`Plan.shares`). Whether one batch gains by
    it, `prefix.forest_of_batch` decides.
    """
    if config.fast.prefix == "off":
        return None, ""
    length = prefix.shared_by_run(examples)
    by_all = length >= prefix.WORTH_SAYING
    several = int(measured(examples).row_of[-1]) + 1 < len(examples)  # of a row, which begin alike
    against = against_sharing(model, examples, config) if by_all or shares or several else ""
    if against:
        alike = f"{length} tokens begin every row" if by_all else "examples of one row begin alike"
        return None, f"{alike}, but {against}"
    return (length, "") if by_all or shares else (None, "")


def against_sharing(model: nn.Module, examples: Sequence[Example], config: Config) -> str:
    """What speaks against computing once what rows share, in words; "": nothing."""
    noise = _noise(config)
    if noise:
        return f"with {noise} each row must see noise of its own"
    if not prefix.can_branch(model):
        return "some of this model's layers keep more than keys and values"
    limit = extent.longest_alike(model)
    if limit is not None and lengths_of(examples).max() > limit - MIN_SUFFIX:
        return f"rows of more than {limit} tokens are rotated otherwise"
    return ""
