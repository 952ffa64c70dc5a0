"""One run from configuration to adapter: what `mlxtune train` and the demo do."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.files import explained, new_file
from mlxtune_convert.hf.chat_templates import unread
from mlxtune_convert.ways_out import described

from mlxtune.adapter import lora, vocabulary
from mlxtune.adapter.dropout import add_noise
from mlxtune.compute import fast_ways, fit_memory, floats
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.memory.prediction import Memory
from mlxtune.config.resolve import Config
from mlxtune.data.chat import masking
from mlxtune.data.dataset.batches import Plan, in_order
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.score import Score, score
from mlxtune.machine import backend, surroundings
from mlxtune.model.arrays import dtype_name, named
from mlxtune.model.corrections import corrected
from mlxtune.model.linux_cpu import as_powers_of_two
from mlxtune.model.load import cast, load, model_dtype, open_model, source_of
from mlxtune.train import checkpoint, loggers, loop
from mlxtune.train.checkpoint import Saved, State
from mlxtune.train.choice import choose
from mlxtune.train.display import Display
from mlxtune.train.events import FILE as EVENTS_FILE
from mlxtune.train.events import Events
from mlxtune.train.events import read as read_events
from mlxtune.train.identity import Identity
from mlxtune.train.lock import UNLOCKED, locked
from mlxtune.train.ranks import ALONE, Ranks
from mlxtune.train.reach import NOTHING, LocalOnly
from mlxtune.train.session import CONFIG_FILE, Data, anchored, read_data, run_config
from mlxtune.train.step import Job

SAMPLE_TOKENS = 128  # of an answer to train.sample_prompts
# What a run does before its first step that may take most of a minute.
READING, PROVING = "reading the model", "proving the fast ways on this model and rows"


def memory_plan(config: Config, data: Data) -> tuple[Config, Memory | None, list[str]]:
    """(the configuration made to fit, its predicted memory, notes) of a run, without reading a weight. Memory None: the
    model is of a kind that cannot be predicted.
    """
    backend.prepare()
    model, model_config = open_model(data.folder)
    own = model_dtype(model)
    dtype = backend.dtype_for(config.train.dtype, own, "quantization" in model_config)
    said = floats.notes(config.train.dtype, own, dtype, model_config) + corrected.notes(model, model_config)
    said.append(described(source_of(data.folder)["config"], model_config))
    cast(model, dtype)
    lora.attach(model, _spec(config, model), config.train.seed)
    plan = Plan(data.train, config.train, config.data.group_by_prefix)
    way = fast_ways.hoped(model, data.train, config)
    given = Given(model, model_config, dtype, fit_memory.limit_of(config.train), floats.narrower(own, dtype))
    found = fit_memory.fitted(given, way, config, plan)
    if isinstance(found.memory, Memory):
        return found.config, found.memory, said + found.notes
    return found.config, None, said + (found.notes or [found.memory.note])


def stays(model: nn.Module) -> int:
    """Bytes that every step uses: the weights, the adapter and two moments of it."""
    trained = sum(array.nbytes for array in named(model.trainable_parameters()).values())
    return sum(array.nbytes for array in named(model.parameters()).values()) + 2 * trained


def default_out(model: str) -> Path:
    """runs/<date>-<model>, numbered when it exists."""
    stem = f"{date.today().isoformat()}-{Path(model).name}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for name in names if not (path := Path("runs") / name).exists())


def tune(
    config: Config,
    out: Path,
    display: Display,
    resume: bool = False,
    anyway: bool = False,
    local: LocalOnly = NOTHING,
) -> State:
    """Train and leave the adapter in `out`.

    resume: go on from its newest checkpoint; anyway: though keys that may change did; local: for what the hub is not
    asked. Raises UserError for anything wrong with the configuration, data or model, Interrupted after a signal. A run
    that ends before anything was saved leaves no folder.
    """
    ranks = Ranks.here()
    with ExitStack() as stack:
        stack.enter_context(ranks.explained(out))
        # Rank 0's word counts: the others may be on machines that have no run folder.
        config = Config.model_validate_json(ranks.tell(anchored(config).model_dump_json()))
        loggers.require(config.train.loggers)
        fast_ways.refuse_idle(config)
        if config.train.keep_awake == "auto":  # on every machine: one that sleeps stops the others
            stack.enter_context(surroundings.kept_awake())
        notes: list[str] = []
        saved = None
        if resume and ranks.first:
            run_config(out)
            notes += [] if stack.enter_context(locked(out)) else [UNLOCKED]
            saved = checkpoint.newest(out, notes.append)
        elif ranks.first:
            require_free(out)
        data, config = read_data(config, display.reading, local)
        stack.callback(backend.wire, 0)  # as MLX begins: what `prepared` wires is wired for training alone
        job, config, changes, found = prepared(config, data, out, ranks, resume, display.doing)
        if saved is not None:
            notes += saved.identity.refuse_other(job.identity, out, anyway)
        notes += found
        ranks.require_same(data=job.identity.train + job.identity.valid, model=job.identity.model, MLX=job.identity.mlx)
        if resume:
            state = json.loads(ranks.tell(json.dumps(asdict(saved.state)) if saved else ""))
            saved = saved or Saved(out, State(**state), job.identity)
        if not ranks.first:
            return loop.run(job, Events(None), saved)
        stack.enter_context(explained(out))
        if not resume:
            require_free(out)  # reading took a while
            out.mkdir(parents=True, exist_ok=True)
            notes += [] if stack.enter_context(locked(out)) else [UNLOCKED]
            if checkpoint.exists(out):  # since we looked, another run began and ended here
                raise _taken(out)
        try:
            if not resume:
                (out / EVENTS_FILE).unlink(missing_ok=True)  # of a run that was killed before it saved anything
                lora.save_config(out, job.spec)
                changes.save(out)
            return _written(job, config, notes, display, stack, saved)
        except BaseException:
            if not resume and not checkpoint.exists(out):
                checkpoint.remove(out)
            raise


def require_free(out: Path) -> None:
    """Raise UserError when no run may begin in `out`."""
    if not checkpoint.free(out):
        raise _taken(out)


def _taken(out: Path) -> UserError:
    also = ", or continue that run with --resume" if checkpoint.resumable(out) else ""
    return UserError(f"{out} already exists", f"Choose another --out{also}.")


def prepared(
    config: Config,
    data: Data,
    out: Path,
    ranks: Ranks = ALONE,
    resume: bool = False,
    doing: Callable[[str], None] = lambda what: None,
) -> tuple[Job, Config, Changes, list[str]]:
    """(the job, the configuration made to fit, changes of the tokenizer, what a person must know): the model read, its
    adapter attached. doing: told what goes on where it may last.
    """
    doing(READING)
    loaded = load(str(data.folder), config.train.dtype)
    changes = vocabulary.prepare(loaded, config)
    loaded.check_ids([[data.train.highest, data.valid.highest]])
    spec = lora.read_spec(out) if resume and ranks.first else _spec(config, loaded.model)
    dropout = lora.attach(loaded.model, spec, config.train.seed)
    if config.lora.start_from and not resume:
        lora.load_factors(loaded.model, Path(config.lora.start_from) / spec.file)
    if config.train.neftune_alpha:
        dropout.noise_alpha = config.train.neftune_alpha
        add_noise(loaded.model, dropout)
    plan = Plan(data.train, config.train, config.data.group_by_prefix)
    limit = fit_memory.limit_of(config.train)
    if limit is not None and ranks.size > 1:  # all ranks take the same batches: those of the smallest machine, in MiB
        limit = ranks.lowest(limit >> 20) << 20
    given = Given(loaded.model, loaded.config, loaded.dtype, limit, floats.narrower(loaded.own, loaded.dtype))
    backend.wire(stays(loaded.model))
    mx.reset_peak_memory()  # from here on it is the run's: the proof is a part of it
    chosen = choose(given, config, plan, ranks, lambda: doing(PROVING))
    config, plan, way = chosen.config, chosen.rows, chosen.way
    predicted = chosen.memory.total if isinstance(chosen.memory, Memory) else None
    valid = ranks.deal(in_order(data.valid, fit_memory.evaluation_tokens(loaded.model, way, plan)))

    def evaluate(between: Callable[[], None]) -> Score:
        with as_powers_of_two(way.powers):
            own = score(loaded.model, way.split, valid, way.prefix, between)
        loss, *counts = ranks.sums(own.loss_sum, own.tokens, own.correct)
        return Score(loss, *(round(count) for count in counts))

    def samples(between: Callable[[], None]) -> list[dict[str, str]]:
        sampling = generate.Sampling(max_tokens=SAMPLE_TOKENS)
        variables = config.data.template_kwargs, config.data.date
        answers = []
        for prompt in config.train.sample_prompts:
            between()
            if ranks.first:
                said = generate.answer(loaded, [{"role": "user", "content": prompt}], sampling, *variables)
                answers.append({"prompt": prompt, "answer": said})
            ranks.meet()
        return answers

    job = Job(
        model=loaded.model,
        way=way,
        dropout=dropout,
        plan=plan,
        section=config.train,
        run=out,
        evaluate=evaluate,
        place=data.train.place,
        identity=Identity.of(config, dtype_name(loaded.dtype), data.train.digest(), data.valid.digest(), loaded.path),
        spec=spec,
        samples=samples,
        ranks=ranks,
        predicted=predicted,
    )
    notes = data.train.notes("train", config.data.max_tokens) + data.valid.notes("valid", config.data.max_tokens)
    notes += unread(loaded.path) + floats.notes(config.train.dtype, loaded.own, loaded.dtype, loaded.config)
    notes += corrected.notes(loaded.model, loaded.config) + chosen.notes
    template = masking.template_of(loaded.tokenizer, config.data.template_kwargs)
    if data.train.chat and not template.ends_answers(config.data.expand_turns == "none"):
        notes.append("the chat template ends answers with no token of its own: the model will not learn where to stop")
    if config.lora.start_from:
        notes.append(f"going on from {config.lora.start_from}: its kind, ranks, scales and targets are kept")
    own, held = data.train, data.valid
    notes.append(f"{own.rows} training rows{own.also}, {held.rows} held out{held.also}, {plan.steps} steps")
    where = f"{backend.kind()}, {dtype_name(loaded.dtype)}" + (f", {ranks.size} processes" if ranks.size > 1 else "")
    notes.append(f"training {lora.describe(spec, loaded.model)} on {where}")
    notes.append(described(source_of(loaded.path)["config"], loaded.config))
    notes.append(f"computed: {fast_ways.describe(way)}")
    notes += repeatable(loaded.model, backend.kind())
    tight = []
    if backend.kind() != "cuda":  # which has memory of its own
        tight = surroundings.crowded(predicted or stays(loaded.model), backend.memory_bytes())
    if ranks.first:
        notes += tight
    else:
        for warning in [*surroundings.warnings(), *tight]:
            print(f"note: process {ranks.number}, on {platform.node()}: {warning}", file=sys.stderr, flush=True)
    return job, config, changes, notes


def repeatable(model: nn.Module, kind: str) -> list[str]:
    """A note where a run cannot be repeated bit for bit on a device of this kind (`backend.kind`)."""
    unordered = lora.summed_in_any_order(model)
    if kind == "cpu" or not unordered:
        return []
    return [
        f"a GPU adds up the gradients of {unordered} in an order of its own: "
        "a run that is repeated or resumed may differ in its last bits"
    ]


def _written(
    job: Job, config: Config, notes: list[str], display: Display, stack: ExitStack, saved: Saved | None
) -> State:
    """Run the job with everything that writes and draws around it."""
    out, step = job.run, saved.state.step if saved else 0
    with new_file(out / CONFIG_FILE, force=True) as file:
        file.write(config.to_yaml())
    events = stack.enter_context(closing(Events(out, display)))
    opened = loggers.opened(
        config.train.loggers, out, job.identity.without_places(), step, lambda text: events.emit("note", text=text)
    )
    events.listen(*stack.enter_context(opened))
    # What will be written: the checkpoints (the adapter, and two moments of it), one more while it is being written.
    adapter = sum(array.nbytes for array in lora.factors(job.model).values())
    notes += surroundings.warnings(out, (config.train.keep_last + 2) * 3 * adapter + (1 << 30))
    way, before = fast_ways.describe(job.way), _way_before(out)
    if saved and before not in ("", way):
        notes.append(f"up to here the run was computed otherwise ({before}): the last bits may differ")
    events.emit("begin", step=step, steps=job.plan.steps, model=config.model.path, computed=way)
    for note in [*notes, *([f"resumed after step {step}"] if saved else [])]:
        events.emit("note", text=note)
    display.begin(job.plan.steps, config.train.eval_every)
    return loop.run(job, events, saved)


def _way_before(out: Path) -> str:
    """How the run in `out` was computed so far, in words; "": nobody knows."""
    try:
        happened = read_events(out) if (out / EVENTS_FILE).is_file() else []
    except ValueError:  # somebody changed the file; what is written from now on can be read
        return ""
    return next((str(event["computed"]) for event in reversed(happened) if "computed" in event), "")


def _spec(config: Config, model: nn.Module) -> lora.Spec:
    """What trains: as the adapter to start from is, else as configured."""
    if not config.lora.start_from:
        return lora.Spec.of(model, config.lora)
    start = Path(config.lora.start_from)
    spec = lora.read_spec(start)
    if lora.adapter_file(start) is None:
        raise UserError(f"{start} has no {spec.file}")
    layers = len(model.layers)
    return replace(spec, dropout=config.lora.dropout, num_layers=spec.num_layers if spec.num_layers > 0 else layers)
