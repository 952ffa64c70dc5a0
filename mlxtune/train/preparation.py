"""From a configuration and its examples to everything that the loop works with.

    a run       read the weights -> attach -> prove the fast ways, and fit the memory by what is proven -> Prepared
    a dry run   open the weights -> attach -> fit the memory by the way that is hoped for               -> Planned

Both go through `attached`, so what a dry run says of the adapter, the new tokens and the batches is what a run does.
MLX is lazy: of weights that are only opened, shapes and types are known, and none of them is ever computed.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.hf.chat_templates import unread
from mlxtune_convert.ways_out import described

from mlxtune.adapter import adapter_files, attach, vocabulary
from mlxtune.adapter.dropout import DropoutKeys, add_noise
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import counted, fast_ways, fit_memory, floats, trunk_choice
from mlxtune.compute.counted import Epoch
from mlxtune.compute.fit_memory import Fitted, Given
from mlxtune.compute.memory.prediction import Memory
from mlxtune.compute.trunk_states import RowStates
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Plan, in_order, side_by_side
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.machine import backend, surroundings
from mlxtune.model.arrays import dtype_name, named
from mlxtune.model.corrections import corrected
from mlxtune.model.load import Loaded, load, source_of
from mlxtune.train.choice import choose
from mlxtune.train.evaluation import Evaluation, suite_of
from mlxtune.train.events import Listener, nobody
from mlxtune.train.identity import Identity
from mlxtune.train.preference.mismatched import Mismatched
from mlxtune.train.preference.words import objective_in_words, of_thumbs, rows_in_words
from mlxtune.train.ranks import ALONE, Ranks
from mlxtune.train.run_data import Data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import Job

READING = "reading the model"  # which may take most of a minute


@dataclass(frozen=True)
class Attached:
    """A model with its adapter on it, and the batches that the configuration asks for."""

    loaded: Loaded  # the model, and its tokenizer with the template of the run
    adapter: AdapterPlan  # what trains
    dropout: DropoutKeys  # to be set before each forward pass
    changes: Changes  # of the tokenizer, which the run's folder must keep
    plan: Plan  # the batches, not yet made to fit the memory
    given: Given  # what the memory depends on beside them


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    job: Job  # what the loop works with
    config: Config  # made to fit the memory
    changes: Changes  # of the tokenizer
    notes: list[str]  # what a person must know, in the order in which it is said


@dataclass(frozen=True)
class Planned:
    """What a run would do, as far as that is known before a weight is read."""

    config: Config  # made to fit the memory
    plan: Plan  # its batches
    computed: Epoch  # what of the first epoch's tokens goes through the model
    memory: Memory | None  # the predicted peak; None: the model is of a kind that cannot be predicted
    notes: list[str]  # what a person must know


def prepare(
    config: Config,
    data: Data,
    folder: RunFolder,
    ranks: Ranks = ALONE,
    resume: bool = False,
    listener: Listener = nobody,
) -> Prepared:
    """Read the model, attach its adapter, choose the way to compute, fit the memory.

    resume: the adapter is of the kind that `folder` says. Raises UserError where the model, the adapter and the rows do
    not fit each other or the memory.
    """
    listener({"kind": "doing", "what": READING})
    made = attached(config, data, ranks, adapter_of=folder if resume else None)
    if config.lora.start_from and not resume:
        adapter_files.load_tensors(made.loaded.model, Path(config.lora.start_from) / made.adapter.file)
    backend.wire(lasting_bytes(made.loaded.model))
    mx.reset_peak_memory()  # from here on it is the run's: the proof is a part of it
    chosen = choose(made.given, config, made.plan, ranks, listener)
    job = _job(made, chosen, data, folder, ranks)
    notes = _notes(made, chosen, data, ranks)
    crowded = _crowded(job)
    if ranks.first:
        notes += crowded
    else:
        _warn_here(ranks, crowded)
    return Prepared(job, chosen.config, made.changes, notes)


def plan(config: Config, data: Data) -> Planned:
    """What a run would do. Raises UserError for all that `prepare` refuses before it reads a weight."""
    made = attached(config, data, read=False)
    if config.lora.start_from:
        adapter_files.require_fit(made.loaded.model, Path(config.lora.start_from) / made.adapter.file)
    way = fast_ways.expected_way(made.loaded.model, data.train, config, made.plan.shares)
    way, more = trunk_choice.with_kept_trunk(way, made.loaded.model, config, made.plan)
    run = fit_memory.fit(made.given, way, config, made.plan)
    notes = [*_of_model(made), _ways_out(made.loaded), *more]
    beside = None
    if config.preference.loss == "kto":
        beside = Mismatched(data.train, config.train.seed).beside
    computed = counted.first_epoch(run.rows, run.way.prefix, beside)
    if isinstance(run.memory, Memory):
        return Planned(run.config, run.rows, computed, run.memory, notes + run.notes)
    return Planned(run.config, run.rows, computed, None, notes + (run.notes or [run.memory.note]))


def attached(
    config: Config,
    data: Data,
    ranks: Ranks = ALONE,
    adapter_of: RunFolder | None = None,
    read: bool = True,
) -> Attached:
    """The model as the run trains it, its adapter at its random start.

    adapter_of: the run whose adapter is gone on with, which its first process alone has. read: its weights now.
    """
    loaded = load(str(data.folder), config.train.dtype, read=read, tokenizer=data.tokenizer)
    vocabulary.add_rows_for_new_tokens(loaded, config, data.changes)
    loaded.check_ids([[data.train.highest, data.valid.highest]])
    if adapter_of is not None and ranks.first:
        plan = AdapterPlan.read(adapter_of.path, loaded.model)
    else:
        plan = adapter_plan(config, loaded.model)
    _refuse_useless_b_rate(config, plan)
    dropout = attach.attach(loaded.model, plan, config.train.seed)
    if config.train.neftune_alpha:
        dropout.noise_alpha = config.train.neftune_alpha
        add_noise(loaded.model, dropout)
    sharing = None
    wanted = config.data.group_by_prefix and config.fast.prefix == "auto"
    if wanted and not fast_ways.against_sharing(loaded.model, data.train, config):
        sharing = found_sharing(data.train)
    batches = Plan(data.train, config.train, sharing)
    narrower = floats.narrower(loaded.own, loaded.dtype)
    given = Given(loaded.model, loaded.config, loaded.dtype, _limit(config, ranks), narrower)
    return Attached(loaded, plan, dropout, data.changes, batches, given)


def adapter_plan(config: Config, model: nn.Module) -> AdapterPlan:
    """What trains: as the adapter to start from is, else as configured."""
    if not config.lora.start_from:
        return AdapterPlan.of(model, config.lora)
    start = Path(config.lora.start_from)
    plan = AdapterPlan.read(start, model)
    if adapter_files.adapter_file(start) is None:
        raise UserError(f"{start} has no {plan.file}")
    return replace(plan, dropout=config.lora.dropout)


def _refuse_useless_b_rate(config: Config, plan: AdapterPlan) -> None:
    """Raise UserError for a rate of B where nothing has a factor B."""
    if config.lora.b_rate != 1 and not plan.modules:
        raise UserError(
            f"lora.b_rate {config.lora.b_rate:g} has no effect: this adapter trains layers in full and has no B",
            "Leave it out; train.lr is the rate of layers that train in full.",
        )


def lasting_bytes(model: nn.Module) -> int:
    """Bytes that every step uses: the weights, the adapter and two moments of it."""
    weights = sum(array.nbytes for array in named(model.parameters()).values())
    trained = sum(array.nbytes for array in named(model.trainable_parameters()).values())
    return weights + 2 * trained


def unrepeatable(model: nn.Module, kind: str) -> list[str]:
    """A note where a run cannot be repeated bit for bit on a device of this kind (`backend.kind`)."""
    unordered = attach.summed_in_any_order(model)
    if kind == "cpu" or not unordered:
        return []
    return [
        f"a GPU adds up the gradients of {unordered} in an order of its own: "
        "a run that is repeated or resumed may differ in its last bits"
    ]


def _limit(config: Config, ranks: Ranks) -> int | None:
    """Bytes that the run may take; None: any. All ranks take the same batches: those of the smallest machine."""
    limit = fit_memory.limit_of(config.train)
    if limit is None or ranks.size == 1:
        return limit
    mebibytes = limit >> 20  # which a message between ranks holds exactly, as it does not hold all numbers of bytes
    return ranks.lowest(mebibytes) << 20


def _job(made: Attached, chosen: Fitted, data: Data, folder: RunFolder, ranks: Ranks) -> Job:
    loaded, config = made.loaded, chosen.config
    tokens = fit_memory.evaluation_tokens(loaded.model, chosen.way, chosen.rows)
    if chosen.rows.shares and chosen.way.prefix is not None:
        held_out = side_by_side(data.valid, tokens, found_sharing(data.valid))
    else:
        held_out = in_order(data.valid, tokens)
    valid = ranks.own_items(held_out)
    digests = data.train.digest(), data.valid.digest()
    suite = suite_of(config)
    identity = Identity.of(
        config,
        dtype_name(loaded.dtype),
        *digests,
        loaded.path,
        chosen.rows.dealt,
        suite.digest if suite is not None else "",
    )
    return Job(
        model=loaded.model,
        way=chosen.way,
        dropout=made.dropout,
        plan=chosen.rows,
        section=config.train,
        folder=folder,
        evaluation=Evaluation(loaded, config, chosen.way, valid, ranks, suite),
        place=data.train.place,
        identity=identity,
        adapter=made.adapter,
        ranks=ranks,
        predicted=chosen.memory.total if isinstance(chosen.memory, Memory) else None,
        b_rate=config.lora.b_rate,
        states=RowStates(loaded.model, chosen.way, chosen.budget),
    )


def _of_model(made: Attached) -> list[str]:
    """Notes on the model: the numbers that it is computed in, and how it differs from what transformers computes."""
    loaded, asked = made.loaded, made.plan.section.dtype
    notes = floats.notes(asked, loaded.own, loaded.dtype, loaded.config)
    return notes + corrected.notes(loaded.model, loaded.config)


def _notes(made: Attached, chosen: Fitted, data: Data, ranks: Ranks) -> list[str]:
    """What a person must know of a run before it begins."""
    loaded, config = made.loaded, chosen.config
    train, valid = data.train, data.valid
    notes = train.notes("train", config.data.max_tokens) + valid.notes("valid", config.data.max_tokens)
    notes += of_thumbs(config.preference, train)
    notes += unread(loaded.path) + _of_model(made) + chosen.notes
    if train.chat and not _learns_to_stop(loaded, config):
        notes.append("the chat template ends answers with no token of its own: the model will not learn where to stop")
    if config.lora.start_from:
        notes.append(f"going on from {config.lora.start_from}: its kind, ranks, scales and targets are kept")
    steps = chosen.rows.steps
    notes.append(f"{', '.join(rows_in_words(train, valid))}, {steps} steps")
    if config.preference.loss:
        notes.append(f"objective: {objective_in_words(config.preference)}")
    what = attach.describe(made.adapter, loaded.model)
    notes.append(f"training {what} on {_where(loaded, ranks)}")
    if config.lora.b_rate != 1:
        notes.append(f"B learns at {config.lora.b_rate:g} times the rate of all the rest (lora.b_rate)")
    notes.append(_ways_out(loaded))
    notes.append(f"computed: {fast_ways.describe(chosen.way)}")
    return notes + unrepeatable(loaded.model, backend.kind())


def _learns_to_stop(loaded: Loaded, config: Config) -> bool:
    """Whether the chat template ends answers with a token of their own."""
    template = loaded.templates.of(config.data.template_kwargs)
    return template.ends_answers(config.data.expand_turns == "none")


def _where(loaded: Loaded, ranks: Ranks) -> str:
    """Device, type of the activations, number of processes."""
    where = f"{backend.kind()}, {dtype_name(loaded.dtype)}"
    if ranks.size > 1:
        return f"{where}, {ranks.size} processes"
    return where


def _ways_out(loaded: Loaded) -> str:
    """A note on which exports there are of this model."""
    return described(source_of(loaded.path)["config"], loaded.config)


def _crowded(job: Job) -> list[str]:
    """A warning where other programs leave too little memory for the run."""
    if backend.kind() == "cuda":  # which has memory of its own
        return []
    return surroundings.crowded(job.predicted or lasting_bytes(job.model), backend.memory_bytes())


def _warn_here(ranks: Ranks, crowded: list[str]) -> None:
    """Say what could stop this machine, where another one writes what the run says."""
    for warning in [*surroundings.warnings(), *crowded]:
        text = f"note: process {ranks.number}, on {platform.node()}: {warning}"
        print(text, file=sys.stderr, flush=True)
