"""One run from configuration to adapter: what `mlxtune train` and the demo do."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlxtune_convert.files import explained

from mlxtune import backend
from mlxtune.config import Config
from mlxtune.config import load as load_config
from mlxtune.data import chat, sources
from mlxtune.data.batches import Batch, Plan, in_order
from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.evaluate.loss import Score, score
from mlxtune.model import hub, lora
from mlxtune.model.arrays import dtype_name
from mlxtune.model.head import Split
from mlxtune.model.load import Loaded, cast, load, model_dtype, open_model
from mlxtune.model.memory import Memory
from mlxtune.train import checkpoint, fast, fit, loop
from mlxtune.train.checkpoint import State
from mlxtune.train.display import Display
from mlxtune.train.events import Events

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Data:
    """The examples of a run: training and held-out, with what was shortened or dropped."""

    train: sources.Examples
    valid: sources.Examples


def read_data(config: Config) -> Data:
    """Rows -> examples of the model's tokenizer. Raises UserError before any weight is read."""
    # The rows first: a typing error in them is said before a model is downloaded.
    records = sources.splits(config.data.path, config.data, config.train.seed)
    folder = hub.resolve(config.model.path)
    tokenizer = load_tokenizer(folder)
    sources.require_template(tokenizer, folder, records["train"])
    return Data(
        sources.to_examples(tokenizer, records["train"], config.data),
        sources.to_examples(tokenizer, records["valid"], config.data),
    )


def split_for(loaded: Loaded, config: Config, batch: Batch) -> Split | None:
    """The proven head split, or None when `fast.head` is off or the model's own logits are not reproduced."""
    if config.fast.head == "off":
        return None
    return Split.of(loaded.model, mx.array(batch.ids[:1, : min(64, batch.ids.shape[1])]))


def memory_plan(config: Config, data: Data) -> tuple[Config, Memory, list[str]]:
    """(the configuration made to fit, its predicted memory, notes) of a run, without reading a weight."""
    backend.prepare()
    model, model_config = open_model(hub.resolve(config.model.path))
    dtype = backend.dtype_for(config.train.dtype, model_dtype(model), "quantization" in model_config)
    cast(model, dtype)
    lora.attach(model, lora.Spec.of(model, config.lora), config.train.seed)
    plan = Plan(data.train.examples, config.train, config.data.group_by_prefix)
    config, plan, notes = fit.fitted(model, config, model_config, dtype, plan)
    return config, fit.plan(model, config, model_config, dtype, plan), notes


def anchored(config: Config) -> Config:
    """Local paths made absolute, so that the run can be used and resumed from any folder. Hub ids stay."""

    def absolute(path: str) -> str:
        local = Path(path).expanduser()
        return str(local.resolve()) if local.exists() else path

    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    data = config.data.model_copy(update={"path": absolute(config.data.path)})
    return config.model_copy(update={"model": model, "data": data})


def default_out(model: str) -> Path:
    """runs/<date>-<model>, numbered when it exists."""
    stem = f"{date.today().isoformat()}-{Path(model).name}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for name in names if not (path := Path("runs") / name).exists())


def tune(config: Config, out: Path, display: Display, resume: bool = False) -> State:
    """Train and leave the adapter in `out`.

    Raises UserError for anything wrong with the configuration, data or model, Interrupted after a signal. A run that
    ends before anything was saved leaves no folder.
    """
    config = anchored(config)
    if out.exists() and not resume and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists", "Choose another --out, or continue that run with --resume.")
    fast.refuse_idle(config)
    data = read_data(config)
    loaded = load(config.model.path, config.train.dtype)
    loaded.check_ids(example.ids for example in data.train.examples + data.valid.examples)
    spec = lora.Spec.of(loaded.model, config.lora)
    valid = in_order(data.valid.examples)
    dropout = lora.attach(loaded.model, spec, config.train.seed)
    plan = Plan(data.train.examples, config.train, config.data.group_by_prefix)
    config, plan, fit_notes = fit.fitted(loaded.model, config, loaded.config, loaded.dtype, plan)
    path, path_notes = fast.choose(loaded.model, data.train.examples, config, loaded.dtype)
    job = loop.Job(
        model=loaded.model,
        path=path,
        dropout=dropout,
        plan=plan,
        section=config.train,
        run=out,
        evaluate=lambda: score(loaded.model, path.split, valid),
        lines=[row.record.place for row in data.train.rows],
        data=digest(data),
    )
    notes = data.train.notes("train", config.data.max_tokens) + data.valid.notes("valid", config.data.max_tokens)
    notes += fit_notes + path_notes
    if any(row.record.text is None for row in data.train.rows) and not chat.end_of_turn(
        loaded.tokenizer, config.data.template_kwargs
    ):
        notes.append("the chat template ends answers with no token of its own: the model will not learn where to stop")
    notes.append(f"{len(data.train.rows)} training rows, {len(data.valid.rows)} held out, {plan.steps} steps")
    notes.append(f"training {lora.describe(spec, loaded.model)} on {backend.kind()}, {dtype_name(loaded.dtype)}")
    notes.append(f"computed: {fast.describe(path)}")
    with explained(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not resume:
                lora.save_config(out, spec)
                (out / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            with contextlib.closing(Events(out, display)) as events:
                for note in notes:
                    events.emit("note", text=note)
                display.begin(plan.steps)
                mx.reset_peak_memory()
                return loop.run(job, events, resume)
        except BaseException:
            if not resume and not checkpoint.saved(out):
                shutil.rmtree(out, ignore_errors=True)
            raise


def digest(data: Data) -> str:
    """What the model is trained and scored on, as 16 hex digits: changes when any token or mask does."""
    running = hashlib.sha256()
    for split in (data.train, data.valid):
        for example in split.examples:
            running.update(repr((example.ids, example.mask)).encode())
        running.update(b"|")
    return running.hexdigest()[:16]


def run_config(run: Path) -> Config:
    """The resolved configuration a run was made with. Raises UserError when the folder is no run."""
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run of mlxtune (no {CONFIG_FILE})")
    return load_config(run / CONFIG_FILE)


def held_out(
    tokenizer: Any, folder: Path, config: Config, split: str | None = None, own: bool = True
) -> sources.Examples:
    """The examples to compare on; `folder` names the model in errors.

    own: the data is the run's own, of which the validation rows (or `split`) were held out; else the user named it, and
    a single file counts whole.
    """
    named = split or ("valid" if own else None)
    records = sources.rows_of(config.data.path, config.data, config.train.seed, named, "valid")
    sources.require_template(tokenizer, folder, records)
    return sources.to_examples(tokenizer, records, config.data)


def evaluate(loaded: Loaded, config: Config, examples: sources.Examples) -> Score:
    loaded.check_ids(example.ids for example in examples.examples)
    batches = in_order(examples.examples)
    return score(loaded.model, split_for(loaded, config, batches[-1]), batches)
